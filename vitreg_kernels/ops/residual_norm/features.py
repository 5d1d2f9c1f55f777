"""What a call can ask of a backend beyond plain inputs: the vocabulary of ``REQUIREMENTS`` and of error messages."""

from __future__ import annotations

import torch

from ..._runtime.dispatch import Request
from .types import NormInputs

MIXED_BF16 = "bf16 beside another dtype"

ALL = (MIXED_BF16,)


def request_of(inputs: NormInputs) -> Request:
    """What a validated call needs of a backend."""
    x = inputs.x
    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else (0, 0)
    others = (inputs.branch, inputs.layer_scale, inputs.drop_path, inputs.weight, inputs.bias)
    dtypes = {inputs.dtype, *(t.dtype for t in others if t is not None)}
    mixed = x.dtype != torch.bfloat16 and torch.bfloat16 in dtypes
    return Request(x.device.type, capability, x.dtype, features=(MIXED_BF16,) if mixed else (), channels=x.shape[-1])
