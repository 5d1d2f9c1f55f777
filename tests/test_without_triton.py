"""Without triton, as beside a CPU build of torch: everything else works, and what is missing is said."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from vitreg_kernels._triton import mode
from vitreg_kernels.dispatch import Request, find
from vitreg_kernels.ops.catalogue import OPS

# None in sys.modules makes an import fail as that of a package that is not installed.
CODE = """
import sys
sys.modules["triton"] = None
import torch
import vitreg_kernels
from vitreg_kernels import RegisterAttention, RegisterViT, ViTConfig, cli, explain

images = torch.randn(1, 3, 28, 28)
model = RegisterViT(ViTConfig(image_size=28, dim=32, depth=1, num_heads=2))
model(images).patches.sum().backward()
print(explain(torch.randn(1, 2, 9, 16), outputs=("lse",)))
try:
    RegisterAttention(32, 2, backend="triton")(torch.randn(1, 9, 32))
except vitreg_kernels.UnsupportedError as error:
    print(error)
sys.exit(cli.main(["check", "--device", "cpu", "--op", "token_norms"]))
"""


def test_all_but_the_triton_kernels_work():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "backend: cpu" in done.stdout or "backend: sdpa" in done.stdout
    assert " passed, 0 failed" in done.stdout


@pytest.mark.parametrize("op", OPS)
def test_a_gpu_without_triton_is_told_where_it_comes_from(op, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "triton", None)
    request = Request(op, "cuda", 90, torch.float16, head_dim=64, channels=384)
    (reason,) = find(OPS[op].backends, "triton").reasons_against(request)
    assert reason.startswith("triton is not installed: torch's builds for CUDA require the one")
    assert reason.endswith("pip install 'triton>=3.6'")


def test_without_a_gpu_triton_would_be_of_no_use(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "triton", None)
    (reason,) = mode.faults()
    assert reason.startswith("Triton kernels need a CUDA GPU")
