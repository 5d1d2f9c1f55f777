"""`make gpu DRY=1` with its real stages and our kernels in the interpreter: cut in the middle, then gone on with."""

from __future__ import annotations

from collections import Counter

import pytest

from benchmarks import results
from benchmarks.gpu import __main__ as driver
from benchmarks.gpu import calls, race, worker
from benchmarks.gpu.stage import DEFAULT, load


def of_kind(path, kind):
    return [row for row in results.load(path) if row["kind"] == kind]


@pytest.mark.slow
def test_a_dry_run_of_the_default_stages(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the benchmark's own package: pip install 'vitreg_kernels[bench]'")
    arguments = ["--stages", ",".join(DEFAULT), "--dry-run", "--results", str(tmp_path)]
    load()  # every stage, with the functions that it takes of others as they are
    # Of every layout and mode one, as each case takes the interpreter seconds.
    competitions = race._cases
    monkeypatch.setattr(race, "_cases", lambda setup: competitions(setup)[::4])
    compete, raced = race.race, []

    def cut(case, *rest):
        if len(raced) == 1:
            raise KeyboardInterrupt
        raced.append(case)
        return compete(case, *rest)

    monkeypatch.setattr(race, "race", cut)
    assert worker.main(arguments) == worker.CUT
    (path,) = tmp_path.glob("*.json")
    left = results.load(path)
    before = {"environment", "roofline", "smoke", "memcheck", "accuracy"}
    assert {row["kind"] for row in left} == {*before, "race", "stage"}

    monkeypatch.setattr(race, "race", compete)
    capsys.readouterr()
    status = worker.main(arguments)
    assert status == 0, capsys.readouterr().err
    assert driver.main(["--report", str(path)]) == 0
    told = capsys.readouterr()
    rows = results.load(path)
    assert rows[: len(left)] == left
    for kind in ("accuracy", "race", "outputs", "norm_accuracy", "residual_norm", "model"):
        assert any(row["kind"] == kind for row in rows), kind
    # Nothing was done twice.
    counts = Counter((row["backend"], row["case"], row["dtype"]) for row in of_kind(path, "accuracy"))
    assert set(counts.values()) == {1}
    assert {(row["layout"], row["mode"]) for row in of_kind(path, "race") if row["ours"]} == {
        ("packed", "forward"),
        ("separate", "backward"),
        ("multicrop", "forward+backward"),
    }
    names = ("variant", "layout", "mode")
    counts = Counter(tuple(row[name] for name in names) for row in of_kind(path, "race"))
    assert set(counts.values()) == {1}
    # Our kernels took part, in every way.
    served = [row for row in of_kind(path, "accuracy") if row["backend"] == "triton" and row["errors"]]
    assert {row["dtype"] for row in served} == {"fp16", "fp32", "tf32"}
    assert all(row["deterministic"] and "training grad_key" in row["errors"] for row in served)
    norms = [row for row in of_kind(path, "norm_accuracy") if row["backend"].endswith(":triton")]
    assert {row["backend"].partition(":")[0] for row in norms} == {op.name for op in calls.OPS}
    assert all(row["deterministic"] and row["errors"] for row in norms)
    last = {row["stage"]: row for row in of_kind(path, "stage")}
    assert last.keys() == set(DEFAULT)
    assert all(row["unfinished"] == 0 and row["error"] is None for row in last.values())
    for ending in (".md", ".png"):
        assert path.with_suffix(ending).stat().st_size > 0
    assert "DRY RUN" in told.out
    assert "DRY RUN" in path.with_suffix(".md").read_text()
