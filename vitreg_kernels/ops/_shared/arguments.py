"""What checking the arguments of every op has in common. Reads shapes and dtypes only."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

_WITH_AUTOCAST = tuple(d for d in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(d))


def autocast_dtype(x: Any) -> torch.dtype | None:
    """The dtype that autocast is on with for a tensor's device; ``None`` where it is off, or for no tensor.

    torch's autocast knows nothing of opaque ops, so each op asks and casts for itself.
    """
    device = x.device.type if isinstance(x, Tensor) else None
    if device not in _WITH_AUTOCAST or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Nothing in it is cast on a tensor's device. The meta device has no autocast to turn off."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if device in _WITH_AUTOCAST else nullcontext()


def in_rows(x: Tensor) -> Tensor:
    """The tensor with its last dimension side by side in memory, as kernels read tokens; a copy only if it is not."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def refuse_nested(name: str, x: Any) -> None:
    """Raises: TypeError: for a nested tensor, which is told to come as a pack."""
    if isinstance(x, Tensor) and x.is_nested:
        raise TypeError(
            f"{name} is a nested tensor; give its values as one pack, {name}.values()[None], with "
            f"cu_seqlens={name}.offsets() (of the layout torch.jagged, which has them)"
        )


def described(x: Any) -> str:
    """A tensor's shape, dtype and device, or another thing's type, for an error message."""
    if not isinstance(x, Tensor):
        return f"a {type(x).__name__}"
    return f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')} on {x.device}"
