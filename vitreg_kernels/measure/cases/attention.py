"""Attention: the lengths of ViTs, and each feature of a call once; with gradients and every statistic."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...functional import register_attention, register_attention_qkv
from ...ops.attention.features import request_of
from ...ops.attention.types import OUTPUT_NAMES, AttentionOutputs, Rope, unpack_qkv
from ...ops.attention.validation import validated
from ..oracle import Call, Tensors, outputs_and_gradients, with_defaults

INPUTS = ("query", "key", "value")
GRADIENTS = tuple(f"grad_{name}" for name in INPUTS)

# A query and a key of norm 500, ``[2, 64]``. Half the channels and 8 more have the same sign, so the logit is 62500
# before the scale: beyond 65504, fp16 overflows in the eager formula, whose error would bound nothing then.
MASSIVE_QUERY_AND_KEY = torch.full((2, 64), 62.5)
MASSIVE_QUERY_AND_KEY[1, :24] *= -1


def call(
    qkv: Tensor,
    *,
    name: str = "",
    packed_projection: bool = False,
    backward: bool = True,
    grad_output: Tensor | None = None,
    **options: Any,
) -> Call:
    """A call of ``register_attention``.

    Args:
        qkv: ``[B, N, 3, H, D]``; query, key and value are views of it.
        name: what it exercises.
        packed_projection: call ``register_attention_qkv`` instead, whose gradient is one.
        backward: whether gradients count too.
        grad_output: the upstream gradient, ``[B, H, N, D]``; random by default.
        options: further arguments of ``register_attention``.
    """
    if backward and grad_output is None:
        gradient = torch.randn(qkv[:, :, 0].shape, generator=torch.Generator().manual_seed(0))
        grad_output = gradient.to(qkv).transpose(1, 2)
    tokens, head_dim = qkv.shape[1], qkv.shape[-1]
    return Call(
        name=name,
        request=request_of(validated(**with_defaults(register_attention, **_views(qkv), **options))),
        function=_attend_qkv if packed_projection else _attend,
        arguments={"qkv": qkv, "grad_output": grad_output, **options},
        terms=lambda tensor: tokens + head_dim,
        # Gradients are made of the same rounded dS = P * (dP - delta), a difference that may all but vanish (with one
        # token it does).
        same_scale=("grad_qkv",) if packed_projection else GRADIENTS,
    )


def calls(dtype: torch.dtype, device: torch.device) -> Iterator[Call]:
    """The named ViT shapes, and each feature of a call once."""
    generator = torch.Generator().manual_seed(0)

    def qkv(batch: int, tokens: int, heads: int = 2, head_dim: int = 64) -> Tensor:
        return torch.randn(batch, tokens, 3, heads, head_dim, generator=generator).to(device, dtype)

    full = partial(call, outputs=OUTPUT_NAMES)
    for tokens in (1, 54, 201, 261, 1029, 1374):
        yield full(qkv(1, tokens), name=f"{tokens} tokens", num_prefix_tokens=min(5, tokens))
    full = partial(full, num_prefix_tokens=5)
    for head_dim in (16, 72, 80, 128):
        yield full(qkv(1, 201, 1, head_dim), name=f"201 tokens, head dim {head_dim}")

    if dtype != torch.float32:
        # One token of norm 500 among tokens of norm 20: logits above a thousand. In fp32 the rule cannot hold for any
        # kernel that recomputes probabilities from a saved log-sum-exp, which fp32 resolves to 1e-4 there; the eager
        # formula keeps the probabilities themselves. Nor for one that takes delta from the output: where one key has
        # all the attention, dP - delta is 0, and they are sums of the same products in two orders.
        for i, name in enumerate(INPUTS):
            massive = _of_norm_20(qkv(8, 69))
            massive[:, 41, i] *= 25
            yield full(massive, name=f"69 tokens, one {name} massive")
        massive = _of_norm_20(qkv(8, 69))
        massive[:, 41, :2] = MASSIVE_QUERY_AND_KEY.to(massive)[:, None]
        yield full(massive, name="69 tokens, a query and its key massive")

    keep = torch.rand(2, 1, 1, 201, generator=generator) > 0.3
    keep[1] = False
    yield full(qkv(2, 201), name="201 tokens, padded, one image wholly", attn_mask=keep.to(device))

    scattered = torch.rand(2, 2, 201, 201, generator=generator) > 0.3
    bias = torch.randn(1, 2, 201, 201, generator=generator).to(device, dtype)
    for name, mask in (("boolean mask", scattered.to(device)), ("additive mask", bias)):
        yield full(qkv(2, 201), name=f"201 tokens, {name}", attn_mask=mask)

    angles = torch.rand(256, 32, generator=generator) * 6.28
    half = torch.cat((angles, angles), -1).to(device)
    pairs = angles.repeat_interleave(2, -1).to(device)
    for name, rope in (
        ("rope by halves", Rope(half.cos(), half.sin())),
        ("rope by pairs", Rope(pairs.cos(), pairs.sin(), interleaved=True)),
    ):
        yield full(qkv(1, 261), name=f"261 tokens, {name}", rope=rope)

    lengths = torch.tensor([261, 261, 54, 54, 54])
    cu_seqlens = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0))).to(device, torch.int32)
    yield full(qkv(1, 684, 1), name="2 x 261 + 3 x 54 tokens, packed", cu_seqlens=cu_seqlens)


def _of_norm_20(qkv: Tensor) -> Tensor:
    """``[B, N, 3, H, D]`` with queries, keys and values of that norm."""
    return (qkv * (20 / qkv.float().norm(dim=-1, keepdim=True))).to(qkv.dtype)


def _attend(backend: str, qkv: Tensor, grad_output: Tensor | None, **options: Any) -> Tensors:
    def attend(**inputs: Tensor) -> Tensors:
        return _named(register_attention(**inputs, backend=backend, **options))

    return outputs_and_gradients(attend, _views(qkv), {} if grad_output is None else {"output": grad_output})


def _attend_qkv(backend: str, qkv: Tensor, grad_output: Tensor | None, **options: Any) -> Tensors:
    def attend(qkv: Tensor) -> Tensors:
        return _named(register_attention_qkv(qkv, backend=backend, **options))

    upstream = {} if grad_output is None else {"output": grad_output.transpose(1, 2).flatten(2)}
    return outputs_and_gradients(attend, {"qkv": qkv}, upstream)


def _named(result: Tensor | tuple[Tensor, AttentionOutputs]) -> Tensors:
    """The output and those statistics that were asked for."""
    if isinstance(result, Tensor):
        return {"output": result}
    output, statistics = result
    return {"output": output, **{name: x for name, x in statistics._asdict().items() if x is not None}}


def _views(qkv: Tensor) -> Tensors:
    """``[B, N, 3, H, D]`` -> query, key and value, ``[B, H, N, D]``."""
    return dict(zip(INPUTS, unpack_qkv(qkv), strict=True))
