"""A process that hangs, dies or is ended: what it was doing is known, and nothing of it stays behind."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.gpu import watch
from benchmarks.gpu.watch import Mark
from benchmarks.machine import ROOT

# The module by itself: its package, and the module that it has ROOT of, import torch, which takes seconds.
_IMPORT = f"""
import importlib.util, pathlib, signal, subprocess, sys, time, types
sys.modules["benchmarks.machine"] = types.SimpleNamespace(ROOT={str(ROOT)!r})
spec = importlib.util.spec_from_file_location("watch", {watch.__file__!r})
watch = sys.modules["watch"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(watch)
assert "torch" not in sys.modules
"""
# As a worker begins: told where its marks go, it leaves one, and tells of a process that it has started itself.
_BEGIN = f"""{_IMPORT}
path = pathlib.Path(sys.argv[1])
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
path.with_suffix(".child").write_text(str(child.pid))
watch.end_with_watcher()
def mark(piece, seconds):
    watch.Mark("run.json", "race", piece, time.monotonic() + seconds).write(path)
"""
_HANG = """
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # as in a call of CUDA that does not return
mark("N=261", 0.5)
time.sleep(60)
"""


@pytest.fixture
def path(tmp_path) -> Path:
    """Of the marks; the first is of whoever watches."""
    path = tmp_path / "mark.json"
    Mark(None, None, "importing torch").write(path)
    return path


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(watch, "_GRACE_S", 0.3)
    monkeypatch.setattr(watch, "_LOOK_S", 0.05)


def program(text: str, path: Path) -> list[str]:
    return [sys.executable, "-c", _BEGIN + text, str(path)]


def gone(path: Path) -> bool:
    """Whether the child of a process is, in a moment at most, long before it would end by itself."""
    pid = int(path.with_suffix(".child").read_text())
    return soon(lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2])


def soon(holds: Callable[[], bool]) -> bool:
    end = time.monotonic() + 30
    while not holds() and time.monotonic() < end:
        time.sleep(0.05)
    return holds()


def test_one_that_ends_by_itself_is_left_to_it(path):
    ended = watch.watch(program("mark(None, 60); child.kill(); sys.exit(75)", path), path, math.inf)
    assert (ended.code, ended.why) == (75, "by itself")
    assert ended.mark.stage == "race"


def test_one_that_hangs_is_ended_with_all_that_it_started(path):
    start = time.monotonic()
    ended = watch.watch(program(_HANG, path), path, math.inf)
    assert (ended.code, ended.why) == (-signal.SIGKILL, "hung")
    assert ended.mark[:3] == ("run.json", "race", "N=261")
    assert time.monotonic() - start < 30
    assert gone(path)


def test_one_that_hears_is_told_first_and_may_end_as_by_hand(path, monkeypatch):
    monkeypatch.setattr(watch, "_GRACE_S", 20.0)
    text = "mark('N=261', 0.2)\ntry: time.sleep(60)\nexcept KeyboardInterrupt: sys.exit(130)"
    ended = watch.watch(program(text, path), path, math.inf)
    assert (ended.code, ended.why) == (130, "hung")
    assert gone(path)


def test_at_the_end_of_all_time_nothing_is_blamed(path):
    ended = watch.watch(program("mark('N=261', 600)\ntime.sleep(60)", path), path, time.monotonic() + 4)
    assert ended.why == "time"
    assert gone(path)


def test_one_that_dies_is_known_by_its_signal(path):
    ended = watch.watch(program("mark('N=261', 60); import os; os.abort()", path), path, math.inf)
    assert (ended.code, ended.why, ended.mark.piece) == (-signal.SIGABRT, "by itself", "N=261")
    assert gone(path)


def test_one_that_never_came_to_say_what_it_does(path):
    first = watch.read(path)
    assert watch.watch([sys.executable, "-c", "raise SystemExit(2)"], path, math.inf) == (2, first, "by itself")


def test_one_that_hangs_before_it_comes_to_say_what_it_does(path):
    first = Mark(None, None, "importing torch", time.monotonic() + 0.5)
    first.write(path)
    ended = watch.watch([sys.executable, "-c", "import time; time.sleep(60)"], path, math.inf)
    assert (ended.why, ended.mark) == ("hung", first)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_whoever_watches_takes_it_along(path, how):
    watching = f"""{_IMPORT}
watch._GRACE_S = 0.3
watch.watch({program(_HANG.replace("0.5", "60"), path)!r}, pathlib.Path({str(path)!r}), float("inf"))
"""
    process = subprocess.Popen([sys.executable, "-c", watching], cwd=ROOT, stderr=subprocess.DEVNULL)
    assert soon(lambda: watch.read(path).stage is not None)
    os.kill(process.pid, how)
    process.wait(10)
    assert gone(path)


def test_a_mark_is_read_as_it_was_written(path):
    mark = Mark("run.json", "race", None, math.inf)
    mark.write(path)
    assert watch.read(path) == mark
    assert json.loads(path.read_text())[1] == "race"
