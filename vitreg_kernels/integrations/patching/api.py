"""``patch``, ``unpatch`` and ``patched``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

from torch import nn

from ...errors import UnsupportedError
from ...nn.attention import RegisterAttention
from ...ops.catalogue import backend_by_op
from ..libraries import LIBRARIES
from ..modules import check_is_module
from ..residual_stream import unwrapped
from .method import fused_method, give_back, replace
from .plan import planned
from .report import PatchReport

_OPS = {"attention": ("attention",), "block": ("attention", "residual_norm")}


def patch(
    model: nn.Module,
    *,
    level: Literal["attention", "block"] = "attention",
    num_prefix_tokens: int | None = None,
    backend: str | Mapping[str, str | None] | None = None,
    strict: bool = False,
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
        level: ``"block"`` also fuses, in the pre-norm blocks that ``vitreg support`` lists, the add behind attention,
            with LayerScale and stochastic depth, and the LayerNorm that follows. While that norm or the stochastic
            depth has a hook, the block computes as its class does.
        num_prefix_tokens: P, the CLS and register tokens that lead the sequence; found in the model where it is known.
            Read by what is captured, and by rotations whose module does not say.
        backend: a backend's name for every call of an op that has it, which then runs or raises, or names by op,
            ``"attention"`` and ``"residual_norm"``; ``None`` takes the default for each.
        strict: raise if a module that attends, or of ``level="block"`` a block, is left alone.

    Returns:
        What was done, which may be nothing, and why; print it. The backend that it names is that of a call of one image
        of 16 x 16 patches.

    Raises:
        TypeError, ValueError: if there is no module, or none in it that attends; or the level, the number of prefix
            tokens or the backend is not one.
        UnsupportedError: if ``strict`` and a module would be left alone, or the backend cannot serve one. Nothing is
            changed then.
    """
    check_is_module(model)
    if num_prefix_tokens is not None and (type(num_prefix_tokens) is not int or num_prefix_tokens < 0):
        raise ValueError(f"num_prefix_tokens must be an int of at least 0, got {num_prefix_tokens!r}")
    if not isinstance(level, str) or level not in _OPS:
        raise ValueError(f"level must be one of {', '.join(map(repr, _OPS))}, not {level!r}")
    model = unwrapped(model)
    plans, report = planned(model, level, num_prefix_tokens, backend_by_op(backend, _OPS[level]))
    if not report.modules:
        raise ValueError(
            f"{type(model).__name__} has no attention module known here; known are those of "
            f"{', '.join(library.name for library in LIBRARIES)}"
        )
    if strict and report.left:
        raise UnsupportedError(f"strict=True, and these would be left alone:\n{report}")
    unpatch(model)
    for module, kind, op in plans:
        replace(module, kind.method, kind.compute, op)
    return report


def unpatch(model: nn.Module) -> None:
    """Give every patched module of a model its own computation back; a model without one stays as it is.

    Raises:
        TypeError: if it is no module.
    """
    check_is_module(model)
    for module in _patched(model):
        give_back(module)


@contextmanager
def patched(
    model: nn.Module,
    *,
    level: Literal["attention", "block"] = "attention",
    num_prefix_tokens: int | None = None,
    backend: str | Mapping[str, str | None] | None = None,
    strict: bool = False,
) -> Iterator[PatchReport]:
    """``patch`` for the length of a ``with``; gives the report. What was patched before is so again after it."""
    check_is_module(model)
    before = [(module, fused_method(module)) for module in _patched(model)]
    report = patch(model, level=level, num_prefix_tokens=num_prefix_tokens, backend=backend, strict=strict)
    try:
        yield report
    finally:
        unpatch(model)
        for module, method in before:
            replace(module, method.name, method.compute, method.op)


def _patched(model: nn.Module) -> list[nn.Module]:
    """The patched modules. A RegisterAttention is none, only captured, maybe, by whoever ends that."""
    return [m for m in model.modules() if fused_method(m) is not None and not isinstance(m, RegisterAttention)]
