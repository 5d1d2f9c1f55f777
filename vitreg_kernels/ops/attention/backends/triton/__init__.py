"""This library's Triton kernels, forward and backward. Importing this package does not import triton."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ....._runtime import triton_mode, tuning
from ....._runtime.dispatch import Request, Requirements, unmet
from ....._runtime.launch import Launch, run_all
from ... import features
from ...types import AttentionInputs, AttentionOutputs, AttentionResult, empty_output
from . import plan

NAME = "triton"
OPAQUE = True
REQUIREMENTS = Requirements(
    # In Triton's interpreter the kernels run on CPU tensors; it holds bf16 as raw bits and computes garbage with it.
    devices=("cpu",) if triton_mode.INTERPRETING else ("cuda",),
    dtypes=(torch.float32, torch.float16)
    if triton_mode.INTERPRETING
    else (torch.float32, torch.float16, torch.bfloat16),
    head_dims=(16, 128),
    features=(features.KEY_PADDING_MASK, features.ROPE, features.PACKING, features.PACKING_COMPILED),
    min_capability=(8, 0),
)


def not_supported_reasons(request: Request) -> list[str]:
    reasons = unmet(REQUIREMENTS, request)
    if request.device in REQUIREMENTS.devices:
        reasons += triton_mode.faults()
    return reasons


def not_default_reasons(request: Request) -> list[str]:
    if triton_mode.INTERPRETING:
        return ["has not been measured on the interpreter, which is slow; name it to use it"]
    major, minor = request.capability
    fastest = tuning.fastest(10 * major + minor, request.dtype, request.head_dim, request.length_bucket)
    if fastest == NAME:
        return []
    where = f"compute capability {major}.{minor}"
    if fastest is None:
        return [f"has not been measured on {where} yet for such a call; name it to use it"]
    return [f"is no faster than {fastest} for such a call, as measured on {where}; name it to use it"]


class _Buffers(NamedTuple):
    """What a forward writes; ``None`` for what the call does not need."""

    output: Tensor
    lse: Tensor | None  # [B, H, N]
    normalizer: Tensor | None  # [B, H, N]
    max_logit: Tensor | None  # [images, H, tiles]
    square_norm: Tensor | None  # [B, H, N], by head
    received_attention: Tensor | None  # [B, H, N]
    prefix_attention: Tensor | None  # [B, H, P, N]


def forward(inputs: AttentionInputs) -> AttentionResult:
    """The output and the statistics asked for."""
    arch = triton_mode.arch(inputs.query.device)
    buffers = _allocate(inputs, arch)
    run_all(_forward_launches(inputs, buffers, arch), inputs.query)
    statistics = AttentionOutputs(
        lse=buffers.lse,
        prefix_attention=buffers.prefix_attention,
        received_attention=buffers.received_attention,
        max_logit=None if buffers.max_logit is None else buffers.max_logit.amax(-1),
        token_norms=None if buffers.square_norm is None else buffers.square_norm.sum(1).sqrt(),
    )
    asked = {name: value for name, value in statistics._asdict().items() if name in inputs.outputs}
    return AttentionResult(buffers.output, AttentionOutputs(**asked))


def backward(
    inputs: AttentionInputs,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
) -> None:
    """Fill three ``[B, H, N, D]`` gradients of any strides, such as views of one packed gradient.

    Args:
        inputs: the call; its ``outputs`` do not matter.
        output, lse: what the forward gave; ``lse`` is ``[B, H, N]`` fp32.
        grad_output: gradient of the output, any strides.
        grad_query, grad_key, grad_value: written in full.
    """
    from .backward_kernels import backward_launches

    lse = lse.contiguous()
    gradients = (grad_query, grad_key, grad_value)
    arch = triton_mode.arch(inputs.query.device)
    delta, normalizer = torch.empty_like(lse), torch.empty_like(lse)
    run_all(backward_launches(inputs, output, lse, delta, normalizer, grad_output, *gradients, arch), inputs.query)


def launches(inputs: AttentionInputs, arch: int) -> list[Launch]:
    """Every kernel that a forward and a backward of this call would launch on an architecture, without running any.

    Works on ``meta`` tensors, so kernels can be compiled for GPUs that are not there.

    Args:
        inputs: the call.
        arch: compute capability times ten.
    """
    from .backward_kernels import backward_launches

    buffers = _allocate(inputs, arch)
    shape = inputs.query.shape[:3]
    lse, delta, normalizer = (inputs.query.new_empty(shape, dtype=torch.float32) for _ in range(3))
    gradients = (empty_output(inputs.query) for _ in range(4))
    return [
        *_forward_launches(inputs, buffers, arch),
        *backward_launches(inputs, buffers.output, lse, delta, normalizer, *gradients, arch),
    ]


def _allocate(inputs: AttentionInputs, arch: int) -> _Buffers:
    query, prefix, outputs = inputs.query, inputs.num_prefix_tokens, inputs.outputs
    batch, heads, tokens, _ = query.shape

    def statistic(*shape: int, needed: bool) -> Tensor | None:
        return query.new_empty(shape, dtype=torch.float32) if needed else None

    max_logit = None
    if "max_logit" in outputs:
        work = plan.of(inputs, "forward", arch)
        # Packed, images shorter than the longest have tiles without queries, which nobody writes.
        max_logit = query.new_full((work.images, heads, work.num_tiles), -torch.inf, dtype=torch.float32)
    second_look = "received_attention" in outputs or (
        "prefix_attention" in outputs and not plan.holds_heads(inputs, arch)
    )
    return _Buffers(
        output=empty_output(query),
        lse=statistic(batch, heads, tokens, needed=second_look or "lse" in outputs),
        normalizer=statistic(batch, heads, tokens, needed=second_look),
        max_logit=max_logit,
        square_norm=statistic(batch, heads, tokens, needed="token_norms" in outputs),
        received_attention=statistic(batch, heads, tokens, needed="received_attention" in outputs),
        prefix_attention=statistic(batch, heads, prefix, tokens, needed="prefix_attention" in outputs),
    )


def _forward_launches(inputs: AttentionInputs, buffers: _Buffers, arch: int) -> list[Launch]:
    from .forward_kernel import forward_launches
    from .statistics_kernel import statistics_launches

    output, lse, normalizer, max_logit, square_norm, received_attention, prefix_attention = buffers
    prefix_first, prefix_second = prefix_attention, None
    if not plan.holds_heads(inputs, arch):
        prefix_first, prefix_second = None, prefix_attention
    first = forward_launches(inputs, output, lse, normalizer, max_logit, square_norm, prefix_first, arch)
    if received_attention is None and prefix_second is None:
        return first
    return first + statistics_launches(inputs, lse, normalizer, received_attention, prefix_second, arch)
