"""Patched models raced against themselves: rows that a cut run goes on with, and a wrong kernel that shows."""

from __future__ import annotations

import sys
from functools import partial

import pytest

from benchmarks import patched, results
from tests.integrations.patching.small_vit import vit
from vitreg_kernels.ops.attention.backends import sdpa

pytest.importorskip("timm")


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """One model that takes no time, and a folder of its own."""
    model = patched.Model("timm tiny", partial(vit, img_size=224, depth=1), 256)
    monkeypatch.setattr(patched, "MODELS", (model,))
    monkeypatch.setattr(patched, "_BATCH", 1)
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "argv", ["patched", "--budget", "0"])
    return tmp_path


def test_every_way_of_every_race_is_a_row_and_a_cut_run_is_gone_on_with(tiny, monkeypatch, capsys):
    race, raced = patched.race, []
    monkeypatch.setattr(patched, "race", lambda *asked: raced.append(asked[1:3]) or race(*asked))
    finish = results.Writer.finish
    monkeypatch.setattr(results.Writer, "finish", lambda self: None)  # cut before its end
    assert patched.main() == 0
    (file,) = tiny.glob("*-patched.json")
    before = results.load(file)
    assert [(row["way"], row["backend"]) for row in before] == [
        ("unpatched", ""),
        ("attention", "sdpa"),
        ("block", "sdpa"),
    ] * 4
    assert {(row["dtype"], row["mode"]) for row in before} == set(raced)
    monkeypatch.setattr(results.Writer, "finish", finish)
    assert patched.main() == 0
    assert len(raced) == 4
    assert results.load(file) == before
    assert capsys.readouterr().out.count("timm tiny") == 24


def test_a_wrong_kernel_shows(tiny, change_backends, capsys):
    forward = sdpa.BACKEND.forward

    def slightly_wrong(inputs):
        result = forward(inputs)
        return result._replace(output=result.output * 1.1)

    change_backends("sdpa", forward=slightly_wrong)
    assert patched.main() == 1
    assert capsys.readouterr().out.count("FAIL") == 8  # both levels, not the model as it is
