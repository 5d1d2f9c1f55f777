"""``patch``, ``unpatch`` and ``patched``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ...dispatch.rules import find
from ...errors import UnsupportedError
from ...nn.attention import RegisterAttention
from ...nn.hooks import Transparent
from ...ops._shared.arguments import DTYPES
from ...ops.attention.api import explain
from ...ops.attention.backends import BACKENDS
from ..attention.attend import Attend
from ..attention.kind import Heads, Kind
from ..libraries import LIBRARIES
from ..residual_stream import modules_in_blocks, unwrapped
from .method import fused_method, give_back, replace
from .report import Patched, PatchReport

_PATCHES = 256  # of the call whose backend a report names


def patch(
    model: nn.Module, *, num_prefix_tokens: int | None = None, backend: str | None = None, strict: bool = False
) -> PatchReport:
    """Let the attention of somebody's Vision Transformer run on this library's kernels, in place.

    The modules stay what they are: the same objects of the same classes, with their parameters, names, hooks and
    states. Only what they compute in is replaced, on these instances, and given back by ``unpatch``. Outputs and
    gradients are those of the model within the accuracy rule of the op; a module that may be different is left alone.

    Known are the attention modules of timm, Hugging Face transformers, DINOv2, DINOv3, open_clip, torchvision and
    perception_models, anywhere in the model, compiled or wrapped or not. torch's own ``nn.MultiheadAttention`` is taken
    in the blocks of these libraries' Vision Transformers, or where it is itself what is given; anywhere else it may
    belong to a decoder, a pool or a text.

    Args:
        model: a model, or a part of one.
        num_prefix_tokens: P, the CLS and register tokens that lead the sequence; found in the model where it is known.
            Read by what is captured, and by rotations whose module does not say.
        backend: a backend's name for every call, which then runs or raises; ``None`` takes the default for each.
        strict: raise if a module that attends is left alone.

    Returns:
        What was done; print it.

    Raises:
        TypeError, ValueError: if there is no module, or none that attends in a way known here; or the number of prefix
            tokens or the backend is not one.
        UnsupportedError: if ``strict`` and a module would be left alone, or the backend cannot serve a module. Nothing
            is changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if num_prefix_tokens is not None and (type(num_prefix_tokens) is not int or num_prefix_tokens < 0):
        raise ValueError(f"num_prefix_tokens must be an int of at least 0, got {num_prefix_tokens!r}")
    model = unwrapped(model)
    plans, report = _plan(model, num_prefix_tokens, backend)
    if not report.modules:
        raise ValueError(
            f"{type(model).__name__} has no attention module known here; known are those of "
            f"{', '.join(library.name for library in LIBRARIES)}"
        )
    if strict and report.left:
        raise UnsupportedError(f"strict=True, and these would be left alone:\n{report}")
    for module, kind, attend in plans:
        if fused_method(module) is not None:
            give_back(module)
        replace(module, kind.method, kind.compute, attend)
    return report


def unpatch(model: nn.Module) -> None:
    """Give every patched module of a model its own computation back; a model without one stays as it is."""
    for module in model.modules():
        if fused_method(module) is not None:
            give_back(module)


@contextmanager
def patched(model: nn.Module, **options: object) -> Iterator[PatchReport]:
    """``patch`` for the length of a ``with``, and ``unpatch``; gives the report."""
    report = patch(model, **options)
    try:
        yield report
    finally:
        unpatch(model)


def _plan(
    model: nn.Module, num_prefix_tokens: int | None, backend: str | None
) -> tuple[list[tuple[nn.Module, Kind, Attend | None]], PatchReport]:
    """What ``patch`` is going to do, and its report; changes nothing."""
    plans, entries, counts = [], [], set()
    modules, in_blocks = dict(model.named_modules()), modules_in_blocks(model)
    for name, module in modules.items():
        kind = _kind_of(module)
        cls = type(module).__name__
        if kind is None:
            if _attends(module) and not any(map(_kind_of, module.modules())):
                entries.append(Patched(name, cls, reason="not a class known here"))
            continue
        if kind.in_blocks and not (module is model or module in in_blocks or fused_method(module)):
            entries.append(Patched(name, cls, reason="not in a block of a Vision Transformer known here"))
            continue
        if reason := kind.reason_against(module) or _replaced_by_another(module, kind):
            entries.append(Patched(name, cls, reason=reason))
            continue
        prefix = _prefix_tokens(modules, name) if num_prefix_tokens is None else num_prefix_tokens
        plans.append((module, kind, kind.heads and Attend(prefix, backend)))
        counts.add(prefix)
        if kind.heads is not None:
            entries.append(Patched(name, cls, backend=_backend(kind.heads(module), prefix or 0, backend)))
    return plans, PatchReport(entries, counts.pop() if len(counts) == 1 else None)


def _kind_of(module: nn.Module) -> Kind | None:
    return next((kind for library in LIBRARIES for kind in library.attention if kind.fits(module)), None)


def _attends(module: nn.Module) -> bool:
    """Whether a module of a class not known here looks as if tokens attended to one another in it."""
    name = type(module).__name__.lower()
    if isinstance(module, RegisterAttention):  # needs no patch
        return False
    return hasattr(module, "fused_attn") or ("attention" in name and "pool" not in name)


def _replaced_by_another(module: nn.Module, kind: Kind) -> str:
    own = vars(module).get(kind.method)
    known = own is None or isinstance(own, Transparent) or fused_method(module) is not None
    return "" if known else f"its {kind.method} was replaced on the instance by another"


def _prefix_tokens(modules: dict[str, nn.Module], name: str) -> int | None:
    """The prefix tokens of the nearest model around a module that says how many it has."""
    while True:
        for library in LIBRARIES:
            if (count := library.prefix_tokens(modules[name])) is not None:
                return count
        if not name:
            return None
        name = name.rpartition(".")[0]


def _backend(heads: Heads, prefix: int, backend: str | None) -> str:
    """The backend that a call of one image takes, in words; empty if the weights are on no device yet.

    Raises:
        ValueError, UnsupportedError: if there is no such backend, or none can serve such a call.
    """
    weight = heads.weight
    if weight.is_meta:
        if backend is not None:
            find(BACKENDS, backend)
        return ""
    dtype = weight.dtype if weight.dtype in DTYPES else torch.float32  # of weights in integers
    query = torch.empty(1, heads.number, prefix + _PATCHES, heads.head_dim, dtype=dtype, device=weight.device)
    taken = explain(query, backend=backend)
    if taken.backend is None:
        raise UnsupportedError(str(taken))
    size = f"{heads.number} heads of {heads.head_dim}, {query.shape[2]} tokens"
    return f"{taken.backend} ({size}, {str(dtype).removeprefix('torch.')})"
