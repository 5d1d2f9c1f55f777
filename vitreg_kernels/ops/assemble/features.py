"""What a call can ask of a backend beyond plain inputs: the vocabulary of ``REQUIREMENTS`` and of error messages."""

from __future__ import annotations

import torch

from ..._runtime.dispatch import Request
from .types import AssembleInputs

MIXED_BF16 = "bf16 beside another dtype"

ALL = (MIXED_BF16,)


def request_of(inputs: AssembleInputs) -> Request:
    """What a validated call needs of a backend; its dtype is that of the result."""
    patches, *parameters, dtype = inputs
    capability = torch.cuda.get_device_capability(patches.device) if patches.is_cuda else (0, 0)
    dtypes = {t.dtype for t in (patches, *parameters) if t is not None}
    mixed = dtype != torch.bfloat16 and torch.bfloat16 in dtypes
    return Request(patches.device.type, capability, dtype, features=(MIXED_BF16,) if mixed else ())
