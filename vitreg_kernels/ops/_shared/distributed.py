"""Telling DTensors apart, without importing what they come from, which takes long."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)


def is_distributed(x: Any) -> bool:
    """Whether something is a DTensor: a tensor of which each device of a mesh holds a part."""
    if type(x) in _PLAIN:
        return False
    tensor = sys.modules.get("torch.distributed.tensor")
    return tensor is not None and isinstance(x, tensor.DTensor)
