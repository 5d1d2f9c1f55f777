"""The two halves of a match: what a backend declares it can serve, and what a call needs."""

from __future__ import annotations

from typing import NamedTuple

import torch

ANY_SIZE = (1, 2**31 - 1)
ANY_CAPABILITY = (0, 2**31 - 1)


class Requirements(NamedTuple):
    """What a backend can serve.

    Attributes:
        devices: device types.
        dtypes: dtypes of the inputs.
        head_dims: smallest and largest head dim, of an op that has heads.
        features: features of a call beyond the plain one, such as ``"rope"``; each op lists its own.
        capabilities: oldest and newest CUDA compute capability, ten times the version: ``(90, 90)`` is sm_90 alone.
        channels: smallest and largest number of channels a token, of an op that takes whole tokens.
        features_if_named: those of ``features`` with which the backend is no default.
    """

    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    head_dims: tuple[int, int] = ANY_SIZE
    features: tuple[str, ...] = ()
    capabilities: tuple[int, int] = ANY_CAPABILITY
    channels: tuple[int, int] = ANY_SIZE
    features_if_named: tuple[str, ...] = ()


class Workload(NamedTuple):
    """What measurements tell apart beside what a backend must serve.

    Attributes:
        tokens, heads: buckets, as in ``tables.Size``.
        gradients: whether a backward will follow.
        variant: what else tells the times of an op's calls apart, in the words of its ``features.py``.
        gpu: the GPU's own name where a table has rows of single GPUs; empty elsewhere.
    """

    tokens: int
    heads: int
    gradients: bool
    variant: str = ""
    gpu: str = ""


class Request(NamedTuple):
    """What a call needs.

    Attributes:
        op: the op's name, that of its folder in ``ops``.
        device: device type.
        capability: CUDA compute capability, ten times the version (H100: 90); 0 elsewhere.
        dtype: of the inputs.
        head_dim: of an op that has heads.
        channels: of a token, for an op that takes whole tokens.
        features: what the call uses beyond the plain one.
        workload: what measurements tell apart; ``None`` where nothing was measured on the device.
    """

    op: str
    device: str
    capability: int
    dtype: torch.dtype
    head_dim: int | None = None
    channels: int | None = None
    features: tuple[str, ...] = ()
    workload: Workload | None = None
