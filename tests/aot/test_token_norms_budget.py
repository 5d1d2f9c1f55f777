"""The Triton kernels of token_norms, compiled for GPUs that are not there, keep to a budget and never spill.

``python tests/aot/test_token_norms_budget.py`` writes the budgets anew, as ``test_budget.py`` does attention's.
"""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch
from budgets import COMPILED_FOR, QUICK_CHANNELS, Budgets, beyond_hardware, every_variant

from vitreg_kernels import TokenLayout
from vitreg_kernels._triton.launch import Launch
from vitreg_kernels._triton.offline import Resources, compile_launch
from vitreg_kernels.ops.token_norms.backends.triton import launches

LAYOUT = TokenLayout(num_registers=4)

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def statistics_of(channels: int, dtype: torch.dtype = BF16, batch: int = 64, tokens: int = 261) -> list[Launch]:
    """What the statistics of a batch without memory launch."""
    return launches(torch.empty(batch, tokens, channels, dtype=dtype, device="meta"), LAYOUT)


@cache
def budgeted(arch: int, channels: int) -> dict[str, tuple[Launch, Resources]]:
    """Kernels by name. Those that count do not depend on the channels, and come from triton's cache after the first."""
    found = statistics_of(channels)
    return {launch.kernel.__name__: (launch, compile_launch(launch, arch)) for launch in found}


BUDGETS = Budgets("token_norms_budgets.json", "C", (384, 768, 1024, 1536), (384, 1536), QUICK_CHANNELS, budgeted)


@BUDGETS.every_case
def test_kernels_keep_to_their_budget(arch: int, size: int) -> None:
    BUDGETS.check(arch, size)


def test_no_budget_for_what_is_not_tested_and_none_for_a_spill() -> None:
    BUDGETS.check_sizes()
    BUDGETS.check_no_spill()


@BUDGETS.every_case
def test_tokens_are_read_once_16_bytes_at_a_time(arch: int, size: int) -> None:
    """As many wide loads as hold the tokens of a tile, and no load besides."""
    launch, used = budgeted(arch, size)["_token_norms_kernel"]
    wide = launch.constants["ROWS"] * launch.constants["BLOCK_C"] // (32 * launch.num_warps * 8)
    assert len(re.findall(r"\bLDG\.E\.128", used.sass)) == used.instructions["LDG"] == wide


@pytest.mark.parametrize("arch", COMPILED_FOR)
def test_counting_waits_for_no_counter_and_adds_no_floats_atomically(arch: int) -> None:
    """A reduction (RED) leaves without an answer; an atomic (ATOM) is waited for. All here add 64-bit integers."""
    _, used = budgeted(arch, 384)["_count_norms_kernel"]
    reductions = re.findall(r"\bREDG?\.\S+", used.sass)
    assert reductions
    assert all(".ADD.64" in reduction for reduction in reductions), reductions
    assert not any(opcode.startswith("ATOM") for opcode in used.instructions)
    _, used = budgeted(arch, 384)["_add_counted_norms_kernel"]
    assert not any(opcode.startswith(("ATOM", "RED")) for opcode in used.instructions)


# What the budget leaves out: no power of two, the widest, the narrowest, other dtypes.
VARIANTS = {
    (80, "C=1280 fp16"): lambda: statistics_of(1280, F16),
    (80, "C=384 fp32"): lambda: statistics_of(384, F32),
    (90, "C=4096"): lambda: statistics_of(4096),
    (90, "C=1, one norm"): lambda: statistics_of(1, batch=1, tokens=1),
    (100, "C=4096 fp32"): lambda: statistics_of(4096, F32),
}


@every_variant(VARIANTS)
def test_variants_fit_the_hardware_and_do_not_spill(arch: int, variant: str) -> None:
    for launch in VARIANTS[arch, variant]():
        used = compile_launch(launch, arch)
        assert not beyond_hardware(launch, used, arch)
        assert used.spill_bytes == 0, launch.kernel.__name__


if __name__ == "__main__":
    BUDGETS.write()
