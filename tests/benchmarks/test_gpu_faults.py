"""A GPU run in which something breaks in every stage, in processes as they are: each fault is a row, the rest is done.

On a CPU, with tiny shapes; what breaks is pretended by ``faulty_worker``.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.gpu import __main__ as driver
from benchmarks.gpu import stage, watch, worker
from benchmarks.machine import ROOT

stage.load()  # the schema of result files is in the stages
FAULTS = {
    "environment": "hang",  # at unpacking the kernels that were brought along, without which it goes on
    "smoke": "hang",
    "accuracy": "lose",
    "race": "die",
}


def faulty(monkeypatch, faults: dict[str, str]) -> None:
    """Workers that are started from here on break so."""
    script, really = str(Path(__file__).with_name("faulty_worker.py")), watch.watch

    def another(command, mark, end):
        at = command.index("-m")
        return really([*command[:at], script, json.dumps(faults), *command[at + 2 :]], mark, end)

    monkeypatch.setattr(watch, "watch", another)
    monkeypatch.setattr(watch, "_GRACE_S", 0.2)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def only_file(folder: Path) -> Path:
    (file,) = folder.glob("*.json")
    return file


def test_what_hangs_dies_or_loses_the_gpu_is_a_row_and_all_the_rest_is_done(tmp_path, monkeypatch, capsys):
    faulty(monkeypatch, FAULTS)
    kernels = tmp_path / "a.tar.xz"
    kernels.touch()
    asked = ["--dry-run", "--stages", ",".join(FAULTS), "--results", str(tmp_path), "--cache", str(kernels)]
    assert driver.main(asked) == 1
    told = capsys.readouterr()
    rows = results.load(only_file(tmp_path))
    broken = {row["stage"]: row for row in rows if row["kind"] == "broken"}
    assert broken.keys() == FAULTS.keys()
    for name, fault in FAULTS.items():
        told_by = {"hang": "hung, and its process was ended", "die": "died with status -6", "lose": "illegal memory"}
        assert told_by[fault] in broken[name]["reason"]
        assert f"{name}, {broken[name]['piece']}: " in told.err
    assert broken["environment"]["piece"] == "kernels of a.tar.xz"
    last = {row["stage"]: row for row in rows if row["kind"] == "stage"}
    assert all((row["unfinished"], row["error"]) == (0, None) for row in last.values())
    assert {row["kind"] for row in rows} >= {"environment", "roofline", "smoke", "accuracy", "race"}
    assert "## Broken" in only_file(tmp_path).with_suffix(".md").read_text()


@pytest.mark.parametrize("fault", ["hang", "die"])
def test_a_process_that_does_not_come_to_begin_leaves_a_file_that_says_so(tmp_path, monkeypatch, fault):
    faulty(monkeypatch, {"process": fault})
    if fault == "hang":  # at once; what does not is given the time it needs
        monkeypatch.setattr(watch, "BEGIN_S", 2.0)
    assert driver.main(["--dry-run", "--stages", "environment,smoke", "--results", str(tmp_path)]) == 1
    (row,) = results.load(only_file(tmp_path))
    assert (row["kind"], row["stage"]) == ("broken", "process")
    assert row["reason"].startswith("hung" if fault == "hang" else "died with status")


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_leaves_a_valid_file_and_the_next_goes_on(tmp_path, monkeypatch, capfd, how):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    asked = ["--dry-run", "--stages", "environment,accuracy", "--results", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks.gpu", *asked]
    background = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *command]  # where a shell ignores Ctrl-C
    run = subprocess.Popen(background, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    end = time.monotonic() + 60
    while len(list(tmp_path.glob("*.json"))) == 0 and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(random.Random(how).uniform(0.2, 2.0))
    run.send_signal(how)
    run.communicate(timeout=60)
    assert run.returncode == (-how if how == signal.SIGKILL else worker.CUT)
    written = results.load(only_file(tmp_path))
    assert driver.main(asked) == 0
    told = capfd.readouterr().out
    assert f"from row {len(written) + 1} of a cut run" in told
    rows = results.load(only_file(tmp_path))
    assert rows[: len(written)] == written
    assert not [row for row in rows if row["kind"] == "broken"]
    assert "Unfinished" not in told
