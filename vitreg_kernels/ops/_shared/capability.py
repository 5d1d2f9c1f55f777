"""A GPU's compute capability, spelt one way: ten times the version as an int (H100: 90), ``sm_90`` for people."""

from __future__ import annotations

import functools

import torch

_OLDEST_SUPPORTED = 80


def capability(device: torch.device) -> int:
    """Of a CUDA device; 0 for any other."""
    if device.type != "cuda":
        return 0
    # The compiler traces through the choice of a backend, and could not trace a cache.
    return _of_cuda(device) if torch.compiler.is_compiling() else _of_cuda_cached(device)


def tuned_for(device: torch.device) -> int:
    """The capability whose tiles a Triton kernel takes: the device's; in the interpreter the oldest one's."""
    return capability(device) or _OLDEST_SUPPORTED


def _of_cuda(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


_of_cuda_cached = functools.cache(_of_cuda)
