"""The contract on every instruction set that this machine has, each forced in turn in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vitreg_kernels._native import library

ROOT = Path(__file__).parents[2]
ALL = ("baseline", "avx2", "avx512", "avx512bf16", "amx")
# Those below the one that this process runs, in which the suites run anyway.
OTHERS = ALL[: ALL.index(library.isa())] if library.isa() else ()
SUITES = [
    ROOT / "tests" / "contract",
    *(
        ROOT / "tests" / "native" / f"test_{name}.py"
        for name in ("infinities", "large_results", "parts", "probabilities", "rounding", "threads")
    ),
    *(
        ROOT / "tests" / f"test_{name}.py"
        for name in ("residual_norm", "token_norms", "assemble", "parity", "masks", "edges", "packing", "statistics")
    ),
]


def python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "isa", [pytest.param(isa, marks=() if isa in ("baseline", "avx2") else pytest.mark.slow) for isa in OTHERS]
)
def test_contract(isa):
    # A graph, what an op declares, what a transform makes of a call and where memory is do not change with the
    # instruction set.
    others = ("Compile", "Opaque", "test_transforms", "huge_pages")
    chosen = ["-k", " and ".join(("(cpu or native)", *(f"not {name}" for name in others)))]
    done = python("-m", "pytest", *SUITES, *chosen, VITREG_CPU_ISA=isa)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    shown = python("-c", "from vitreg_kernels._native import library; print(library.isa())", VITREG_CPU_ISA=isa)
    assert shown.stdout.strip() == isa, "the run above was of another one"


@pytest.mark.skipif(not library.isa(), reason="; ".join(library.faults()))
def test_a_name_that_is_none():
    call = (
        "import torch; from vitreg_kernels.functional import residual_layer_norm as f; "
        "f(torch.ones(1, 1, 4), weight=torch.ones(4), backend='cpu')"
    )
    done = python("-c", call, VITREG_CPU_ISA="sse9")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "VITREG_CPU_ISA must be baseline, avx2, avx512, avx512bf16 or amx, got sse9" in last
    assert last.startswith("vitreg_kernels.UnsupportedError")


def test_code_of_an_instruction_set_brings_nothing_in_from_the_standard_library():
    """An inline function that two sets compile is kept once, perhaps in the instructions of the wider."""
    cpu = ROOT / "csrc" / "cpu"
    harmless = {"stddef.h", "stdint.h", "cstddef", "cstdint", "immintrin.h", "math.h", "stdlib.h"}
    for path in (path for path in cpu.iterdir() if path.suffix == ".h" or path.stem.startswith("isa_")):
        included = {line.split("<")[1].split(">")[0] for line in path.read_text().splitlines() if "#include <" in line}
        assert included <= harmless, path.name
