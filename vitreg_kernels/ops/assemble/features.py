"""What a call can ask of a backend beyond plain inputs: the vocabulary of ``Requirements`` and of error messages."""

from __future__ import annotations

import torch

from ...dispatch import Request, preferences
from .._shared import observers
from .._shared.capability import capability
from .types import AssembleInputs

MIXED_BF16 = "bf16 beside another dtype"

ALL = (MIXED_BF16,)


def request_of(inputs: AssembleInputs) -> Request:
    """What a validated call needs of a backend; its dtype is that of the result."""
    patches, *parameters, dtype = inputs
    dtypes = {t.dtype for t in (patches, *parameters) if t is not None}
    mixed = dtype != torch.bfloat16 and torch.bfloat16 in dtypes
    images, tokens, channels = patches.shape
    features = (*((MIXED_BF16,) if mixed else ()), *observers.present())
    of_gpu = capability(patches.device)
    request = Request("assemble", patches.device.type, of_gpu, dtype, None, channels, features)
    workload = preferences.workload(request, patches.device, tokens, images, (patches, *parameters))
    return request if workload is None else request._replace(workload=workload)
