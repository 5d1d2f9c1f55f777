"""What ``patch`` is going to do with a model, told before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from ...dispatch import explain
from ...errors import UnsupportedError
from ...nn.attention import RegisterAttention
from ...nn.hooks import Transparent
from ...nn.instance_method import bound_to
from ...nn.vit import RegisterViT
from ...ops._shared.arguments import DTYPES
from ...ops.attention.api import explain as explain_attention
from ...ops.residual_norm import backends as norm_backends
from ...ops.residual_norm import features as norm_features
from ...ops.residual_norm.validation import validated
from ..attention.attend import Attend
from ..blocks.add_norm import AddNorm, norm_of
from ..kind import Heads, Kind
from ..libraries import LIBRARIES
from ..residual_stream import modules_in_blocks, streams_of
from .method import FusedMethod, fused_method
from .report import Patched, PatchReport

_ATTENTION = tuple(kind for library in LIBRARIES for kind in library.attention)
_BLOCKS = tuple(kind for library in LIBRARIES for kind in library.blocks)
_PATCHES = 256  # of the call whose backend a report names


class Plan(NamedTuple):
    """A module, how it is to compute, and its way into the op."""

    module: nn.Module
    kind: Kind
    op: Attend | AddNorm | None


def planned(
    model: nn.Module, level: str, num_prefix_tokens: int | None, backends: Mapping[str, str | None]
) -> tuple[list[Plan], PatchReport]:
    """The plan for a model and its report.

    Args:
        model: without its wrappers.
        level: ``"attention"`` or ``"block"``.
        num_prefix_tokens: as given to ``patch``.
        backends: by op, those of the level.

    Raises:
        UnsupportedError: if a backend cannot serve a module.
    """
    plans, entries, counts = [], [], set()
    modules, in_blocks = dict(model.named_modules()), modules_in_blocks(model)
    blocks = {block for stream in streams_of(model) for _, block in stream.layers} if level == "block" else set()
    kinds = {module: _kind_of(module, level) for module in modules.values()}
    for name, module in modules.items():
        kind = kinds[module]
        cls = type(module).__name__
        if kind is None:
            known = {kinds[part] for part in module.modules()} - {None}
            if module in blocks:  # unless it is a wrapper of one
                if known.isdisjoint(_BLOCKS):
                    entries.append(Patched(name, cls, reason="not a block known here"))
            elif _attends(module) and not known:
                entries.append(Patched(name, cls, reason="not a class known here"))
            continue
        if kind.in_blocks and not (module is model or module in in_blocks or fused_method(module)):
            entries.append(Patched(name, cls, reason="not in a block of a Vision Transformer known here"))
            continue
        if reason := kind.reason_against(module) or _replaced_by_another(module, kind):
            entries.append(Patched(name, cls, reason=reason))
            continue
        if kind in _BLOCKS:
            plans.append(Plan(module, kind, AddNorm(backends["residual_norm"])))
            entries.append(Patched(name, cls, backend=_norm_backend(module, backends["residual_norm"])))
            continue
        if kind.heads is None:
            plans.append(Plan(module, kind, None))
            continue
        before = _attend_of(module)
        prefix = _prefix_tokens(modules, name) if num_prefix_tokens is None else num_prefix_tokens
        prefix = before.num_prefix_tokens if prefix is None else prefix
        counts.add(prefix)
        plans.append(Plan(module, kind, Attend(prefix, backends["attention"], before.takers)))
        backend = _backend(module, kind.heads(module), prefix or 0, backends["attention"])
        entries.append(Patched(name, cls, backend=backend))
    return plans, PatchReport(entries, counts.pop() if len(counts) == 1 else None)


def _kind_of(module: nn.Module, level: str) -> Kind | None:
    kinds = _ATTENTION + _BLOCKS if level == "block" else _ATTENTION
    return next((kind for kind in kinds if kind.fits(module)), None)


def _attends(module: nn.Module) -> bool:
    """Whether a module of a class not known here looks as if tokens attended to one another in it."""
    name = type(module).__name__.lower()
    if isinstance(module, RegisterAttention | RegisterViT):  # needs no patch
        return False
    return hasattr(module, "fused_attn") or ("attention" in name and "pool" not in name)


def _replaced_by_another(module: nn.Module, kind: Kind) -> str:
    own = vars(module).get(kind.method)
    known = own is None or isinstance(bound_to(own), Transparent | FusedMethod)
    return "" if known else f"its {kind.method} was replaced on the instance by another"


def _attend_of(module: nn.Module) -> Attend:
    """What a module that is patched already knows of its prefix, and who captures it."""
    method = fused_method(module)
    return Attend() if method is None else method.op


def _prefix_tokens(modules: dict[str, nn.Module], name: str) -> int | None:
    """The prefix tokens of the nearest model around a module that says how many it has."""
    while True:
        for library in LIBRARIES:
            if (count := library.prefix_tokens(modules[name])) is not None:
                return count
        if not name:
            return None
        name = name.rpartition(".")[0]


def _where(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of a module's weights; fp32 of weights in integers."""
    weights = [*module.parameters(), *module.buffers()]
    dtype = next((x.dtype for x in weights if x.dtype in DTYPES), torch.float32)
    return weights[0].device if weights else torch.device("cpu"), dtype


def _backend(module: nn.Module, heads: Heads, prefix: int, backend: str | None) -> str:
    """The backend that attention over one image takes, in words; empty if the weights are on no device yet.

    Raises:
        UnsupportedError: if none can serve such a call.
    """
    device, dtype = _where(module)
    if device.type == "meta":
        return ""
    query = torch.empty(1, heads.number, prefix + _PATCHES, heads.head_dim, dtype=dtype, device=device)
    taken = explain_attention(query, backend=backend)
    if taken.backend is None:
        raise UnsupportedError(str(taken))
    size = f"{heads.number} heads of {heads.head_dim}, {query.shape[2]} tokens"
    return f"{taken.backend} ({size}, {_short(dtype)})"


def _norm_backend(module: nn.Module, backend: str | None) -> str:
    """The backend that the add and the norm of one image take, in words, as ``_backend``."""
    device, dtype = _where(module)
    if device.type == "meta":
        return ""
    norm = norm_of(module)
    x = torch.empty(1, _PATCHES, norm.weight.shape[0], dtype=dtype, device=device)
    inputs = validated(x, x, layer_scale=None, drop_path=None, weight=norm.weight, bias=norm.bias, eps=1e-6, rms=False)
    taken = explain(norm_backends.BACKENDS, norm_features.request_of(inputs), backend)
    if taken.backend is None:
        raise UnsupportedError(str(taken))
    return f"add and norm by {taken.backend} ({x.shape[2]} channels, {_short(dtype)})"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
