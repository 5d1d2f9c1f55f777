"""Norms counted into distributions: a kernel over blocks of norms, and a small one that adds up what they leave behind.

The histogram takes atomics, whose sums are integers and the same in any order. Floating-point sums and extremes are
left by each program as its row, and the rows are added up in a fixed order: the same norms give the same bits.
"""

# ruff: noqa: ANN001, ANN202  (what a kernel takes is traced, not annotated; shapes stand in comments)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ....._triton.launch import Launch, strided
from .....layout import TokenLayout
from ...bins import FIRST_BIN, NUM_BINS, SHIFT
from ...types import NormDistribution
from . import plan

_REDUCED_AT_ONCE = 32  # rows


@triton.jit
def _count_norms_kernel(
    norms,  # [B, N] fp32, contiguous
    histogram,  # [3, 2048] int64
    nonfinite,  # [3, 2] int64
    partial,  # [programs, 4, 4] fp64: quantities of groups
    num_norms,
    num_tokens,
    num_cls_tokens,
    num_prefix_tokens,
    FIRST_BIN: tl.constexpr,
    NUM_BINS: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    within = tl.arange(0, BLOCK)
    cells = program * BLOCK + within
    exists = cells < num_norms
    norm = tl.load(norms + cells, mask=exists, other=0.0)
    # In 64 bits, as all that becomes an offset: a distribution may be a view of any strides.
    token = ((program * BLOCK % num_tokens).to(tl.int32) + within) % num_tokens  # one division in 64 bits
    group = (token >= num_cls_tokens).to(tl.int64) + (token >= num_prefix_tokens).to(tl.int64)
    is_nan = norm != norm
    is_infinite = tl.abs(norm) == float("inf")
    finite = exists & ~is_nan & ~is_infinite

    number = (norm.to(tl.int32, bitcast=True) >> SHIFT) - FIRST_BIN
    number = tl.minimum(tl.maximum(number, 0), NUM_BINS - 1).to(tl.int64)
    one = tl.full([BLOCK], 1, tl.int64)
    counter = histogram.pointer + group * histogram.strides[0] + number * histogram.strides[1]
    tl.atomic_add(counter, one, mask=finite, sem="relaxed")
    counter = nonfinite.pointer + group * nonfinite.strides[0] + is_infinite.to(tl.int64) * nonfinite.strides[1]
    tl.atomic_add(counter, one, mask=exists & ~finite, sem="relaxed")

    groups = tl.arange(0, GROUPS)
    belongs = (groups[:, None] == group[None, :]) & finite[None, :]
    row = partial + program * (4 * GROUPS) + groups
    wide = norm.to(tl.float64)[None, :]
    tl.store(row, tl.sum(tl.where(belongs, wide, 0.0), 1))
    tl.store(row + GROUPS, tl.sum(tl.where(belongs, wide * wide, 0.0), 1))
    tl.store(row + 2 * GROUPS, tl.min(tl.where(belongs, norm[None, :], float("inf")), 1).to(tl.float64))
    tl.store(row + 3 * GROUPS, tl.max(tl.where(belongs, norm[None, :], float("-inf")), 1).to(tl.float64))


@triton.jit
def _add_counted_norms_kernel(
    partial,  # [programs, 4, 4] fp64
    sums,  # [3, 2] fp64
    extremes,  # [3, 2] fp32
    num_rows,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
):
    groups = tl.arange(0, GROUPS).to(tl.int64)  # which the strides of a view may take far
    total = tl.zeros([BLOCK, GROUPS], tl.float64)
    total_of_squares = tl.zeros([BLOCK, GROUPS], tl.float64)
    lowest = tl.full([BLOCK, GROUPS], float("inf"), tl.float64)
    highest = tl.full([BLOCK, GROUPS], float("-inf"), tl.float64)
    for first in range(0, num_rows, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        exists = (rows < num_rows)[:, None]
        cells = partial + rows.to(tl.int64)[:, None] * (4 * GROUPS) + groups[None, :]
        total += tl.load(cells, mask=exists, other=0.0)
        total_of_squares += tl.load(cells + GROUPS, mask=exists, other=0.0)
        lowest = tl.minimum(lowest, tl.load(cells + 2 * GROUPS, mask=exists, other=float("inf")))
        highest = tl.maximum(highest, tl.load(cells + 3 * GROUPS, mask=exists, other=float("-inf")))

    is_group = groups < 3
    first = sums.pointer + groups * sums.strides[0]
    second = first + sums.strides[1]
    tl.store(first, tl.load(first, mask=is_group) + tl.sum(total, 0), mask=is_group)
    tl.store(second, tl.load(second, mask=is_group) + tl.sum(total_of_squares, 0), mask=is_group)
    first = extremes.pointer + groups * extremes.strides[0]
    second = first + extremes.strides[1]
    smallest = tl.minimum(tl.load(first, mask=is_group), tl.min(lowest, 0).to(tl.float32))
    largest = tl.maximum(tl.load(second, mask=is_group), tl.max(highest, 0).to(tl.float32))
    tl.store(first, smallest, mask=is_group)
    tl.store(second, largest, mask=is_group)


def counting_launches(norms: Tensor, layout: TokenLayout, into: NormDistribution, partial: Tensor) -> list[Launch]:
    """The counting of contiguous norms ``[B, N]`` as launches, in order; ``partial`` is of ``plan.empty_partial``."""
    programs = partial.shape[0]
    arguments = {
        "norms": norms,
        "histogram": strided(into.histogram),
        "nonfinite": strided(into.nonfinite),
        "partial": partial,
        "num_norms": norms.numel(),
        "num_tokens": norms.shape[1],
        "num_cls_tokens": layout.num_cls_tokens,
        "num_prefix_tokens": layout.num_prefix_tokens,
    }
    constants = {"FIRST_BIN": FIRST_BIN, "NUM_BINS": NUM_BINS, "SHIFT": SHIFT}
    constants |= {"BLOCK": plan.NORMS_OF_A_PROGRAM, "GROUPS": plan.GROUPS}
    count = Launch(_count_norms_kernel, (programs,), arguments, constants, 8, 1)
    arguments = {
        "partial": partial,
        "sums": strided(into.sums),
        "extremes": strided(into.extremes),
        "num_rows": programs,
    }
    constants = {"BLOCK": _REDUCED_AT_ONCE, "GROUPS": plan.GROUPS}
    return [count, Launch(_add_counted_norms_kernel, (1,), arguments, constants, 4, 1)]
