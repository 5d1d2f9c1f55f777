"""The Triton kernels of assemble_tokens, compiled for GPUs that are not there, keep to a budget and never spill.

``python tests/aot/test_assemble_budget.py`` writes the budgets anew, as ``test_budget.py`` does attention's.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
import torch
from budgets import COMPILED_FOR, QUICK_CHANNELS, Budgets, beyond_hardware, every_variant

from vitreg_kernels._triton.launch import Launch
from vitreg_kernels._triton.offline import Resources, compile_launch
from vitreg_kernels.ops.assemble.backends.triton import launches
from vitreg_kernels.ops.assemble.types import AssembleInputs

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def assemble_inputs(
    channels: int, dtype: torch.dtype = BF16, patches: int = 256, *, along_patches: bool = True, **changes: Any
) -> AssembleInputs:
    """A call with everything, of a batch of 64 convolved images without memory."""

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    convolved = empty(64, channels, patches).transpose(1, 2) if along_patches else empty(64, patches, channels)
    prefix = empty(1, 1, channels), empty(1, 4, channels)
    return AssembleInputs(convolved, *prefix, empty(1, 1 + patches, channels), dtype)._replace(**changes)


@cache
def budgeted(arch: int, channels: int) -> dict[str, tuple[Launch, Resources]]:
    """Kernels by name: everything that forward and backward launch."""
    found = launches(assemble_inputs(channels))
    return {launch.kernel.__name__: (launch, compile_launch(launch, arch)) for launch in found}


BUDGETS = Budgets("assemble_budgets.json", "C", (384, 768, 1024, 1536), (384, 1536), QUICK_CHANNELS, budgeted)


@BUDGETS.every_case
def test_kernels_keep_to_their_budget(arch: int, size: int) -> None:
    BUDGETS.check(arch, size)


def test_no_budget_for_what_is_not_tested_and_none_for_a_spill() -> None:
    BUDGETS.check_sizes()
    BUDGETS.check_no_spill()


def accesses(used: Resources) -> dict[str, list[str]]:
    """The widths of all loads from and stores to memory in a kernel's machine code."""
    return {name: re.findall(rf"\b{name}\.E(\S*)", used.sass) for name in ("LDG", "STG")}


@pytest.mark.parametrize("arch", COMPILED_FOR)
@pytest.mark.parametrize("along_patches", [True, False], ids=["convolution", "contiguous"])
def test_tiles_are_read_and_written_16_bytes_at_a_time(arch: int, along_patches: bool) -> None:
    """Whichever way the patches lie; a convolution's tile is turned in shared memory, once.

    As many wide stores as a tile of the prefix and one of patches hold, and loads of both and of the rows of each. (Of
    the four sources of the prefix only as many loads are left as lie within the few tokens there are.)
    """
    forward, _ = launches(assemble_inputs(384, along_patches=along_patches))
    used = compile_launch(forward, arch)
    of_tile = forward.constants["ROWS"] * forward.constants["BLOCK_C"] // (32 * forward.num_warps * 8)
    found = accesses(used)
    assert all(width.startswith(".128") for widths in found.values() for width in widths), found
    assert len(found["STG"]) == 2 * of_tile
    assert 2 * of_tile < len(found["LDG"]) <= 5 * of_tile
    assert used.shared_bytes == (2 * 32 * 128 if along_patches else 0)


@pytest.mark.parametrize("arch", COMPILED_FOR)
def test_the_backward_reads_16_bytes_at_a_time(arch: int) -> None:
    launch, used = budgeted(arch, 384)["_assemble_bwd_kernel"]
    of_tile = launch.constants["IMAGES"] * launch.constants["BLOCK_C"] // (32 * launch.num_warps * 8)
    found = accesses(used)["LDG"]
    assert len(found) == of_tile
    assert all(width.startswith(".128") for width in found), found


# What the budget leaves out: grids of no multiple of 16, odd widths, other dtypes, and calls that leave something out.
VARIANTS = {
    (80, "C=1280 fp16, 37 x 37"): lambda: assemble_inputs(1280, F16, 37 * 37),
    (80, "C=384 fp32, contiguous"): lambda: assemble_inputs(384, F32, along_patches=False),
    (80, "C=384, patches alone"): lambda: assemble_inputs(384, cls_token=None, register_tokens=None, pos_embed=None),
    (90, "C=768, 14 x 14"): lambda: assemble_inputs(768, patches=196),
    (90, "C=1, one patch"): lambda: assemble_inputs(1, patches=1),
    (90, "C=768, fp32 parameters"): lambda: assemble_inputs(768, F32)._replace(patches=assemble_inputs(768).patches),
    (100, "C=4096 fp32"): lambda: assemble_inputs(4096, F32),
    (100, "C=1024, no position embedding"): lambda: assemble_inputs(1024, pos_embed=None),
}


@every_variant(VARIANTS)
def test_variants_fit_the_hardware_and_do_not_spill(arch: int, variant: str) -> None:
    for launch in launches(VARIANTS[arch, variant]()):
        used = compile_launch(launch, arch)
        assert not beyond_hardware(launch, used, arch)
        assert used.spill_bytes == 0, launch.kernel.__name__


if __name__ == "__main__":
    BUDGETS.write()
