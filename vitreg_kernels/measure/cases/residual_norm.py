"""Residual norms: the widths of ViTs with all that a call may have, and each kind of call once; with gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...functional import residual_layer_norm
from ...ops.residual_norm.features import request_of
from ...ops.residual_norm.validation import validated
from ..oracle import Call, Tensors, outputs_and_gradients, with_defaults
from .tensors import SHAPE, SHAPES, Shape, permuted, size, uniform

INPUTS = ("x", "branch", "layer_scale", "weight", "bias")
OUTPUTS = ("residual", "normalized")  # that carry gradients; the token norms do not
_SUMMED = ("grad_layer_scale", "grad_weight", "grad_bias")  # over all tokens


def call(x: Tensor, *, name: str = "", upstream: Tensors | None = None, **options: Any) -> Call:
    """A call of ``residual_layer_norm``.

    Args:
        x: ``[B, N, C]``.
        name: what it exercises.
        upstream: gradients ``[B, N, C]`` of the residual and the normalized tokens, by name; random by default.
        options: further arguments of ``residual_layer_norm``.
    """
    if upstream is None:
        numbers = partial(uniform, torch.Generator(x.device).manual_seed(0), x.dtype)
        upstream = {output: numbers(*x.shape) for output in OUTPUTS}
    return Call(
        name=name,
        request=request_of(validated(**with_defaults(residual_layer_norm, x=x, **options))),
        function=_normalize,
        arguments={"x": x, "upstream": upstream, **options},
        terms=partial(terms, x.shape),
    )


def terms(shape: Shape, tensor: str) -> int:
    """K of the accuracy rule for a tensor of a call with x ``[B, N, C]``."""
    batch, tokens, channels = shape
    return channels + (batch * tokens if tensor in _SUMMED else 0)


def calls(dtype: torch.dtype, device: torch.device) -> Iterator[Call]:
    """Each kind of call once, and the widths of ViTs."""
    yield from kinds(SHAPE, dtype, device)
    for shape in SHAPES:
        yield full(shape, dtype, device)


def kinds(shape: Shape, dtype: torch.dtype, device: torch.device) -> Iterator[Call]:
    """Each kind of call, with x ``[B, N, C]``."""
    yield full(shape, dtype, device)
    generator = torch.Generator(device).manual_seed(3)
    numbers = partial(uniform, generator, dtype)
    whole = _with_everything(permuted(numbers(*shape)), permuted(numbers(*shape)), numbers, kind=", permuted")
    yield whole
    given = whole.arguments
    x, weight, bias = given["x"], given["weight"], given["bias"]
    of_branch = {name: given[name] for name in ("branch", "layer_scale", "drop_path")}
    yield call(x, name=f"{size(shape)}, RMSNorm", weight=weight, rms=True, **of_branch)
    yield call(x, name=f"{size(shape)}, no branch", weight=weight, bias=bias)
    if dtype != torch.float32:
        stream = uniform(generator, torch.float32, *shape)
        yield _with_everything(stream, numbers(*shape), numbers, kind=", fp32 stream")


def full(shape: Shape, dtype: torch.dtype, device: torch.device) -> Call:
    """A contiguous call with everything that it may have, with x ``[B, N, C]``."""
    numbers = partial(uniform, torch.Generator(device).manual_seed(2), dtype)
    return _with_everything(numbers(*shape), numbers(*shape), numbers)


def _with_everything(x: Tensor, branch: Tensor, numbers: Callable[..., Tensor], *, kind: str = "") -> Call:
    batch, _, channels = x.shape
    parameters = {name: numbers(channels) for name in ("layer_scale", "weight", "bias")}
    kept = (torch.arange(batch, device=x.device) % 3 > 0).to(branch.dtype) / 0.7
    return call(x, name=size(x.shape) + kind, branch=branch, drop_path=kept, **parameters)


def _normalize(backend: str, upstream: Tensors, **arguments: Any) -> Tensors:
    inputs = {name: arguments.pop(name) for name in INPUTS if arguments.get(name) is not None}

    def normalize(**inputs: Tensor) -> Tensors:
        return residual_layer_norm(**inputs, **arguments, backend=backend)._asdict()

    return outputs_and_gradients(normalize, inputs, upstream)
