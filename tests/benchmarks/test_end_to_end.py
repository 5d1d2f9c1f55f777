"""Whole ViTs of timm's: same weights, right features, nothing wrong goes unnamed, and one refusal without timm."""

from __future__ import annotations

import builtins

import pytest
import torch

from benchmarks import end_to_end, results, timm_vits, torchvision_beside_torch
from benchmarks.end_to_end import OWN, Piece
from benchmarks.results import Writer
from benchmarks.timm_vits import Model
from vitreg_kernels.ops.attention.backends import sdpa

RUN = {"command": "bench", "size": "quick", "model": "a model"}
TINY = Model("vit_small_patch14_reg4_dinov2", 3, {"img_size": 56, "embed_dim": 48, "depth": 2, "num_heads": 3})


@pytest.fixture
def timm():
    try:
        return timm_vits.import_timm()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def by_sdpa(monkeypatch):
    """Whatever a call gets by default here."""
    monkeypatch.setattr(end_to_end, "backends", lambda own: ["sdpa", "triton"])


def measured(dtype="fp32", *, compiled=False):
    rows = end_to_end.measure(Piece(TINY, compiled, dtype), budget_s=0.0)
    return {row["attention"]: row for row in rows}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_both_are_measured_and_right(timm, machine, dtype):
    rows = measured(dtype)
    assert list(rows) == [OWN, "vitreg:sdpa", "vitreg:triton"]
    for row in rows.values():
        results.validate(row | {"machine": machine})
        assert row["tokens"] == 4 * 4 + 5
        assert row["goal"] == (1.2 if row["ours"] and dtype == "bf16" else None)
    for row in (rows[OWN], rows["vitreg:sdpa"]):
        assert row["errors"]["features"]["passed"]
        assert row["speedup"] == rows[OWN]["median_ms"] / row["median_ms"]
        assert row["images_per_s"] == pytest.approx(3e3 / row["median_ms"])
    assert rows["vitreg:triton"]["reason"] == "runs on cuda, not on cpu"
    assert not rows["vitreg:triton"]["failed"]
    assert all(rows["vitreg:triton"][name] is None for name in end_to_end._MEASURED)


def test_a_wrong_attention_shows_and_a_broken_one_is_ours(timm, change_backends):
    forward = sdpa.forward

    def slightly_wrong(inputs):
        result = forward(inputs)
        return result._replace(output=1.05 * result.output)

    change_backends("sdpa", forward=slightly_wrong)
    rows = measured()
    assert rows[OWN]["errors"]["features"]["passed"]
    assert not rows["vitreg:sdpa"]["errors"]["features"]["passed"]
    assert "FAIL" in end_to_end.table(list(rows.values())).splitlines()[2]

    def crash(inputs):
        raise IndexError("out of its bounds")

    change_backends("sdpa", forward=crash)
    row = measured()["vitreg:sdpa"]
    assert row["failed"]
    assert "out of its bounds" in row["reason"]


def test_compiled_each_block_is_compiled(timm, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append((type(self), options)))
    assert measured(compiled=True)["vitreg:sdpa"]["compiled"]
    blocks = [kind.__name__ for kind, _ in compiled]
    assert len(blocks) == 2 * 2  # two blocks of two models: the third has no attention to compile
    assert all("Block" in name for name in blocks)
    assert all(options == {"fullgraph": True, "dynamic": False} for _, options in compiled)
    compiled.clear()
    measured()
    assert compiled == []


def test_without_timm_there_is_one_refusal(monkeypatch, machine):
    importing = builtins.__import__

    def without_timm(name, *rest):
        if name == "timm":
            raise ModuleNotFoundError("No module named 'timm'")
        return importing(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_timm)
    (row,) = end_to_end.measure(Piece(TINY, False, "bf16"), budget_s=0.0)
    results.validate(row | {"machine": machine})
    assert row["attention"] == "any"
    assert row["reason"] == "ModuleNotFoundError: No module named 'timm'"
    assert not row["failed"]
    assert "not run: ModuleNotFoundError: No module named 'timm'" in end_to_end.table([row])


def test_timm_is_imported_where_torchvision_cannot_load_its_operators(timm, monkeypatch):
    """Declared only where they are missing."""
    declared = []
    monkeypatch.setattr(torch.library, "define", lambda name, schema: declared.append(name))
    assert timm_vits.import_timm() is timm
    assert declared == []
    monkeypatch.setattr(torch.ops, "torchvision", object())
    monkeypatch.setattr(torchvision_beside_torch, "_brings_them", lambda folder: False)
    assert timm_vits.import_timm() is timm
    assert declared == ["torchvision::nms", "torchvision::qnms"]


def test_the_sizes():
    (quick,) = end_to_end.pieces("quick")
    full = end_to_end.pieces("full")
    assert quick in full
    assert (quick.dtype, quick.compiled) == ("bf16", False)
    assert len(full) == len(set(map(str, full))) == 8
    assert {piece.model.batch for piece in full} == {8}
    assert {piece.model.options["img_size"] for piece in full} == {224}


def test_a_cut_run_goes_on_where_it_stopped(tmp_path, machine, monkeypatch):
    todo = [Piece(TINY, compiled, dtype) for compiled in (False, True) for dtype in ("fp32", "bf16")]
    monkeypatch.setattr(end_to_end, "pieces", lambda size: todo)
    monkeypatch.setattr(end_to_end, "build", lambda *_: (_ for _ in ()).throw(ModuleNotFoundError("no timm")))
    path, progress, asked = tmp_path / "run.json", [], []

    def rows_of_run():
        return end_to_end.run("quick", Writer(path, RUN, machine), lambda *p: progress.append(p))

    run = rows_of_run()
    first = [next(run), next(run)]
    measure = end_to_end.measure
    monkeypatch.setattr(end_to_end, "measure", lambda piece, budget_s: asked.append(piece) or measure(piece, budget_s))
    progress.clear()
    rows = list(rows_of_run())
    assert rows[:2] == first
    assert asked == todo[2:]
    assert progress == [*((i, 4, str(piece)) for i, piece in enumerate(todo)), (4, 4, "")]


def test_the_table(timm):
    rows = list(measured("bf16").values())
    rows[1] |= {"speedup": 1.0}
    text = end_to_end.table([*rows, {"kind": "from another module"}])
    lines = text.splitlines()
    assert lines[0] == "vit_small_patch14_reg4_dinov2, bf16, eager, 3 images x 21 tokens (goal: x 1.2)"
    assert "x 1.00" in lines[1]
    assert lines[2].endswith("BELOW THE GOAL")
    assert "not run: runs on cuda" in lines[3]
    assert max(map(len, lines)) <= 100
    assert end_to_end.table([]) == ""
