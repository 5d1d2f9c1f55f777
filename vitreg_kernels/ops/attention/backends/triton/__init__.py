"""This library's Triton kernels, forward and backward. Importing this package does not import triton.

``plan`` cuts a call into programs and ``tiles`` says how large; ``forward_kernel``, ``statistics_kernel`` and
``backward_kernels``, whose arithmetic is in ``backward_bodies``, are what runs, made of ``primitives``.

Not here: how a launch reaches a GPU, the interpreter or the offline compiler (``_triton``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ....._triton import mode
from ....._triton.launch import Launch
from ....._triton.replay import run_launches
from .....dispatch import Backend
from ...._shared import requirements
from ...._shared.capability import tuned_for
from ... import features
from ...types import AttentionInputs, AttentionOutputs, AttentionResult, empty_output
from .plan import ForwardBuffers, launch_plan


def forward(inputs: AttentionInputs) -> AttentionResult:
    """The output and the statistics asked for."""
    capability = tuned_for(inputs.query.device)
    buffers = _allocate(inputs, capability)
    run_launches(_forward_launches, inputs, buffers, capability, depends_on=features.tf32_is_allowed("cuda"))
    statistics = AttentionOutputs(
        lse=buffers.lse if "lse" in inputs.outputs else None,
        prefix_attention=buffers.prefix_attention,
        received_attention=buffers.received_attention,
        max_logit=None if buffers.max_logit is None else buffers.max_logit.amax(-1),
        token_norms=None if buffers.square_norm is None else buffers.square_norm.sum(1).sqrt(),
    )
    return AttentionResult(buffers.output, statistics)


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
    lse = lse.contiguous()
    delta, normalization = torch.empty_like(lse), torch.empty_like(lse)
    tensors = (output, lse, delta, normalization, grad_output, grad_query, grad_key, grad_value)
    capability = tuned_for(inputs.query.device)
    run_launches(_backward_launches, inputs, *tensors, capability, depends_on=features.tf32_is_allowed("cuda"))


def launches(inputs: AttentionInputs, capability: int) -> list[Launch]:
    """Every kernel that a forward and a backward of this call would launch on a GPU, without running any.

    Works on ``meta`` tensors, so kernels can be compiled for GPUs that are not there.

    Args:
        inputs: the call.
        capability: of the GPU, ten times the version.
    """
    buffers = _allocate(inputs, capability)
    shape = inputs.query.shape[:3]
    lse, delta, normalization = (inputs.query.new_empty(shape, dtype=torch.float32) for _ in range(3))
    gradients = (empty_output(inputs.query) for _ in range(4))
    return [
        *_forward_launches(inputs, buffers, capability),
        *_backward_launches(inputs, buffers.output, lse, delta, normalization, *gradients, capability),
    ]


def _allocate(inputs: AttentionInputs, capability: int) -> ForwardBuffers:
    query, prefix, outputs = inputs.query, inputs.num_prefix_tokens, inputs.outputs
    batch, heads, tokens, _ = query.shape

    def statistic(*shape: int, needed: bool) -> Tensor | None:
        return query.new_empty(shape, dtype=torch.float32) if needed else None

    max_logit = None
    second_kernel = "received_attention" in outputs
    if "max_logit" in outputs or "prefix_attention" in outputs:
        plan = launch_plan(inputs, "forward", capability)
        # A program that sweeps the keys never has all logits of a query at once.
        second_kernel = second_kernel or ("prefix_attention" in outputs and not plan.resident_widths)
    if "max_logit" in outputs:
        # Packed, images shorter than the longest have tiles without queries, which no program writes.
        max_logit = query.new_full((plan.images, heads, plan.num_tiles), -torch.inf, dtype=torch.float32)
    return ForwardBuffers(
        output=empty_output(query),
        lse=statistic(batch, heads, tokens, needed=second_kernel or "lse" in outputs),
        normalizer=statistic(batch, heads, tokens, needed=second_kernel),
        max_logit=max_logit,
        square_norm=statistic(batch, heads, tokens, needed="token_norms" in outputs),
        received_attention=statistic(batch, heads, tokens, needed="received_attention" in outputs),
        prefix_attention=statistic(batch, heads, prefix, tokens, needed="prefix_attention" in outputs),
    )


def _forward_launches(inputs: AttentionInputs, buffers: ForwardBuffers, capability: int) -> list[Launch]:
    from .forward_kernel import forward_launch
    from .statistics_kernel import statistics_launch

    plan = launch_plan(inputs, "forward", capability)
    launches = [forward_launch(inputs, buffers, plan)]
    if buffers.normalizer is not None:
        second_plan = launch_plan(inputs, "statistics", capability)
        with_prefix = not plan.resident_widths
        launches.append(statistics_launch(inputs, buffers, second_plan, with_prefix_attention=with_prefix))
    return launches


def _backward_launches(inputs: AttentionInputs, *tensors_and_capability: Any) -> list[Launch]:
    from .backward_kernels import backward_launches

    return backward_launches(inputs, *tensors_and_capability)


BACKEND = Backend(
    name="triton",
    requirements=requirements.on_triton(features.OF_OUR_KERNELS, head_dims=(16, 128)),
    forward=forward,
    backward=backward,
    opaque=True,
    default=requirements.TRITON_DEFAULT,
    faults=mode.faults,
)
