"""The Triton kernels of residual_layer_norm, compiled for GPUs that are not there, keep to a budget and never spill.

``python tests/aot/test_residual_norm_budget.py`` writes the budgets anew, as ``test_budget.py`` does attention's.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import torch
from budgets import QUICK_CHANNELS, Budgets, beyond_hardware, every_variant

from vitreg_kernels._triton.launch import Launch
from vitreg_kernels._triton.offline import Resources, compile_launch
from vitreg_kernels.ops.residual_norm.backends.triton import launches
from vitreg_kernels.ops.residual_norm.types import NormInputs

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def norm_inputs(channels: int, dtype: torch.dtype = BF16, tokens: int = 261, **changes: Any) -> NormInputs:
    """A call with everything, of a batch of 64 images without memory."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, of_channels = empty(64, tokens, channels), empty(channels)
    inputs = NormInputs(x, x, of_channels, empty(64), of_channels, of_channels, 1e-6, False, dtype)
    return inputs._replace(**changes)


@cache
def budgeted(arch: int, channels: int) -> dict[str, tuple[Launch, Resources]]:
    """Kernels by name: everything that forward and backward launch."""
    found = launches(norm_inputs(channels))
    return {launch.kernel.__name__: (launch, compile_launch(launch, arch)) for launch in found}


BUDGETS = Budgets("residual_norm_budgets.json", "C", (384, 768, 1024, 1536), (384, 1536), QUICK_CHANNELS, budgeted)


@BUDGETS.every_case
def test_kernels_keep_to_their_budget(arch: int, size: int) -> None:
    BUDGETS.check(arch, size)


def test_no_budget_for_what_is_not_tested_and_none_for_a_spill() -> None:
    BUDGETS.check_sizes()
    BUDGETS.check_no_spill()


@BUDGETS.every_case
def test_each_tensor_is_touched_once_16_bytes_at_a_time(arch: int, size: int) -> None:
    """As many wide stores of the forward as hold the residual and the normalized tokens, and as many loads and more.

    More, because the parameters are loaded too, at the most three of them as wide as a token.
    """
    launch, used = budgeted(arch, size)["_residual_norm_fwd_kernel"]
    of_tensor = launch.constants["ROWS"] * launch.constants["BLOCK_C"] // (32 * launch.num_warps * 8)
    assert len(re.findall(r"\bSTG\.E\.128", used.sass)) == 2 * of_tensor
    assert 2 * of_tensor <= len(re.findall(r"\bLDG\.E\.128", used.sass)) <= 5 * of_tensor


# What the budget leaves out: no power of two, the widest, other dtypes, and calls that leave something out.
VARIANTS = {
    (80, "C=1280 fp16"): lambda: norm_inputs(1280, F16),
    (80, "C=384 fp32, no branch"): lambda: norm_inputs(384, F32, branch=None, layer_scale=None, drop_path=None),
    (90, "C=4096"): lambda: norm_inputs(4096),
    (90, "C=1, one token"): lambda: norm_inputs(1, tokens=1),
    (90, "C=768, fp32 residual and parameters"): lambda: norm_inputs(
        768, F32, branch=torch.empty(64, 261, 768, dtype=BF16, device="meta")
    )._replace(dtype=BF16),
    (100, "C=4096 fp32"): lambda: norm_inputs(4096, F32),
    (100, "C=1024, RMSNorm"): lambda: norm_inputs(1024, rms=True, bias=None),
}


@every_variant(VARIANTS)
def test_variants_fit_the_hardware_and_do_not_spill(arch: int, variant: str) -> None:
    for launch in launches(VARIANTS[arch, variant]()):
        used = compile_launch(launch, arch)
        assert not beyond_hardware(launch, used, arch)
        assert used.spill_bytes == 0, launch.kernel.__name__


if __name__ == "__main__":
    BUDGETS.write()
