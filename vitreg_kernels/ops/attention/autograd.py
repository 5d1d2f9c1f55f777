"""Kernels behind opaque ops, joined to autograd.

``attend`` and ``attend_qkv`` run a backend that has a ``backward`` of its own. What autograd sees is one node whose
forward and backward are the torch.library ops of ``schema.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..._runtime import dispatch
from ..._runtime.autograd import forward_of, refuse_unseen_derivatives
from . import schema, statistics
from .backends import BACKENDS
from .types import AttentionInputs, AttentionOutputs, Rope, empty_output

# The tensors and scalars of a call after query, key and value, in the order of the schemas.
_Call = tuple[Tensor | None, Tensor | None, Tensor | None, bool, Tensor | None, int, int, float]


def attend(inputs: AttentionInputs, backend: str) -> tuple[Tensor, AttentionOutputs]:
    """``[B, H, N, D]`` and the statistics, by a named backend; differentiable in query, key and value."""
    return _run(_Attention, _forward, (inputs.query, inputs.key, inputs.value), inputs, backend)


def attend_qkv(qkv: Tensor, inputs: AttentionInputs, backend: str) -> tuple[Tensor, AttentionOutputs]:
    """``[B, N, C]`` and the statistics of packed ``[B, N, 3, H, D]``, of which ``inputs`` holds views.

    Differentiable in ``qkv``, whose gradient comes back packed.
    """
    return _run(_AttentionQKV, _forward_qkv, (qkv,), inputs, backend)


def _run(
    function: type, forward: Any, tensors: tuple, inputs: AttentionInputs, backend: str
) -> tuple[Tensor, AttentionOutputs]:
    call, outputs = _call_of(inputs), list(inputs.outputs)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        # The backward needs the log-sum-exp, whether or not it was asked for, and looks for it in front.
        outputs = ["lse", *(name for name in outputs if name != "lse")]
        output, *computed = function.apply(*tensors, *call, outputs, backend)
    else:
        refuse_unseen_derivatives(tensors, backend, instead="sdpa")
        output, *computed = forward(*tensors, *call, outputs, backend)
    by_name = dict(zip(outputs, computed, strict=True))
    return output, AttentionOutputs(**{name: by_name[name] for name in inputs.outputs})


def _call_of(inputs: AttentionInputs) -> _Call:
    cos, sin, interleaved = inputs.rope or (None, None, False)
    return (
        inputs.attn_mask,
        cos,
        sin,
        interleaved,
        inputs.cu_seqlens,
        inputs.max_seqlen,
        inputs.num_prefix_tokens,
        inputs.scale,
    )


def _inputs_of(query: Tensor, key: Tensor, value: Tensor, call: _Call, outputs: list[str]) -> AttentionInputs:
    mask, cos, sin, interleaved, cu_seqlens, max_seqlen, num_prefix_tokens, scale = call
    return AttentionInputs(
        query,
        key,
        value,
        attn_mask=mask,
        scale=scale,
        num_prefix_tokens=num_prefix_tokens,
        rope=None if cos is None else Rope(cos, sin, interleaved),
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        outputs=tuple(outputs),
    )


def unpack(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``[B, N, 3, H, D]`` -> query, key and value as ``[B, H, N, D]`` views."""
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


def _heads(x: Tensor, qkv: Tensor) -> Tensor:
    """``[B, N, C]`` -> a ``[B, H, N, D]`` view."""
    batch, tokens, _, heads, head_dim = qkv.shape
    return x.view(batch, tokens, heads, head_dim).transpose(1, 2)


def _forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    output, statistics = torch.ops.vitreg.attention_forward(query, key, value, *rest)
    return output, *statistics


def _forward_qkv(qkv: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    output, statistics = torch.ops.vitreg.attention_forward_qkv(qkv, *rest)
    return output, *statistics


class _Attention(torch.autograd.Function):
    forward = forward_of(_forward)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        _save(ctx, inputs, output, tensors=3)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * 13
        return (*_gradient(ctx, torch.ops.vitreg.attention_backward, grad_output), *(None,) * 10)


class _AttentionQKV(torch.autograd.Function):
    forward = forward_of(_forward_qkv)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        _save(ctx, inputs, output, tensors=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad_output is None:
            return (None,) * 11
        return (_gradient(ctx, torch.ops.vitreg.attention_backward_qkv, grad_output), *(None,) * 10)


def _save(ctx: Any, inputs: tuple, output: tuple, *, tensors: int) -> None:
    call, ctx.backend = inputs[tensors:-2], inputs[-1]
    mask, cos, sin, ctx.interleaved, cu_seqlens, *ctx.scalars = call
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:tensors], mask, cos, sin, cu_seqlens, *output[:2])


def _gradient(ctx: Any, op: Any, grad_output: Tensor) -> Any:
    *tensors, mask, cos, sin, cu_seqlens, output, lse = ctx.saved_tensors
    call = (mask, cos, sin, ctx.interleaved, cu_seqlens, *ctx.scalars)
    return op(grad_output, *tensors, *call, output, lse, ctx.backend)


def _forward_impl(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, list[Tensor]]:
    *call, outputs, backend = rest
    inputs = _inputs_of(query, key, value, tuple(call), outputs)
    output, computed = dispatch.find(BACKENDS, backend).forward(inputs)
    return output, [getattr(computed, name) for name in outputs]


def _forward_qkv_impl(qkv: Tensor, *rest: Any) -> tuple[Tensor, list[Tensor]]:
    output, statistics = _forward_impl(*unpack(qkv), *rest)
    return output.transpose(1, 2).flatten(2), statistics


def _backward_impl(grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *call, output, lse, backend = rest
    gradients = empty_output(query), empty_output(key), empty_output(value)
    inputs = _inputs_of(query, key, value, tuple(call), [])
    dispatch.find(BACKENDS, backend).backward(inputs, output, lse, grad_output, *gradients)
    return gradients


def _backward_qkv_impl(grad_output: Tensor, qkv: Tensor, *rest: Any) -> Tensor:
    *call, output, lse, backend = rest
    gradient = qkv.new_empty(qkv.shape)
    inputs = _inputs_of(*unpack(qkv), tuple(call), [])
    grad_output, output = _heads(grad_output, qkv), _heads(output, qkv)
    dispatch.find(BACKENDS, backend).backward(inputs, output, lse, grad_output, *unpack(gradient))
    return gradient


for _name, _impl in (
    ("attention_forward", _forward_impl),
    ("attention_forward_qkv", _forward_qkv_impl),
    ("attention_backward", _backward_impl),
    ("attention_backward_qkv", _backward_qkv_impl),
    ("attention_statistics", statistics.blockwise),
):
    schema.LIBRARY.impl(_name, _impl, "CompositeExplicitAutograd")
