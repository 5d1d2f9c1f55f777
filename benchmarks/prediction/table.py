"""The predictions of all shipped kernels as a page of the docs."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from benchmarks.prediction.gpu import EXP_LANES, GPUS, Gpu
from benchmarks.prediction.predict import Prediction, predict
from vitreg_kernels._triton.offline import compile_launch
from vitreg_kernels.ops.attention.backends.triton import launches
from vitreg_kernels.ops.attention.types import AttentionInputs

FILE = Path(__file__).parents[2] / "docs" / "predictions.md"
BATCH, HEADS, PREFIX = 64, 16, 5
# (tokens, head dim): bf16, on views of a packed qkv.
SHAPES = ((54, 64), (201, 64), (261, 64), (1029, 64), (1374, 64), (201, 128), (261, 128), (1029, 128))

# The architectures by the triton that compiles for them: all by the one that `make` installs, sm_90 by each other that
# a supported torch brings. 3.6 comes with torch 2.10 and 2.11, 3.7 with 2.13, 3.8 with 2.14; 3.9 is what pip installs
# beside a torch that brings none.
TRITONS: dict[str, tuple[int, ...]] = {"3.7.1": tuple(GPUS), "3.6.0": (90,), "3.8.0": (90,), "3.9.0": (90,)}

# ns per (batch, head) forward and backward on an H200, d = 64: what the project wants to measure.
GOALS = {54: (8, 17), 201: (28, 80), 261: (38, 110), 1029: (484, 1570), 1374: (833, 2690)}

_INTRODUCTION = """# Predicted times of the GPU kernels

**Predictions, not measurements.** No GPU was used: the kernels are compiled ahead of time, their machine code is
counted, and a simple model ([`benchmarks/prediction/predict.py`](../benchmarks/prediction/predict.py)) turns the counts
into time. Measured times, where there are any, are in [benchmarks](benchmarks.md). Machine code
differs from triton to triton, each with the ptxas in its wheel, so every part says which one compiled. `python -m
benchmarks.prediction` writes the part of the triton that it runs with; `make test` checks those of 3.7.1 and 3.6.0.

For scale: at N = 1029 and d = 64 the forward is a kind of kernel whose speed is published. The Triton kernel in
flash-attention's charts reaches 382 TFLOP/s on an H100 at N = 1k, which would be 710 ns here.

bf16, batch 64, 16 heads, 5 prefix tokens. All times in ns per (batch, head). *Roofline*: the longest of useful traffic,
useful products and useful exponentials at the GPU's rates. *Resident*: programs a multiprocessor holds. *Matrix*, *exp*
and *KB*: matrix instructions, exponentials and bytes to and from the L2 of one program of the most frequent kind.
"""


class Row(NamedTuple):
    """One pass of one shape on one GPU."""

    tokens: int
    head_dim: int
    direction: str  # "forward" or "backward"
    kernels: tuple[Prediction, ...]
    roofline_ns: float

    @property
    def ns(self) -> float:
        """Of all its kernels, one after another."""
        return sum(kernel.ns for kernel in self.kernels)


@functools.cache
def rows(arch: int, tokens: int, head_dim: int) -> tuple[Row, Row]:
    """Forward and backward of one shape, compiled for an architecture."""
    kernels = [predict(launch, compile_launch(launch, arch), arch) for launch in launches(call(tokens, head_dim), arch)]

    def row(direction: str) -> Row:
        backward = direction == "backward"
        chosen = tuple(k for k in kernels if ("bwd" in k.kernel) == backward)
        return Row(tokens, head_dim, direction, chosen, roofline_ns(tokens, head_dim, backward, GPUS[arch]))

    return row("forward"), row("backward")


def call(tokens: int, head_dim: int) -> AttentionInputs:
    """A call without memory."""
    qkv = torch.empty(BATCH, tokens, 3, HEADS, head_dim, dtype=torch.bfloat16, device="meta")
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    return AttentionInputs(query, key, value, scale=head_dim**-0.5, num_prefix_tokens=PREFIX)


def roofline_ns(tokens: int, head_dim: int, backward: bool, gpu: Gpu) -> float:
    """The longest of useful traffic (4 tensors forward, 8 backward), products (2, 5) and exponentials."""
    tensors, products = (8, 5) if backward else (4, 2)
    exps_per_ns = gpu.multiprocessors * EXP_LANES * gpu.clock_ghz
    return max(
        tensors * tokens * head_dim * 2 / gpu.memory_tbps / 1e3,
        products * 2 * tokens**2 * head_dim / gpu.matrix_tflops / 1e3,
        tokens**2 / exps_per_ns,
    )


def parts(page: str) -> dict[str, str]:
    """The parts of a page by the version of triton that compiled."""
    return {part.partition("\n")[0]: part.partition("\n")[2] for part in page.split("\n## triton ")[1:]}


def document(page: str) -> str:
    """The page with the running triton's part written anew. Compiles all of that, which takes some minutes."""
    found = parts(page) | {triton.__version__: _part()}
    return _INTRODUCTION + "".join(
        f"\n## triton {version}\n{found[version]}" for version in TRITONS if version in found
    )


def _part() -> str:
    sections = [
        [*_headings(arch), *(line for tokens, head_dim in SHAPES for line in lines(arch, tokens, head_dim))]
        for arch in TRITONS[triton.__version__]
    ]
    return "\n".join(line for section in sections for line in section) + "\n"


def lines(arch: int, tokens: int, head_dim: int) -> list[str]:
    """The lines of one shape in an architecture's table: one for each kernel."""
    found = []
    for row in rows(arch, tokens, head_dim):
        flops = (10 if row.direction == "backward" else 4) * tokens**2 * head_dim
        goal = GOALS[tokens][row.direction == "backward"] if arch == 90 and head_dim == 64 else ""
        times = [f"{row.ns:.0f}", goal, f"{row.roofline_ns:.0f}", f"{flops / row.ns / 1e3:.0f}"]
        head = [tokens, head_dim, row.direction, *times]
        for i, kernel in enumerate(row.kernels):
            used, program = kernel.resources, kernel.program
            cells = [
                *(head if i == 0 else [""] * len(head)),
                kernel.kernel.strip("_"),
                f"{kernel.ns:.0f}",
                kernel.bound_by,
                used.registers,
                used.spill_bytes,
                used.shared_bytes,
                kernel.resident,
                f"{program.products:.0f}",
                f"{program.exps:.0f}",
                f"{program.global_bytes / 1024:.0f}",
            ]
            found.append("| " + " | ".join(map(str, cells)) + " |")
    return found


def _headings(arch: int) -> list[str]:
    gpu = GPUS[arch]
    return [
        "",
        f"### sm_{arch}: {gpu.name}",
        "",
        f"Rates: {gpu.matrix_tflops:.0f} TFLOP/s, memory {gpu.memory_tbps} TB/s, L2 {gpu.l2_tbps} TB/s, "
        f"{gpu.multiprocessors} multiprocessors at {gpu.clock_ghz} GHz.",
        "",
        "| N | d | | predicted | goal | roofline | TFLOP/s | kernel | ns | bound by | registers | spilled bytes "
        "| shared bytes | resident | matrix | exp | KB |",
        "|" + "---|" * 17,
    ]
