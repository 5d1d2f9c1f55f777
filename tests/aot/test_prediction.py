"""The static performance model: its reading of machine code, its arithmetic, and its predictions of what is shipped."""

from __future__ import annotations

import math

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed: it exists for Linux x86-64 only")

from benchmarks.prediction import table  # noqa: E402
from benchmarks.prediction.gpu import GPUS  # noqa: E402
from benchmarks.prediction.predict import count, predict, resident_programs  # noqa: E402
from benchmarks.prediction.sass import Code  # noqa: E402
from vitreg_kernels._triton.offline import Resources, compile_launch  # noqa: E402
from vitreg_kernels.ops.attention.backends.triton import launches  # noqa: E402

# Two loops, the outer one left by a conditional call as ptxas does at times, and what stands behind every kernel.
NESTED = """
        /*0000*/                   MUFU.EX2 R0, R1 ;
        /*0010*/              @!P0 EXIT ;
.L_x_0:
        /*0020*/                   FADD R0, R0, R1 ;
.L_x_1:
        /*0030*/                   MUFU.EX2 R0, R1 ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
        /*0050*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0060*/               @P2 CALL.REL.NOINC `(.L_x_2) ;
        /*0070*/                   BRA `(.L_x_0) ;
.L_x_2:
        /*0080*/                   LDG.E.128 R4, desc[UR8][R2.64] ;
        /*0090*/                   HMMA.16816.F32.BF16 R0, R1, R7, R3 ;
        /*00a0*/                   EXIT ;
.L_x_3:
        /*00b0*/                   BRA `(.L_x_3) ;
"""

# Two kinds of programs, one of which may skip a wait.
TWO_KINDS = """
        /*0000*/               @P0 BRA `(.L_x_0) ;
        /*0010*/                   MUFU.EX2 R0, R1 ;
        /*0020*/                   EXIT ;
.L_x_0:
        /*0030*/              @!P1 BRA `(.L_x_1) ;
        /*0040*/                   NOP ;
.L_x_1:
        /*0050*/                   MUFU.EX2 R0, R1 ;
        /*0060*/                   MUFU.EX2 R0, R1 ;
        /*0070*/                   EXIT ;
"""


def test_loops_and_their_nesting_are_read_from_the_code() -> None:
    (path,) = Code(NESTED).paths()
    assert [step.loops for step in path] == [(), (1,), (1, 2), (1,), (1,), ()]


def test_instructions_count_as_often_as_their_loops_run() -> None:
    (path,) = Code(NESTED).paths()
    found = count(path, {1: 5, 2: 3}, num_warps=4, gpu=GPUS[90])
    assert found.exps == (1 + 5 * 3) * 4 * 32
    assert found.units["exp"] == found.exps / 16
    assert found.barriers == 5
    assert (found.products, found.flops) == (4, 4 * 2 * 16 * 8 * 16)
    assert found.global_bytes == 4 * 32 * 16
    assert found.waits == 1  # the product needs what was loaded just before it, its last quarter


def test_ways_that_compute_the_same_are_one() -> None:
    exps = sorted(count(path, {}, num_warps=1, gpu=GPUS[80]).exps for path in Code(TWO_KINDS).paths())
    assert exps == [32, 64]


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "resident"),
    [(128, 0, 4, 4), (129, 0, 4, 3), (32, 75 * 1024, 4, 3), (32, 0, 32, 2), (16, 0, 1, 32), (255, 227 * 1024, 8, 1)],
)
def test_resident_programs(registers: int, shared: int, warps: int, resident: int) -> None:
    used = Resources(registers, 0, shared, 0, warps, b"")
    assert resident_programs(used, GPUS[90]) == resident


def test_code_that_cannot_do_the_work_is_refused() -> None:
    launch = launches(table.call(261, 64), 80)[0]
    used = compile_launch(launch, 80)
    assert predict(launch, used, 80).ns > 0
    wider = launch._replace(constants={**launch.constants, "BLOCK_D": 512})
    with pytest.raises(ValueError, match=r"should compute \d+ scores"):
        predict(wider, used, 80)


_SHOWN_QUICKLY = ((90, 54, 64), (90, 261, 64), (80, 261, 64))
_SHOWN = [*((90, n, 64) for n in table.GOALS), (90, 261, 128), (90, 1029, 128), (80, 261, 64), (100, 261, 64)]


def test_the_running_triton_has_budgets_and_predictions() -> None:
    """Of another, the tests beside this one have no cases, and would pass by being empty."""
    assert triton.__version__ in table.TRITONS


@pytest.mark.parametrize(
    ("arch", "tokens", "head_dim"),
    [
        pytest.param(*case, marks=() if case in _SHOWN_QUICKLY else (pytest.mark.slow,))
        for case in _SHOWN
        if case[0] in table.TRITONS.get(triton.__version__, ())
    ],
)
def test_the_page_shows_what_the_kernels_are_now(arch: int, tokens: int, head_dim: int) -> None:
    part = table.parts(table.FILE.read_text())[triton.__version__].splitlines()
    missing = [line for line in table.lines(arch, tokens, head_dim) if line not in part]
    assert not missing, f"run python -m benchmarks.prediction; the page lacks {missing}"


def test_the_page_has_every_shape_of_every_gpu_by_every_triton() -> None:
    found = table.parts(table.FILE.read_text())
    assert list(found) == list(table.TRITONS)
    for version, part in found.items():
        for arch, section in zip(table.TRITONS[version], part.split("### sm_")[1:], strict=True):
            assert section.startswith(str(arch))
            for tokens, head_dim in table.SHAPES:
                for direction in ("forward", "backward"):
                    assert f"| {tokens} | {head_dim} | {direction} |" in section


@pytest.mark.parametrize(
    ("tokens", "least"),
    [
        (54, (6, 2)),
        (261, (2, 2)),
        *(pytest.param(*row, marks=pytest.mark.slow) for row in ((201, (3, 2)), (1029, (2, 4, 3)), (1374, (2, 3, 3)))),
    ],
)
def test_programs_a_multiprocessor_of_sm_90_holds(tokens: int, least: tuple[int, ...]) -> None:
    """Of the forward and of each kernel of the backward, by every triton. One more register can cost a third of it."""
    kernels = [kernel for row in table.rows(90, tokens, 64) for kernel in row.kernels]
    for kernel, programs in zip(kernels, least, strict=True):
        assert kernel.resident >= programs, kernel.kernel
        assert kernel.resources.spill_bytes == 0, kernel.kernel


@pytest.mark.parametrize("tokens", [pytest.param(201, marks=pytest.mark.slow), 261])
def test_the_forward_is_predicted_near_its_goal(tokens: int) -> None:
    forward, _ = table.rows(90, tokens, 64)
    assert forward.roofline_ns <= forward.ns <= 1.35 * table.GOALS[tokens][0]


def test_the_roofline_is_that_of_the_plan() -> None:
    assert math.isclose(table.roofline_ns(261, 64, False, GPUS[90]), 512 * 261 / 4300, rel_tol=1e-6)
    assert math.isclose(table.roofline_ns(1029, 64, True, GPUS[90]), 640 * 1029**2 / 790e3, rel_tol=1e-6)
