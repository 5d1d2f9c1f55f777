"""What a call can ask of a backend beyond plain inputs: the vocabulary of ``Requirements`` and of error messages."""

from __future__ import annotations

import torch

from ...dispatch import Request, preferences
from .._shared import observers
from .._shared.capability import capability
from .types import NormInputs

MIXED_BF16 = "bf16 beside another dtype"

ALL = (MIXED_BF16,)


def request_of(inputs: NormInputs) -> Request:
    """What a validated call needs of a backend."""
    x = inputs.x
    others = (inputs.branch, inputs.layer_scale, inputs.drop_path, inputs.weight, inputs.bias)
    dtypes = {inputs.dtype, *(t.dtype for t in others if t is not None)}
    mixed = x.dtype != torch.bfloat16 and torch.bfloat16 in dtypes
    images, tokens, channels = x.shape
    features = (*((MIXED_BF16,) if mixed else ()), *observers.present())
    of_gpu = capability(x.device)
    request = Request("residual_norm", x.device.type, of_gpu, x.dtype, None, channels, features)
    workload = preferences.workload(request, x.device, tokens, images, (x, *others))
    if workload is None:
        return request
    branch = inputs.branch
    variant = variant_of(
        rms=inputs.rms,
        branch=None if branch is None else branch.dtype,
        scaled=inputs.layer_scale is not None,
        dropped=inputs.drop_path is not None,
        normalized=inputs.dtype,
    )
    return request._replace(workload=workload._replace(variant=variant))


def variant_of(*, rms: bool, branch: torch.dtype | None, scaled: bool, dropped: bool, normalized: torch.dtype) -> str:
    """What tells the times of calls apart beside their size: which norm, what is added before, and the dtypes."""
    parts = ["RMSNorm" if rms else "LayerNorm"]
    if branch is not None:
        factors = " scaled" * scaled + " dropped" * dropped
        parts.append(f"{str(branch).removeprefix('torch.')}{factors} branch")
    return f"{', '.join(parts)} to {str(normalized).removeprefix('torch.')}"
