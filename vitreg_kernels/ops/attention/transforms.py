"""The op's rules for function transforms: its formula, the formula's gradient, and many calls as one.

A mapped dimension joins the batch, or, of packed images, the tokens: a pack of packs is a pack.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._shared.arguments import without_autocast
from .._shared.transforms import Dims, Mapped, Rules, joined, parted, side_by_side, vjp
from . import reference
from .types import ROPE_IS_CONSTANT, AttentionInputs, Rope, unpack_qkv


class Call(NamedTuple):
    """The tensors and scalars of a call after query, key and value, in the order of the schemas."""

    mask: Tensor | None
    cos: Tensor | None
    sin: Tensor | None
    interleaved: bool
    cu_seqlens: Tensor | None
    max_seqlen: int
    num_prefix_tokens: int
    scale: float


def inputs_of(query: Tensor, key: Tensor, value: Tensor, call: Sequence[Any], outputs: str = "") -> AttentionInputs:
    """A call of the ops as backends take it."""
    mask, cos, sin, interleaved, cu_seqlens, max_seqlen, num_prefix_tokens, scale = call
    rope = None if cos is None else Rope(cos, sin, interleaved)
    names = tuple(outputs.split()) if outputs else ()
    return AttentionInputs(query, key, value, mask, 0.0, scale, num_prefix_tokens, rope, cu_seqlens, max_seqlen, names)


# The formulas: the specification in the place of a kernel, arguments and results in the ops' order.


def _forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *call, outputs, _backend = rest
    inputs = inputs_of(query, key, value, call, outputs)
    with without_autocast(query):  # fp32 is meant where the specification says it
        output, statistics = reference.attention(inputs)
    return output, *(getattr(statistics, name) for name in inputs.outputs)


def _forward_qkv(qkv: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    output, *statistics = _forward(*unpack_qkv(qkv), *rest)
    return output.transpose(1, 2).flatten(2), *statistics


def _backward(grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    call = rest[: len(Call._fields)]
    _, pull = vjp(lambda *qkv: _forward(*qkv, *call, "", ""), (query, key, value))
    return pull(grad_output)


def _backward_qkv(grad_output: Tensor, qkv: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    call = rest[: len(Call._fields)]
    _, pull = vjp(lambda qkv: _forward_qkv(qkv, *call, "", ""), (qkv,))
    return pull(grad_output)


# Where a pack's results have their tokens, or its images.
_TOKEN_AXES = {"lse": 2, "prefix_attention": 3, "received_attention": 2, "max_logit": 0, "token_norms": 1}


def _folding(before: tuple[int, ...], after: tuple[int, ...], results: tuple[int, ...]) -> Callable[..., Mapped]:
    """How calls become one, of an op whose tensors have their tokens along such axes.

    Args:
        before: of the tensors in front of what ``Call`` holds.
        after: of the tensors behind it.
        results: of what the op gives; the statistics that ``outputs`` names follow.
    """

    def fold(size: int, in_dims: Dims, arguments: tuple, kernel: Callable[..., tuple[Tensor, ...]]) -> Mapped:
        end = len(before) + len(Call._fields)
        call = Call(*arguments[len(before) : end])
        packed = call.cu_seqlens is not None
        axes = [axis if packed else 0 for axis in (*before, *after)]
        tensors = (*arguments[: len(before)], *arguments[end : end + len(after)])
        dims = (*in_dims[: len(before)], *in_dims[end : end + len(after)])
        tensors = [joined(x, dim, size, axis) for x, dim, axis in zip(tensors, dims, axes, strict=True)]
        each = tensors[0].shape[axes[0]] // size  # images of a batch, or tokens of a pack
        call = _folded_call(call, in_dims[len(before) : end], size, each)
        others = arguments[end + len(after) :]
        computed = kernel(*tensors[: len(before)], *call, *tensors[len(before) :], *others)
        named = others[0].split() if len(others) == 2 else ()
        out_dims = tuple(axis if packed else 0 for axis in (*results, *(_TOKEN_AXES[name] for name in named)))
        return tuple(parted(x, size, axis) for x, axis in zip(computed, out_dims, strict=True)), out_dims

    return fold


def _folded_call(call: Call, in_dims: Dims, size: int, each: int) -> Call:
    dims = Call(*in_dims)
    if call.cu_seqlens is None:
        turned = dims.cos is not None or dims.sin is not None  # cos and sin lie alike in memory
        return call._replace(
            mask=_of_images(call.mask, dims.mask, size, each, rank=4, mapped=dims.mask is not None),
            cos=_of_images(call.cos, dims.cos, size, each, rank=3, mapped=turned),
            sin=_of_images(call.sin, dims.sin, size, each, rank=3, mapped=turned),
        )
    cos, sin = (
        None if x is None else joined(x, dim, size, x.ndim - (dim is not None) - 2)
        for x, dim in ((call.cos, dims.cos), (call.sin, dims.sin))
    )
    return call._replace(cos=cos, sin=sin, cu_seqlens=_pack_of_packs(call.cu_seqlens, size, each))


def _of_images(x: Tensor | None, dim: int | None, size: int, each: int, *, rank: int, mapped: bool) -> Tensor | None:
    """What all images share, or each has its own of (and then a dimension more, ``rank`` in all)."""
    if x is None or (not mapped and (x.ndim < rank or x.shape[0] == 1)):
        return x
    x = side_by_side(x, dim, size)
    if x.ndim == rank:
        x = x.unsqueeze(1)
    return x.expand(size, each, *x.shape[2:]).reshape(size * each, *x.shape[2:]).contiguous()


def _pack_of_packs(cu_seqlens: Tensor, size: int, tokens: int) -> Tensor:
    first = torch.arange(size, device=cu_seqlens.device, dtype=cu_seqlens.dtype).mul(tokens)
    starts = (cu_seqlens[:-1] + first[:, None]).flatten()
    return torch.cat((starts, cu_seqlens.new_full((1,), size * tokens)))


def fold_statistics(size: int, in_dims: Dims, arguments: tuple, kernel: Callable[..., tuple[Tensor, ...]]) -> Mapped:
    """Of the op of ``statistics.py``."""
    query, key, mask, cu_seqlens, *others, outputs = arguments
    axis = 0 if cu_seqlens is None else 2
    query, key = (joined(x, dim, size, axis) for x, dim in zip((query, key), in_dims, strict=False))
    each = query.shape[axis] // size
    if cu_seqlens is None:
        mask = _of_images(mask, in_dims[2], size, each, rank=4, mapped=in_dims[2] is not None)
    else:
        cu_seqlens = _pack_of_packs(cu_seqlens, size, each)
    computed = kernel(query, key, mask, cu_seqlens, *others, outputs)
    axes = tuple(0 if axis == 0 else _TOKEN_AXES[name] for name in outputs.split())
    return tuple(parted(x, size, at) for x, at in zip(computed, axes, strict=True)), axes


FORWARD = Rules(_forward, _folding((2, 2, 2), (), (2,)), derivable=(0, 1, 2), constant=ROPE_IS_CONSTANT)
FORWARD_QKV = Rules(_forward_qkv, _folding((1,), (), (1,)), derivable=(0,), constant=ROPE_IS_CONSTANT)
BACKWARD = Rules(_backward, _folding((2, 2, 2, 2), (2, 2), (2, 2, 2)), derivable=(0, 1, 2, 3))
BACKWARD_QKV = Rules(_backward_qkv, _folding((1, 1), (1, 2), (1,)), derivable=(0, 1))
