"""Products of fp32 inputs: never one of tf32, whose operands the matrix unit would cut off where torch's own round."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: it exists for Linux x86-64 only")

from test_budget import attention_inputs, matrix_opcode

from vitreg_kernels._triton.offline import compilation, compile_launch
from vitreg_kernels.ops.attention.backends.triton import launches


@pytest.fixture(params=["tf32", "ieee"])
def allowed(request: pytest.FixtureRequest) -> Iterator[str]:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = request.param
    yield request.param
    matmul.fp32_precision = before


@pytest.mark.parametrize(
    ("arch", "head_dim", "has_room"), [(80, 64, False), (90, 64, True), (90, 128, False), (100, 64, True)]
)
def test_three_of_tf32_where_it_is_allowed_and_has_room(arch: int, head_dim: int, has_room: bool, allowed: str) -> None:
    found = launches(attention_inputs(261, head_dim, torch.float32), arch)
    three = has_room and allowed == "tf32"
    assert {launch.constants["PRECISION"] for launch in found} == {"tf32x3" if three else "ieee"}


@pytest.mark.slow
@pytest.mark.parametrize("allowed", ["tf32"], indirect=True)
@pytest.mark.parametrize("arch", [90])
def test_on_the_matrix_unit_rounded_and_without_spills(arch: int, allowed: str) -> None:
    for launch in launches(attention_inputs(261, 64, torch.float32), arch):
        used = compile_launch(launch, arch)
        assert used.instructions[matrix_opcode(arch, launch.constants["BLOCK_M"])]
        assert used.spill_bytes == 0
        assert "cvt.rna.tf32.f32" in compilation(launch, arch).run().asm["ptx"]
