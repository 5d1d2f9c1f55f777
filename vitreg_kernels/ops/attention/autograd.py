"""Kernels behind opaque ops, joined to autograd.

``attend`` and ``attend_qkv`` run a backend that has a ``backward`` of its own. What autograd sees is one node whose
forward and backward are the torch.library ops of ``schema.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import dispatch
from .._shared.autograd import differentiable, needs_node, op_or_implementation
from .._shared.flops import register
from .._shared.transforms import transformable
from . import backends, flops, schema, statistics, transforms
from .transforms import Call, inputs_of
from .types import NO_STATISTICS, AttentionInputs, AttentionOutputs, empty_output, unpack_qkv

# Arguments of a node that have no gradient: the call, the outputs and the backend.
_WITHOUT_GRADIENT = (None,) * (len(Call._fields) + 2)


def attend(inputs: AttentionInputs, backend: str) -> tuple[Tensor, AttentionOutputs]:
    """``[B, H, N, D]`` and the statistics, by a named backend; differentiable in query, key and value."""
    return _run(_attention, _forward, (inputs.query, inputs.key, inputs.value), inputs, backend)


def attend_qkv(qkv: Tensor, inputs: AttentionInputs, backend: str) -> tuple[Tensor, AttentionOutputs]:
    """``[B, N, C]`` and the statistics of packed ``[B, N, 3, H, D]``, of which ``inputs`` holds views.

    Differentiable in ``qkv``, whose gradient comes back packed.
    """
    return _run(_attention_qkv, _forward_qkv, (qkv,), inputs, backend)


def _run(
    with_gradients: Callable[..., Any],
    without: Callable[..., Any],
    tensors: tuple[Tensor, ...],
    inputs: AttentionInputs,
    backend: str,
) -> tuple[Tensor, AttentionOutputs]:
    call, outputs = _call_of(inputs), list(inputs.outputs)
    if needs_node(tensors):
        # The backward needs the log-sum-exp, whether or not it was asked for, and looks for it in front.
        outputs = ["lse", *(name for name in outputs if name != "lse")]
        output, *computed = with_gradients(*tensors, *call, " ".join(outputs), backend)
    else:
        output, *computed = without(*tensors, *call, " ".join(outputs), backend)
    if not inputs.outputs:
        return output, NO_STATISTICS
    by_name = dict(zip(outputs, computed, strict=True))
    return output, AttentionOutputs(**{name: by_name[name] for name in inputs.outputs})


def _call_of(inputs: AttentionInputs) -> Call:
    cos, sin, interleaved = inputs.rope or (None, None, False)
    return Call(
        inputs.attn_mask,
        cos,
        sin,
        interleaved,
        inputs.cu_seqlens,
        inputs.max_seqlen,
        inputs.num_prefix_tokens,
        inputs.scale,
    )


def _tokens(output: Tensor) -> Tensor:
    """A backend's output ``[B, H, N, D]``, a view of ``[B, N, H, D]`` memory, as ``[B, N, C]``."""
    batch, heads, tokens, head_dim = output.shape
    channels = heads * head_dim
    return output.as_strided((batch, tokens, channels), (tokens * channels, channels, 1))


def _heads(x: Tensor, qkv: Tensor) -> Tensor:
    """``[B, N, C]`` -> a ``[B, H, N, D]`` view."""
    batch, tokens, _, heads, head_dim = qkv.shape
    return x.view(batch, tokens, heads, head_dim).transpose(1, 2)


def _forward_impl(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, list[Tensor]]:
    *call, outputs, backend = rest
    inputs = inputs_of(query, key, value, call, outputs)
    output, computed = dispatch.find(backends.BACKENDS, backend).forward(inputs)
    return output, [getattr(computed, name) for name in inputs.outputs]


def _forward_qkv_impl(qkv: Tensor, *rest: Any) -> tuple[Tensor, list[Tensor]]:
    output, statistics = _forward_impl(*unpack_qkv(qkv), *rest)
    return _tokens(output), statistics


def _backward_impl(grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *call, output, lse, backend = rest
    gradients = empty_output(query), empty_output(key), empty_output(value)
    inputs = inputs_of(query, key, value, call)
    dispatch.find(backends.BACKENDS, backend).backward(inputs, output, lse, grad_output, *gradients)
    return gradients


def _backward_qkv_impl(grad_output: Tensor, qkv: Tensor, *rest: Any) -> Tensor:
    *call, output, lse, backend = rest
    gradient = qkv.new_empty(qkv.shape)
    inputs = inputs_of(*unpack_qkv(qkv), call)
    grad_output, output = _heads(grad_output, qkv), _heads(output, qkv)
    dispatch.find(backends.BACKENDS, backend).backward(inputs, output, lse, grad_output, *unpack_qkv(gradient))
    return gradient


_OPS = torch.ops.vitreg
_attention_forward = op_or_implementation(_OPS.attention_forward, _forward_impl)
_attention_forward_qkv = op_or_implementation(_OPS.attention_forward_qkv, _forward_qkv_impl)
_attention_backward = transformable(
    "AttentionBackward", op_or_implementation(_OPS.attention_backward, _backward_impl), transforms.BACKWARD
)
_backward_qkv_op = op_or_implementation(_OPS.attention_backward_qkv, _backward_qkv_impl)
_attention_backward_qkv = transformable(
    "AttentionQKVBackward", lambda *arguments: (_backward_qkv_op(*arguments),), transforms.BACKWARD_QKV
)


def _forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    output, statistics = _attention_forward(query, key, value, *rest)
    return output, *statistics


def _forward_qkv(qkv: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    output, statistics = _attention_forward_qkv(qkv, *rest)
    return output, *statistics


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    tensors = len(inputs) - len(_WITHOUT_GRADIENT)
    mask, cos, sin, ctx.interleaved, cu_seqlens, *ctx.scalars = inputs[tensors:-2]
    ctx.backend = inputs[-1]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:tensors], mask, cos, sin, cu_seqlens, *output[:2])


def _gradient(ctx: Any, op: Callable[..., Any], grad_output: Tensor) -> Any:
    *tensors, mask, cos, sin, cu_seqlens, output, lse = ctx.saved_tensors
    call = (mask, cos, sin, ctx.interleaved, cu_seqlens, *ctx.scalars)
    return op(grad_output, *tensors, *call, output, lse, ctx.backend)


def _backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None, None, None, *_WITHOUT_GRADIENT)
    return (*_gradient(ctx, _attention_backward, grad_output), *_WITHOUT_GRADIENT)


def _backward_qkv(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_output is None:
        return (None, *_WITHOUT_GRADIENT)
    return (*_gradient(ctx, _attention_backward_qkv, grad_output), *_WITHOUT_GRADIENT)


_attention = differentiable("Attention", _forward, _save, _backward, transforms.FORWARD, tensors=3)
_attention_qkv = differentiable("AttentionQKV", _forward_qkv, _save, _backward_qkv, transforms.FORWARD_QKV, tensors=1)

for _name, _impl, _count in (
    ("attention_forward", _forward_impl, flops.forward),
    ("attention_forward_qkv", _forward_qkv_impl, flops.forward_qkv),
    ("attention_backward", _backward_impl, flops.backward),
    ("attention_backward_qkv", _backward_qkv_impl, flops.backward_qkv),
    ("attention_statistics", statistics.blockwise, flops.statistics),
):
    schema.LIBRARY.impl(_name, _impl, "CompositeExplicitAutograd")
    register(getattr(_OPS, _name), _count)
