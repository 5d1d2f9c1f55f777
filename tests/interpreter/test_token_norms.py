"""The Triton kernels of token_norms in the interpreter: in guarded memory, behind the opaque ops, compiled."""

from __future__ import annotations

import pytest
import torch
from harness import BAND, guarded, guarded_like
from residual_norm_cases import LAYOUTS
from token_norms_cases import KINDS, ODD_NORMS, Spec, assert_parity, assert_same_counts, counted, make_call
from torch.library import opcheck

from vitreg_kernels import NormDistribution, TokenLayout
from vitreg_kernels.functional import token_norms
from vitreg_kernels.ops.token_norms.api import accumulate
from vitreg_kernels.ops.token_norms.backends import triton
from vitreg_kernels.ops.token_norms.backends.triton import counting_kernels, plan
from vitreg_kernels.ops.token_norms.backends.triton.counting_kernels import counting_launches
from vitreg_kernels.ops.token_norms.backends.triton.norms_kernel import norms_launches

OPS = torch.ops.vitreg
LAYOUT = TokenLayout(num_registers=4)

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)


@pytest.fixture(autouse=True)
def _small_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few norms are several programs, and their rows are added up in several turns."""
    monkeypatch.setattr(plan, "NORMS_OF_A_PROGRAM", 16)
    monkeypatch.setattr(counting_kernels, "_REDUCED_AT_ONCE", 4)


class GuardedDistribution:
    """One of no tokens, between bands of numbers that no kernel leaves as they are.

    Distributions are added to, so a band of NaN would hide a sum: it stays NaN. -0.0 becomes 0.0 whatever is added.
    """

    def __init__(self) -> None:
        zeros = NormDistribution.zeros((3,), "cpu")
        self.memory = [x.new_full((x.numel() + 2 * BAND,), -0.0 if x.is_floating_point() else -1) for x in zeros]
        pairs = zip(self.memory, zeros, strict=True)
        self.view = NormDistribution(*(m.as_strided(x.shape, x.stride(), BAND) for m, x in pairs))
        for view, x in zip(self.view, zeros, strict=True):
            view.copy_(x)

    def check_bands(self) -> None:
        for name, memory in zip(NormDistribution._fields, self.memory, strict=True):
            for band in (memory[:BAND], memory[-BAND:]):
                intact = (band == 0) & band.signbit() if band.is_floating_point() else band == -1
                assert intact.all(), f"{name}: written outside its bounds"


@every_dtype
@pytest.mark.parametrize(
    "spec",
    [
        *(Spec(layout=layout) for layout in LAYOUTS if layout != "expanded"),
        Spec(batch=1, tokens=5, channels=384),
        Spec(batch=3, tokens=54, channels=100),
        Spec(batch=2, tokens=6, channels=768),
        Spec(batch=1, tokens=7, channels=1280),
        Spec(batch=1, tokens=6, channels=4096),
        Spec(batch=3, tokens=130, channels=17),
        Spec(batch=2, tokens=9, channels=1),
    ],
    ids=str,
)
def test_guarded(spec: Spec, dtype: torch.dtype) -> None:
    """Reads and writes within bounds; parity is the next test's."""
    call = make_call(spec._replace(dtype=dtype))
    norms, into = guarded((spec.batch, spec.tokens), torch.float32), GuardedDistribution()
    for launch in norms_launches(guarded_like(call["x"]), norms.view):
        launch.run()
    norms.check_written("norms")
    assert torch.equal(norms.view, token_norms(call["x"], backend="triton"))
    count, total = counting_launches(norms.view, call["layout"], into.view, plan.empty_partial(norms.view))
    count.arguments["partial"].fill_(torch.nan)
    count.run()
    total.run()
    into.check_bands()
    assert_same_counts(into.view._asdict(), counted(norms.view, call["layout"]), str(spec))


def test_norms_of_every_bin_and_beyond() -> None:
    """Each in the first group and in the last: beyond the first bin and the last one begins other memory."""
    norms, into = guarded((2, len(ODD_NORMS)), torch.float32), GuardedDistribution()
    norms.view.copy_(torch.stack((ODD_NORMS, ODD_NORMS.flip(0))))
    layout = TokenLayout(num_cls_tokens=len(ODD_NORMS) // 2, num_registers=0)
    for launch in counting_launches(norms.view, layout, into.view, plan.empty_partial(norms.view)):
        launch.run()
    into.check_bands()
    assert_same_counts(into.view._asdict(), counted(norms.view, layout), "odd norms")


@every_dtype
@pytest.mark.parametrize("spec", [*KINDS, *(Spec(batch=5, tokens=29, layout=layout) for layout in LAYOUTS)], ids=str)
def test_parity(spec: Spec, dtype: torch.dtype) -> None:
    assert_parity(spec._replace(dtype=dtype), "triton", draws=4)


@pytest.mark.parametrize("programs", [1, 2, 3, 4, 5, 9])
def test_rows_of_any_number_of_programs(programs: int) -> None:
    norms = torch.empty(1, 16 * programs - 3).log_normal_(3.0, 1.0)
    norms[0, 5], norms[0, -1] = torch.nan, torch.inf
    into = NormDistribution.zeros((3,), "cpu")
    count, _ = counting_launches(norms, LAYOUT, into, plan.empty_partial(norms))
    assert count.grid == (programs,)
    for times in (1, 2):
        accumulate(norms, LAYOUT, into, backend="triton")
        assert_same_counts(into._asdict(), counted(norms.expand(times, -1), LAYOUT), f"counted {times} times")


def test_three_launches_whatever_the_batch() -> None:
    for batch in (1, 1024):
        norms, count, total = triton.launches(torch.empty(batch, 261, 768, device="meta"), LAYOUT)
        assert norms.grid == (batch * 131,)
        assert total.grid == (1,)
        assert count.grid == (-(-batch * 261 // 16),)


def test_the_kernels_take_as_many_norms_as_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they run outside these tests, whose programs are small."""
    monkeypatch.undo()
    assert plan.NORMS_OF_A_PROGRAM == 1024
    norms = torch.empty(10, 261).log_normal_(3.0, 1.0)
    into = NormDistribution.zeros((3,), "cpu")
    accumulate(norms, LAYOUT, into, backend="triton")
    assert_same_counts(into._asdict(), counted(norms, LAYOUT), "programs of full size")


class TestOps:
    @pytest.mark.parametrize("skip", [False, True])
    def test_accumulation(self, skip: bool) -> None:
        of_layers = NormDistribution.zeros((2, 3), "cpu")
        norms = make_call(Spec(norms=True))["x"]
        for into in (NormDistribution.zeros((3,), "cpu"), NormDistribution(*(x[1] for x in of_layers))):
            opcheck(OPS.accumulate_token_norms.default, (norms, 1, 4, *into, skip, "triton"))


class TestAddresses:
    """Index arithmetic beyond 2^31 elements, in memory of which only the pages that hold a value are committed."""

    def test_strides_of_a_distribution(self) -> None:
        far = 2**30 + 64
        call = make_call(Spec(norms=True))
        zeros = NormDistribution.zeros((3,), "cpu")
        into = []
        for x in zeros:
            memory = torch.empty(2 * far + 2**20, dtype=x.dtype)
            into.append(memory.as_strided(x.shape, (far, 1), 0))
            into[-1].copy_(x)
        accumulate(call["x"], call["layout"], NormDistribution(*into), backend="triton")
        assert_same_counts(NormDistribution(*into)._asdict(), counted(call["x"], call["layout"]), "far apart")
