"""The race of residual norms: useful bytes, errors of every output and gradient, resumption, and its table."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks import memory, norm_report, norms
from benchmarks.norms import Case
from benchmarks.peers import Peer, attempt
from benchmarks.peers import norms as contenders
from benchmarks.results import Writer
from vitreg_kernels.measure import accuracy, timing
from vitreg_kernels.measure.race import Stopped

CPU = torch.device("cpu")
RUN = {"command": "bench", "size": "quick", "model": "a model"}
FORWARD = Case(48, "fp32", "forward", batch=4, tokens=9)
BACKWARD = Case(48, "fp32", "backward", batch=4, tokens=9)
GRADIENTS = {"grad_x", "grad_branch", "grad_layer_scale", "grad_weight", "grad_bias"}

eager = partial(contenders.eager, rms=False)


@pytest.fixture
def race(monkeypatch):
    """Races for the shortest time."""
    monkeypatch.setattr(timing, "last_level_cache", lambda device: 2**12)

    def run(case, those):
        copies = timing.copies_past_cache(norms.inputs_of(case, CPU), CPU)
        return norms.race(case, those, copies, budget_s=0.0)

    return run


def test_every_width_dtype_and_mode_is_raced_at_the_size_of_the_goal():
    covered = [(c.batch, c.tokens, c.rms, c.memory, c.channels, c.dtype, c.mode) for c in norms.cases(CPU)]
    kinds = memory.choices(CPU)
    grid = itertools.product([False], kinds, (384, 768, 1024, 1536), ("fp32", "bf16"), ("forward", "backward"))
    assert covered == [(64, 261, *case) for case in grid]
    assert {case.norm for case in norms.cases(torch.device("cuda"))} == {"LayerNorm", "RMSNorm"}


def test_useful_bytes_a_token():
    assert Case(384, "bf16", "forward").bytes == 8 * 384 * 64 * 261
    assert Case(384, "bf16", "backward").bytes == 12 * 384 * 64 * 261
    assert Case(384, "fp32", "backward").bytes == 24 * 384 * 64 * 261


@pytest.mark.parametrize("rms", [False, True])
def test_the_contenders_agree_or_refuse_in_their_own_words(rms):
    case = BACKWARD if not rms else Case(48, "fp32", "backward", rms=True, batch=4, tokens=9)
    copy = norms.inputs_of(case, CPU)()
    answers = {p.name: attempt(p, norms.job, *copy) for p in contenders.peers(rms=rms) if p.name != "torch:compile"}
    expected = answers["vitreg:reference"]
    assert expected.keys() == {"residual", "normalized", "token_norms", *GRADIENTS} - ({"grad_bias"} if rms else set())
    stopped = {name: answer for name, answer in answers.items() if isinstance(answer, Stopped)}
    for name in answers.keys() - stopped.keys():
        torch.testing.assert_close(answers[name], expected, rtol=1e-4, atol=1e-4)
    assert {"vitreg:composite", "eager"} <= answers.keys() - stopped.keys()
    assert stopped["xformers"].reason == ("runs on cuda, not on cpu" if rms else "has rms_norm_add, and no LayerNorm")
    assert not any(answer.failed for answer in stopped.values())


def test_the_compiled_contender_is_the_eager_one_compiled_whole(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: asked.append((function, options)) or function)
    contenders._compiler.cache_clear()
    try:
        (peer,) = (p for p in contenders.peers(rms=False) if p.name == "torch:compile")
        copy = norms.inputs_of(FORWARD, CPU)()
        assert not isinstance(attempt(peer, norms.job, *copy), Stopped)
    finally:
        contenders._compiler.cache_clear()
    assert asked == [(contenders.eager, {"dynamic": False, "fullgraph": True})]


def test_xformers_norms_what_it_adds_up_beside_its_input(monkeypatch):
    """By a stand-in that does what it documents: adds in place, and gives the norm."""

    def rms_norm_add(x, y, weight, eps):
        x += y
        return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)

    xformers = pytest.importorskip("xformers.ops.rmsnorm")
    monkeypatch.setattr(xformers, "rms_norm_add", rms_norm_add)
    copy = norms.inputs_of(Case(48, "fp32", "forward", rms=True, batch=4, tokens=9), CPU)()
    before = [x.clone() for x in copy]
    expected = norms.job(partial(contenders.eager, rms=True), *copy)
    torch.testing.assert_close(norms.job(contenders._xformers, *copy), expected)
    assert all(map(torch.equal, copy, before))


def test_figures_follow_from_the_median(race):
    for case in (FORWARD, BACKWARD):
        ours, peer = race(case, [Peer("vitreg:ours", eager, ours=True), Peer("other", eager)])
        for row in (ours, peer):
            assert row["gbps"] == pytest.approx(case.bytes / row["median_ms"] * 1e-6)
            assert row["copy_fraction"] == pytest.approx(row["gbps"] / row["copy_gbps"])
            assert row["best_peer"] == "other"
        assert ours["speedup"] == pytest.approx(peer["median_ms"] / ours["median_ms"])


def test_the_forward_is_outside_the_clock_of_a_backward(race, monkeypatch):
    variants = []
    interleave = timing.interleave
    monkeypatch.setattr(timing, "interleave", lambda v, *a, **k: variants.append(v) or interleave(v, *a, **k))
    race(BACKWARD, [Peer("other", eager)])
    race(FORWARD, [Peer("other", eager)])
    assert [v["other"].prepare is None for v in variants if "other" in v] == [False, True]


def test_before_each_call_into_fresh_memory_what_is_free_is_given_back(race, monkeypatch):
    events = []
    monkeypatch.setattr(memory, "give_back", lambda: events.append("given back"))

    def attend(*inputs):
        events.append("called")
        return eager(*inputs)

    race(replace(FORWARD, memory="fresh"), [Peer("other", attend)])
    checked, *timed = events
    assert checked == "called"
    assert timed == ["given back", "called"] * (1 + timing.MIN_SAMPLES)
    events.clear()
    race(FORWARD, [Peer("other", attend)])
    assert set(events) == {"called"}


@pytest.mark.parametrize("image", [0, 1, 3])
@pytest.mark.parametrize("output", [0, 1, 2])
def test_a_wrong_output_shows_in_the_first_and_the_last_image(race, image, output):
    def attend(*inputs):
        outputs = [x.clone() for x in eager(*inputs)]
        outputs[output][image] *= 1.01
        return tuple(outputs)

    (row,) = race(FORWARD, [Peer("wrong", attend)])
    broken = {name for name, error in row["errors"].items() if not error["passed"]}
    assert broken == (set() if image == 1 else {("residual", "normalized", "token_norms")[output]})


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return 1.01 * grad


@pytest.mark.parametrize("place", range(5))
def test_a_wrong_gradient_shows(race, place):
    def attend(*inputs):
        inputs = list(inputs)
        inputs[place] = Scaled.apply(inputs[place])
        return eager(*inputs)

    (row,) = race(BACKWARD, [Peer("wrong", attend)])
    wanted = f"grad_{('x', 'branch', 'layer_scale', 'weight', 'bias')[place]}"
    assert {name for name, error in row["errors"].items() if not error["passed"]} == {wanted}


def test_sums_over_tokens_are_judged_as_sums(race, monkeypatch):
    compare, seen = accuracy.compare, []

    def watch(actual, *rest, terms, **options):
        seen.append(terms)
        return compare(actual, *rest, terms=terms, **options)

    monkeypatch.setattr(accuracy, "compare", watch)
    race(BACKWARD, [Peer("other", eager)])
    # Outputs, the gradients of x and the branch, and those of the parameters.
    assert seen == [48] * 5 + [48 + 2 * 9] * 3


def test_a_cut_race_goes_on_where_it_stopped(tmp_path, monkeypatch, machine):
    monkeypatch.setattr(timing, "last_level_cache", lambda device: 2**12)
    todo = [FORWARD, BACKWARD, replace(FORWARD, channels=16), replace(FORWARD, memory=memory.choices(CPU)[0])]
    monkeypatch.setattr(norms, "cases", lambda device: todo)
    monkeypatch.setattr(norms, "_BUDGET_S", {"quick": 0.0})
    monkeypatch.setattr(contenders, "peers", lambda rms: [Peer("vitreg:ours", eager, ours=True), Peer("other", eager)])
    path, progress = tmp_path / "run.json", []

    def rows_of_run():
        return norms.run("quick", Writer(path, RUN, machine), lambda *p: progress.append(p), CPU)

    for row in rows_of_run():
        if row["mode"] == "backward":
            break
    progress.clear()
    rows = list(rows_of_run())
    found = [(row["channels"], row["mode"], row["memory"]) for row in rows[::2]]
    assert found == [(c.channels, c.mode, c.memory) for c in todo]
    assert len(rows) == len(Writer(path, RUN, machine).rows) == 2 * len(todo)
    assert progress == [*((i, 4, str(case)) for i, case in enumerate(todo)), (4, 4, "")]


def test_the_table(race):
    those = [
        Peer("vitreg:ours", eager, ours=True),
        Peer("other", lambda *inputs: tuple(1.01 * x for x in eager(*inputs))),
        Peer("third", eager, refuses=lambda *inputs: "has no kernel. Really"),
    ]
    other = {"kind": "from another module"}
    rows = [row for case in (FORWARD, BACKWARD) for row in race(case, those)]
    ours = rows[0] | {"median_ms": 2.0, "p20_ms": 1.5, "p80_ms": 3.0, "gbps": 10.0, "speedup": 1.5}
    ours |= {"copy_gbps": 20.0, "copy_fraction": 0.5}
    kept = [row | {"memory": "kept"} for row in rows]
    text = norm_report.table([other, ours, *rows[1:], *kept])
    assert "4 x 9 tokens\n" in text
    assert "LayerNorm, C = 48, results wherever the allocator puts them\n" in text
    assert "LayerNorm, C = 48, results in memory kept from earlier calls\n" in text
    assert "; copy 20 GB/s\n" in text
    assert text.index(" fp32 forward") < text.index(" fp32 backward")
    line = next(line for line in text.splitlines() if "vitreg:ours" in line)
    assert line.split()[1:6] == ["2", "1.5-3", "10", "50.0%", "1.50"]
    assert sum(line.endswith("FAIL") for line in text.splitlines() if "other" in line) == 4
    assert "  third             every case: has no kernel\n" in text + "\n"
    assert max(map(len, text.splitlines())) <= 100
    assert norm_report.table([other]) == ""
