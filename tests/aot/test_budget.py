"""The Triton kernels of attention, compiled for GPUs that are not there, stay within a checked-in resource budget.

``PYTHONPATH=. python tests/aot/test_budget.py`` writes the running triton's part of ``budgets.json`` and of two files
like it anew from what the kernels use now. Run it when a change is meant to use more, or has come to use less, and let
the diff say so. It grants no spill but at wide heads.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed: it exists for Linux x86-64 only")

import triton.language as tl  # noqa: E402
from budgets import Budgets, beyond_hardware, every_variant, violations  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402

from benchmarks.prediction.sass import Code  # noqa: E402
from benchmarks.prediction.table import TRITONS  # noqa: E402
from vitreg_kernels._triton import offline  # noqa: E402
from vitreg_kernels._triton.launch import Launch  # noqa: E402
from vitreg_kernels._triton.offline import Resources, compile_launch  # noqa: E402
from vitreg_kernels.ops.attention.backends.triton import launches  # noqa: E402
from vitreg_kernels.ops.attention.types import OUTPUT_NAMES, AttentionInputs, Rope  # noqa: E402

PREFIX = 5


def attention_inputs(
    tokens: int, head_dim: int = 64, dtype: torch.dtype = torch.bfloat16, batch: int = 64, heads: int = 16, **asked: Any
) -> AttentionInputs:
    """A call with heads enough to fill a GPU, on views of a packed qkv ``[B, N, 3, H, D]`` without memory."""
    qkv = torch.empty(batch, tokens, 3, heads, head_dim, dtype=dtype, device="meta")
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    return AttentionInputs(query, key, value, scale=head_dim**-0.5, num_prefix_tokens=PREFIX, **asked)


@cache
def budgeted(arch: int, tokens: int) -> dict[str, tuple[Launch, Resources]]:
    """Kernels by name: everything that forward, backward and all statistics launch."""
    return compiled(launches(attention_inputs(tokens, outputs=OUTPUT_NAMES), arch), arch)


@cache
def of_wide_heads(arch: int, head_dim: int) -> dict[str, tuple[Launch, Resources]]:
    """Those of forward and backward at a head dim whose tiles have 128 channels."""
    return compiled(launches(attention_inputs(261, head_dim), arch), arch)


@cache
def of_few_heads(arch: int, tokens: int) -> dict[str, tuple[Launch, Resources]]:
    """That of the forward of one image of ViT-L. Its backward runs the two kernels that many tokens take."""
    return compiled(launches(attention_inputs(tokens, batch=1), arch)[:1], arch)


def compiled(found: list[Launch], arch: int) -> dict[str, tuple[Launch, Resources]]:
    """Launches and what they use, by the names of their kernels."""
    kernels = {launch.kernel.__name__: (launch, compile_launch(launch, arch)) for launch in found}
    assert len(kernels) == len(found), (
        f"two launches of one kernel need two names: {[x.kernel.__name__ for x in found]}"
    )
    return kernels


# A small and a usual number of tokens, and each architecture: sm_100 takes thrice as long to compile for.
QUICK = ((80, 261), (90, 54), (90, 261), (100, 54))
# 5 prefix tokens and 7^2, 14^2, 16^2, 32^2, 37^2 patches. Other than on sm_90, kernels of 1029 tokens are those of 261,
# and those of 201 have another tail alone.
BUDGETS = Budgets("budgets.json", "N", (54, 201, 261, 1029, 1374), (54, 261, 1374), QUICK, budgeted, TRITONS)
# Some spill. They may not come to spill more. On sm_90 alone, as each of these kernels takes seconds to compile.
ON_SM_90 = dict.fromkeys(TRITONS, (90,))
WIDE_HEADS = Budgets(
    "wide_heads_budgets.json", "D", (80, 128), (), ((90, 80),), of_wide_heads, ON_SM_90, grants_spills=True
)
# Few heads sweep keys where many would hold them (201), and where many sweep too (1029).
FEW_HEADS = Budgets("few_heads_budgets.json", "N", (201, 1029), (), ((90, 201),), of_few_heads, ON_SM_90)
ALL = (BUDGETS, WIDE_HEADS, FEW_HEADS)

every_case = pytest.mark.parametrize(
    ("budgets", "arch", "size"),
    [
        pytest.param(
            *(budgets, arch, size),
            id=f"{budgets.name}-sm_{arch}-{budgets.symbol}={size}",
            marks=budgets.marks(arch, size),
        )
        for budgets in ALL
        for arch, size in budgets.cases
    ],
)
every_file = pytest.mark.parametrize("budgets", ALL, ids=lambda budgets: budgets.name)


def matrix_opcode(arch: int, rows: int) -> str:
    """The instruction a half-precision product of a tile of that many rows should become."""
    return "HMMA" if rows < 64 else {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[arch]


@every_case
def test_kernels_keep_to_their_budget(budgets: Budgets, arch: int, size: int) -> None:
    budgets.check(arch, size)


@every_file
def test_no_budget_for_what_is_not_tested(budgets: Budgets) -> None:
    budgets.check_sizes()


@every_case
def test_kernels_fit_the_hardware(budgets: Budgets, arch: int, size: int) -> None:
    for launch, used in budgets.kernels(arch, size).values():
        assert not beyond_hardware(launch, used, arch)


@every_case
def test_products_run_on_the_matrix_unit(budgets: Budgets, arch: int, size: int) -> None:
    for name, (launch, used) in budgets.kernels(arch, size).items():
        opcode = matrix_opcode(arch, launch.constants["BLOCK_M"])
        assert used.instructions[opcode], f"{name} on sm_{arch}, {budgets.symbol}={size}: no {opcode}"


@every_case
def test_no_loop_of_asynchronous_products_copies_single_words(budgets: Budgets, arch: int, size: int) -> None:
    """Of prefetched statistics, triton 3.6 makes a copy of 4 bytes for each column of a thread: dozens a loop."""
    found = 0
    for name, (_, used) in budgets.kernels(arch, size).items():
        code = Code(used.sass)
        for loop in code.loops.values():
            opcodes = [i.opcode for block in loop.blocks for i in code.blocks[block]]
            if any(opcode.startswith("HGMMA") for opcode in opcodes):
                found += 1
                words = [opcode for opcode in opcodes if opcode.startswith("LDGSTS") and ".128" not in opcode]
                assert not words, f"{name} on sm_{arch}, {budgets.symbol}={size}"
    assert found or arch != 90 or size == 54, "no loop was looked at"


def packed(inputs: AttentionInputs, *lengths: int) -> AttentionInputs:
    """The same call on images of different sizes, one after another in a batch of one."""
    cu_seqlens = torch.empty(len(lengths) + 1, dtype=torch.int32, device="meta")
    return inputs._replace(cu_seqlens=cu_seqlens, max_seqlen=max(lengths))


def masked(inputs: AttentionInputs) -> AttentionInputs:
    batch, _, tokens, _ = inputs.query.shape
    return inputs._replace(attn_mask=torch.empty(batch, 1, 1, tokens, dtype=torch.bool, device="meta"))


def rotated(inputs: AttentionInputs, patches: int, interleaved: bool) -> AttentionInputs:
    cos, sin = torch.empty(2, patches, inputs.query.shape[-1], device="meta")
    return inputs._replace(rope=Rope(cos, sin, interleaved))


F16, F32 = torch.float16, torch.float32

# What the budget leaves out, sampled for time: every head dim and every feature, on some architecture. RoPE stands at a
# small head dim, because its kernels take half a minute to compile at padded ones.
VARIANTS = {
    (80, "d=16 fp16, one token of one head"): lambda: attention_inputs(1, 16, F16, 1, 1)._replace(num_prefix_tokens=1),
    (80, "d=72 fp16, 54 tokens, masked"): lambda: masked(attention_inputs(54, 72, F16)),
    (80, "d=16 fp32, packed, rope interleaved"): lambda: packed(
        rotated(attention_inputs(255, 16, F32, 1), 245, interleaved=True), 54, 201
    ),
    (90, "d=64 bf16, all outputs, rope in halves"): lambda: rotated(
        attention_inputs(261, outputs=OUTPUT_NAMES), 256, interleaved=False
    ),
    (90, "d=80 bf16, packed"): lambda: packed(attention_inputs(255, 80, batch=1), 54, 201),
    (100, "d=128 bf16, masked, all outputs"): lambda: masked(attention_inputs(201, 128, outputs=OUTPUT_NAMES)),
    (100, "d=16 fp32, masked, rope in halves"): lambda: masked(
        rotated(attention_inputs(54, 16, F32), 49, interleaved=False)
    ),
}


@pytest.mark.parametrize(
    "lengths", [(261, 261, *[54] * 8), pytest.param((201, 201, *[54] * 8), marks=pytest.mark.slow)]
)
def test_a_pack_of_crops_does_not_spill(lengths: tuple[int, ...]) -> None:
    forward, *_ = launches(packed(attention_inputs(sum(lengths), batch=1), *lengths), 90)
    assert compile_launch(forward, 90).spill_bytes == 0


@pytest.mark.slow
def test_a_masked_call_does_not_spill() -> None:
    for launch in launches(masked(attention_inputs(201)), 90):
        assert compile_launch(launch, 90).spill_bytes == 0, launch.kernel.__name__


@every_variant(VARIANTS)
def test_variants_fit_the_hardware(arch: int, variant: str) -> None:
    for launch in launches(VARIANTS[arch, variant](), arch):
        assert not beyond_hardware(launch, compile_launch(launch, arch), arch)


def test_every_kind_of_violation_is_told() -> None:
    row = {"registers": 128, "spill_bytes": 0, "shared_bytes": 1024}
    assert not violations({"kernel": row}, {"kernel": row})
    assert violations(
        {"new": row, "kernel": {**row, "registers": 129, "spill_bytes": 4}}, {"kernel": row, "gone": row}
    ) == [
        "gone: stale budget row, nothing launches it",
        "kernel: 129 registers, budget 128",
        "kernel: 4 spill_bytes, budget 0",
        "new: no budget row",
    ]


@triton.jit
def _centre_kernel(x, out, length, LENGTH: tl.constexpr):
    """Keeps a whole row in registers from the load to the store."""
    column = tl.arange(0, LENGTH)
    row = tl.load(x + column, mask=column < length, other=0.0)
    tl.store(out + column, row - tl.sum(row, 0), mask=column < length)


def centre(num_warps: int, device: str = "meta", offset: int = 0, length: int = 1000) -> Launch:
    x = torch.empty(8192 + offset, device=device)[offset:]
    return Launch(_centre_kernel, (1,), {"x": x, "out": x, "length": length}, {"LENGTH": 8192}, num_warps, 1)


def test_a_kernel_that_spills_is_seen_to_spill() -> None:
    cramped, roomy = compile_launch(centre(1), 80), compile_launch(centre(16), 80)
    assert cramped.spill_bytes > 0
    assert cramped.instructions["STL"] > 0
    assert cramped.instructions["LDL"] > 0
    assert (roomy.spill_bytes, roomy.instructions["STL"], roomy.instructions["LDL"]) == (0, 0, 0)
    assert (cramped.num_warps, roomy.num_warps) == (1, 16)
    assert cramped.shared_bytes == 0
    assert roomy.shared_bytes == 16 * 4  # one partial sum a warp
    assert roomy.instructions["EXIT"] >= 1


class _NoDriver:
    """Stands in for a GPU's driver so that triton's launcher gets as far as compiling."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.mark.parametrize(("offset", "length"), [(0, 1), (0, 8000), (1, 2**40 + 1)])
def test_arguments_are_specialised_as_a_launch_would(offset: int, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_active", _NoDriver())
    launched = centre(16, "cpu", offset, length)
    expected = _centre_kernel.run(
        **launched.arguments, **launched.constants, num_warps=16, num_stages=1, grid=(1,), warmup=True
    )
    job = offline.compilation(centre(16, "meta", offset, length), 90)
    assert job.run().hash == job.key == expected.hash


def test_a_kernel_that_does_not_compile_is_named() -> None:
    launch = centre(16)
    with pytest.raises(RuntimeError, match="_centre_kernel does not compile for sm_80"):
        compile_launch(launch._replace(constants={"LENGTH": 1000}), 80)  # tl.arange wants a power of two


if __name__ == "__main__":
    for budgets in ALL:
        budgets.write()
