"""A call, and a measurement that names a backend for it."""

from __future__ import annotations

import torch

from vitreg_kernels.dispatch import devices
from vitreg_kernels.dispatch.calibration import Measurement

X = torch.randn(2, 3, 21, 16)
ONE = Measurement(
    op="attention",
    device=devices.kind("cpu", 0),
    dtype="float32",
    width=16,
    tokens=21,
    heads=6,
    gradients=False,
    variant="separate",
    features=(),
    backend="reference",
    wrong={},
    times_ms={"reference": 1.0, "sdpa": 2.0},
    errors={"reference": (1e-7, 1e-7)},
    date="2026-11-30",
)
