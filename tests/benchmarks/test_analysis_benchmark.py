"""An analysis raced against timm's way: rows that a cut run goes on with, memory of a process, a wrong map shows."""

from __future__ import annotations

import sys
from functools import partial

import pytest

from benchmarks import analysis, results
from tests.integrations.patching.small_vit import vit
from vitreg_kernels.ops.attention.backends import sdpa

pytest.importorskip("timm")
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads a process's memory as Linux gives it")


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the benchmark of a model, in a folder of its own."""
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(sys, "argv", ["analysis", "--budget", "0"])

    def run(**options) -> int:
        monkeypatch.setattr(analysis, "build", partial(vit, depth=2, **options))
        return analysis.main()

    return run


@linux
def test_both_ways_are_a_row_and_only_the_probabilities_of_one_are_in_memory(run, tmp_path, monkeypatch, capsys):
    finish = results.Writer.finish
    monkeypatch.setattr(results.Writer, "finish", lambda self: None)  # cut before its end
    blocks, batch, heads, tokens = 2, 2, 8, 5 + 19**2
    status = run(img_size=266, num_heads=heads)
    assert status == 0, capsys.readouterr().out
    (file,) = tmp_path.glob("*-analysis.json")
    record, extract = rows = results.load(file)
    assert [row["way"] for row in rows] == ["record", "AttentionExtract"]
    assert all((row["batch"], row["tokens"]) == (batch, tokens) for row in rows)
    assert record["speedup"] == extract["median_ms"] / record["median_ms"]
    probabilities = blocks * batch * heads * tokens**2 * 4
    assert extract["peak_memory_bytes"] > probabilities
    assert 0 < record["peak_memory_bytes"] < extract["peak_memory_bytes"] - probabilities / 2
    monkeypatch.setattr(results.Writer, "finish", finish)
    monkeypatch.setattr(analysis, "race", None)  # called again, it would raise
    assert run(img_size=266, num_heads=heads) == 0
    assert results.load(file) == rows


def test_a_wrong_map_shows(run, monkeypatch, change_backends, capsys):
    monkeypatch.setattr(analysis, "peak_memory", lambda build, way: 1)
    forward = sdpa.BACKEND.forward

    def slightly_wrong(inputs):
        result = forward(inputs)
        received = result.statistics.received_attention * 1.001
        return result._replace(statistics=result.statistics._replace(received_attention=received))

    change_backends("sdpa", forward=slightly_wrong)
    assert run(img_size=56) == 1
    (failed,) = [line for line in capsys.readouterr().out.splitlines() if "FAIL" in line]
    assert failed.startswith("record ")
    assert failed.count("FAIL") == 1
