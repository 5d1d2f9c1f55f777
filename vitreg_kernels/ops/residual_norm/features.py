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
    device, of_gpu = x.device, capability(x.device)
    workload = preferences.workload("residual_norm", device, of_gpu, tokens, images, (x, *others))
    return Request("residual_norm", device.type, of_gpu, x.dtype, None, channels, features, workload)
