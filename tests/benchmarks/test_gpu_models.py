"""Whole models of `make gpu`, rehearsed on tiny ones: same weights, right features, and nothing wrong goes unnamed."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import SDPBackend

from benchmarks import results, timm_vits
from benchmarks.gpu import compiled, models, pieces
from benchmarks.gpu.stage import Setup
from benchmarks.results import Writer
from benchmarks.timm_vits import build, with_attention
from vitreg_kernels import RegisterAttention
from vitreg_kernels.measure.race import Stopped
from vitreg_kernels.ops.attention.backends import sdpa

try:
    timm_vits.import_timm()
except ModuleNotFoundError as error:
    pytest.skip(str(error), allow_module_level=True)

CPU = torch.device("cpu")
DRY = Setup(CPU, dry=True, deadline=math.inf)
TRAINING, FORWARD, *_ = models.pieces_of(DRY, compiled=False)
MEASURED = models._MEASURED


@pytest.fixture
def writer(tmp_path, machine) -> Writer:
    return Writer(tmp_path / "run.json", {"command": "gpu"}, machine)


@pytest.fixture
def only(monkeypatch):
    """Leaves these pieces of work alone."""

    def only(*pieces):
        monkeypatch.setattr(models, "pieces_of", lambda setup, *, compiled: list(pieces))

    return only


@pytest.fixture
def wrong(change_backends):
    """SDPA inside vitreg_kernels gives a slightly wrong output; timm's own SDPA is left alone."""
    forward = sdpa.forward

    def slightly_wrong(inputs):
        result = forward(inputs)
        return result._replace(output=result.output * 1.05)

    change_backends("sdpa", forward=slightly_wrong)


def test_a_kernel_that_the_smoke_test_found_wrong_is_in_no_model(writer, only, monkeypatch):
    only(FORWARD)
    monkeypatch.setattr(models.smoke, "against", lambda backend, *_, **__: "is wrong" if backend == "triton" else None)
    rows = by_attention(models.run(DRY, writer))
    assert rows["vitreg: triton"]["reason"] == "is wrong"
    assert rows["vitreg: default"]["reason"] is None
    assert models.failures(list(rows.values())) == []


def by_attention(rows):
    return {row["attention"]: row for row in rows}


def test_a_dry_run_measures_every_model_in_every_way(writer, monkeypatch, dynamo, capsys):
    assert (models.unfinished(DRY, writer), compiled.unfinished(DRY, writer)) == (4, 2)
    rows = [*models.run(DRY, writer), *compiled.run(DRY, writer)]
    assert (models.unfinished(DRY, writer), compiled.unfinished(DRY, writer)) == (0, 0)
    assert models.failures(rows) == compiled.failures(rows) == []
    assert rows == results.load(writer.path)
    ran = [row for row in rows if row["reason"] is None]
    assert len({(row["model"], row["mode"], row["compiled"]) for row in ran}) == 6
    assert {row["attention"] for row in ran} == {"own: flash", "vitreg: default"}
    assert {row["tokens"] for row in ran} == {21, 17}
    for row in ran:
        assert row["best_own"] == "own: flash"
        assert set(row["errors"]) == ({"features", "grad_qkv"} if row["mode"] == "training" else {"features"})
        own = next(r for r in ran if r["attention"] == "own: flash" and same_piece(r, row))
        assert row["speedup"] == own["median_ms"] / row["median_ms"]
        assert row["images_per_s"] == pytest.approx(1e3 * row["batch"] / row["median_ms"])
    # Compiled, only the fastest of the model's own races again.
    assert {row["attention"] for row in rows if not row["compiled"]} == {
        *models._OWN,
        "vitreg: default",
        "vitreg: triton",
    }
    assert {row["attention"] for row in rows if row["compiled"]} == {"own: flash", "vitreg: default", "vitreg: triton"}
    for row in rows:
        if row["reason"] is not None:
            assert not row["failed"]
            assert all(row[name] is None for name in MEASURED)
    assert {row["reason"] for row in rows if row["attention"] == "vitreg: triton"} == {"runs on cuda, not on cpu"}
    goals = {(row["attention"], row["mode"], row["compiled"]) for row in rows if row["goal"] == 1.15}
    assert goals == {("vitreg: default", "training", False), ("vitreg: triton", "training", False)}
    assert capsys.readouterr().out.count("\n") == 6


def same_piece(a, b):
    return all(a[name] == b[name] for name in ("model", "mode", "compiled"))


def test_swapped_attention_holds_the_same_parameters():
    module = build(TRAINING.model, CPU, torch.bfloat16)
    weights = {id(p) for p in module.parameters()}
    for contender in models.contenders(module, ("own: flash",)):
        if contender.name == "vitreg: triton":
            continue
        tree = with_attention(module, contender.place)
        assert {id(p) for p in tree.parameters()} == weights
        kinds = {type(block.attn) for block in tree.blocks}
        assert kinds == {RegisterAttention if contender.ours else models._Under}
    attention = tree.blocks[0].attn
    assert attention.layout.num_registers == 4
    assert attention.layout.num_prefix_tokens == module.num_prefix_tokens
    assert all(type(block.attn) is not RegisterAttention for block in module.blocks), "the model itself was changed"


def test_training_changes_no_weights():
    """Or each contender would train from where the last one stopped."""
    module = build(TRAINING.model, CPU, torch.bfloat16)
    before = [p.clone() for p in module.parameters()]
    task = models._task(module, TRAINING, CPU)
    models._call(module.train(), task, task.images)
    assert task.optimizer.state, "the optimizer did no work"
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("piece", [TRAINING, FORWARD], ids=["training", "forward"])
def test_a_wrong_swapped_attention_fails(writer, only, wrong, piece):
    only(piece)
    rows = by_attention(models.run(DRY, writer))
    assert not rows["vitreg: default"]["errors"]["features"]["passed"]
    assert rows["own: flash"]["errors"]["features"]["passed"]
    sentences = models.failures(writer.rows)
    assert len(sentences) == len(rows["vitreg: default"]["errors"])
    assert all("vitreg: default: " in s and piece.mode in s and " off (mean " in s for s in sentences)


def test_a_wrong_gradient_alone_fails(writer, only, change_backends):
    only(TRAINING)
    forward = sdpa.forward

    def wrong_backward(inputs):
        result = forward(inputs)
        output = result.output
        return result._replace(output=1.05 * output - 0.05 * output.detach())

    change_backends("sdpa", forward=wrong_backward)
    errors = by_attention(models.run(DRY, writer))["vitreg: default"]["errors"]
    assert errors["features"]["passed"]
    assert not errors["grad_qkv"]["passed"]
    (sentence,) = models.failures(writer.rows)
    assert "grad_qkv" in sentence


@pytest.mark.parametrize(
    ("error", "failed", "told"),
    [
        (IndexError("out of its bounds"), True, "out of its bounds"),
        (torch.OutOfMemoryError("tried to allocate 7 GiB"), False, "ran out of memory at a batch of 3"),
    ],
    ids=["a crash", "too little memory"],
)
def test_ours_that_stops_has_a_reason_and_the_others_go_on(writer, only, change_backends, error, failed, told):
    only(FORWARD)

    def stop(inputs):
        raise error

    change_backends("sdpa", forward=stop)
    rows = by_attention(models.run(DRY, writer))
    row = rows["vitreg: default"]
    assert told in row["reason"]
    assert row["failed"] is failed
    assert all(row[name] is None for name in MEASURED)
    assert rows["own: flash"]["median_ms"] > 0
    assert len(models.failures(writer.rows)) == failed


def test_own_attention_that_is_wrong_is_no_failure_of_ours(writer, only, monkeypatch):
    only(FORWARD)
    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: 1.05 * attend(*a, **k))
    monkeypatch.setattr(models, "register_attention", lambda module, backend, own: timm_vits.formula(own))
    rows = by_attention(models.run(DRY, writer))
    assert not rows["own: flash"]["errors"]["features"]["passed"]
    assert rows["vitreg: default"]["errors"]["features"]["passed"]
    assert models.failures(writer.rows) == []


@pytest.mark.parametrize("missing", ["timm", "torchvision"])
def test_a_missing_library_is_one_row_a_model(writer, monkeypatch, missing):
    def fail(model, device, dtype):
        raise ModuleNotFoundError(f"No module named '{missing}'")

    monkeypatch.setattr(models, "build", fail)
    rows = list(models.run(DRY, writer))
    assert [(row["attention"], row["mode"], row["compiled"]) for row in rows] == [("any", None, None)] * 2
    assert len({row["model"] for row in rows}) == 2
    assert all(missing in row["reason"] and not row["failed"] for row in rows)
    assert models.unfinished(DRY, writer) == 0
    assert models.failures(rows) == []


def test_a_cut_run_is_gone_on_with(writer, tmp_path, machine, monkeypatch):
    rows = models.run(DRY, writer)
    first = [next(rows), next(rows)]
    rows.close()
    again = Writer(tmp_path / "run.json", {"command": "gpu"}, machine)
    assert again.rows[:2] == first
    assert models.unfinished(DRY, again) == 3
    done = []
    monkeypatch.setattr(models, "_rows", lambda piece, setup, writer: done.append(piece) or [])
    list(models.run(DRY, again))
    assert done == models.pieces_of(DRY, compiled=False)[1:]


def test_nothing_is_begun_after_the_deadline(writer):
    assert list(models.run(DRY._replace(deadline=time.monotonic()), writer)) == []
    assert models.unfinished(DRY, writer) == 4


def test_the_piece_with_the_goal_comes_first_and_is_the_one_that_is_compiled():
    large = [(models._LARGE, "training"), (models._LARGE, "forward")]
    eager, by_compiler = (models.pieces_of(DRY._replace(dry=False), compiled=compiled) for compiled in (False, True))
    assert [(p.model.name, p.mode) for p in eager[:2]] == [(p.model.name, p.mode) for p in by_compiler] == large
    assert len(eager) == 8
    first = eager[0]
    assert models._GOALS[first.model.name, first.mode, first.compiled] == 1.15


def test_blocks_share_one_graph_and_contenders_none(dynamo, monkeypatch):
    """Or compiling would take minutes, and cuDNN's blocks would run flash."""
    module = build(TRAINING.model, CPU, torch.bfloat16)
    monkeypatch.setitem(models._OWN, "own: math", SDPBackend.MATH)
    counter = CompileCounter()
    monkeypatch.setattr(torch.nn.Module, "compile", compile_with(counter))
    piece = FORWARD._replace(compiled=True)
    images = torch.randn(2, 3, 56, 56, dtype=torch.bfloat16)
    for graphs, contender in enumerate(models.contenders(module, ("own: flash", "own: math"))[:3], 1):
        with contender.context(), torch.inference_mode():
            models._tree(module, contender, piece, DRY)(images)
        assert counter.frame_count == graphs


def compile_with(backend):
    compiling = torch.nn.Module.compile

    def compile(module, **options):
        assert options["fullgraph"]
        compiling(module, **options | {"backend": backend})

    return compile


@pytest.mark.parametrize("late", [False, True])
def test_after_a_kernel_that_broke_the_gpu_nothing_runs(writer, only, monkeypatch, late, change_backends):
    only(FORWARD)
    monkeypatch.setattr(models, "_OWN", {"own: flash": models._OWN["own: flash"]})
    attempt, attempted, broken = models._attempt, [], []
    forward = sdpa.forward

    def breaks(inputs):
        broken.append(True)
        if not late:
            raise RuntimeError("an illegal memory access was encountered")
        return forward(inputs)

    def spy(contender, *rest):
        attempted.append(contender.name)
        return attempt(contender, *rest)

    change_backends("sdpa", forward=breaks)
    monkeypatch.setattr(models, "_attempt", spy)
    for module in (models, pieces):
        monkeypatch.setattr(module, "lost", lambda device: bool(broken))

    def interleave(variants, *_, **__):
        assert not variants, "a call would fail"
        return {}

    monkeypatch.setattr(models.timing, "interleave", interleave)
    with pytest.raises(RuntimeError, match="cannot be used any more"):
        list(models.run(DRY, writer))
    assert attempted[-1] == "vitreg: default"
    rows = by_attention(writer.rows)
    told = "broke the hold of the GPU" if late else "illegal memory access"
    assert rows["vitreg: default"]["failed"]
    assert told in rows["vitreg: default"]["reason"]
    for name in ("own: flash", "vitreg: triton"):
        assert rows[name]["reason"] == "was not timed, because vitreg: default broke the hold of the GPU"
        assert not rows[name]["failed"]
    assert models.unfinished(DRY, writer) == 0


def test_peak_memory_is_of_one_call(monkeypatch):
    calls = []
    module = build(FORWARD.model, CPU, torch.bfloat16)
    task = models._task(module, FORWARD, CPU)._replace(images=SimpleNamespace(device=torch.device("cuda")))
    monkeypatch.setattr(models, "_results", lambda *_: task.exact | {"features": task.rounded["features"]})
    monkeypatch.setattr(models, "_call", lambda *_: calls.append("call"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1000 + len(calls))
    contender = models.Contender("own: flash", False, lambda a: a)
    ready = models._attempt(contender, module, task)
    assert not isinstance(ready, Stopped)
    assert calls == ["call", "reset", "call"]
    assert ready.peak_memory_bytes == 1003
