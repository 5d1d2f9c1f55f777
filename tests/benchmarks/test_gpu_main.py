"""The GPU command: order, time, cuts, failures and answers, with stand-ins for the stages that cost something."""

from __future__ import annotations

import itertools
import math
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Literal, TypedDict

import pytest

from benchmarks import results, roofline
from benchmarks.gpu import __main__ as driver
from benchmarks.gpu import environment, stage
from benchmarks.machine import ROOT, Machine
from vitreg_kernels._triton import mode


class PieceRow(TypedDict):
    kind: Literal["piece"]
    stage: str
    piece: int
    wrong: bool
    machine: Machine


class StandIn:
    """A stage of three pieces; ``before`` is called with the number of each."""

    __doc__ = "Stands in.\n\nMore words."
    SECONDS = 60.0

    def __init__(self, name, before=lambda piece: None, wrong=()):
        self.NAME, self.before, self.wrong = name, before, wrong
        self.did, self.setups = [], []

    def run(self, setup, writer):
        self.setups.append(setup)
        for piece in range(3):
            if writer.find(kind="piece", stage=self.NAME, piece=piece):
                continue
            if setup.expired:
                return
            self.before(piece)
            self.did.append(piece)
            wrong = piece in self.wrong
            yield from writer.extend([{"kind": "piece", "stage": self.NAME, "piece": piece, "wrong": wrong}])

    def failures(self, rows):
        its = [row for row in rows if row["kind"] == "piece" and row["stage"] == self.NAME]
        return [f"piece {row['piece']} of {self.NAME} is wrong" for row in its if row["wrong"]]

    def unfinished(self, setup, writer):
        return 3 - len(writer.find(kind="piece", stage=self.NAME))


@pytest.fixture
def stages(monkeypatch):
    """The environment's stage, and a stand-in for every other."""
    found = {name: StandIn(name) for name in stage.NAMES[1:]}
    loaded = stage.Loaded({"environment": environment, **found}, {})
    monkeypatch.setattr(driver, "load", lambda: loaded)
    monkeypatch.setitem(results.ROW_TYPES, "piece", PieceRow)
    return loaded.stages


@pytest.fixture
def path(stages, monkeypatch, tmp_path, machine, ceilings):
    """Of the result file of a dry run."""
    monkeypatch.setattr(roofline, "measure", lambda device: ceilings)
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(driver.machine, "describe", lambda device: machine)
    monkeypatch.setattr(driver.machine, "sources", lambda: machine["sources"])
    return results.default_path(machine).with_name(f"dry-run-{results.default_path(machine).name}")


def rows(path, kind):
    return [row for row in results.load(path) if row["kind"] == kind]


def test_the_stages_run_in_order_and_every_output_says_that_it_was_dry(stages, path, capsys):
    assert driver.main(["--dry-run"]) == 0
    told = capsys.readouterr()
    assert [row["stage"] for row in rows(path, "stage")] == list(stage.DEFAULT)
    assert all(row["unfinished"] == 0 and row["error"] is None and row["seconds"] >= 0 for row in rows(path, "stage"))
    assert stages["tune"].did == []
    assert "2/6 accuracy: Stands in." in told.out
    assert "More words" not in told.out
    assert "Nothing failed." in told.out
    assert told.out.startswith("DRY RUN")
    assert "DRY RUN" in path.with_suffix(".md").read_text()
    assert path.name.startswith("dry-run-")
    assert '"dry": "yes"' in path.read_text()
    assert all(setup.dry and setup.device.type == "cpu" for s in stages.values() for setup in getattr(s, "setups", []))


def test_a_finished_run_is_not_gone_on_with(stages, path):
    assert driver.main(["--dry-run"]) == 0
    assert driver.main(["--dry-run"]) == 0
    assert stages["race"].did == [0, 1, 2] * 2
    assert path.with_stem(f"{path.stem}-2").exists()


def test_a_run_of_some_stages_is_finished_by_the_others(stages, path, capsys):
    assert driver.main(["--dry-run", "--stages", "race"]) == 0
    assert "from row" not in capsys.readouterr().out
    assert [row["stage"] for row in rows(path, "stage")] == ["environment", "race"]
    assert driver.main(["--dry-run"]) == 0
    assert "from row 8 of a cut run" in capsys.readouterr().out
    assert [stages[name].did for name in stage.NAMES[1:]] == [[0, 1, 2]] * 5 + [[]]


def test_stages_have_their_share_of_the_time_and_one_alone_has_all_it_needs(stages, path):
    start = time.monotonic()
    driver.main(["--dry-run"])
    (setup,) = stages["race"].setups
    assert start + 60 <= setup.deadline <= time.monotonic() + 60
    driver.main(["--dry-run", "--stages", "models", "--fresh"])
    assert stages["models"].setups[-1].deadline == math.inf


def test_no_share_goes_beyond_the_whole(stages, path):
    stages["race"].SECONDS = 1e6
    driver.main(["--dry-run"])
    assert stages["race"].setups[0].deadline <= time.monotonic() + 480


def test_what_a_stage_had_no_time_for_is_told_and_done_by_the_next_run(stages, path, capsys, monkeypatch):
    seconds = itertools.accumulate(itertools.repeat(1e-3))  # at each look at the clock
    late = 0.0

    def piece_of_a_minute(piece):
        nonlocal late
        late += stages["race"].SECONDS

    for module in (driver, stage):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: late + next(seconds)))
    stages["race"].before = piece_of_a_minute
    assert driver.main(["--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "2 pieces of work are unfinished: run `make gpu` again to go on" in told
    assert "Nothing failed. Unfinished: 2 pieces of race: run" in told
    stages["race"].before = lambda piece: None
    assert driver.main(["--dry-run"]) == 0
    assert "Unfinished" not in capsys.readouterr().out
    assert stages["race"].did == [0, 1, 2]
    assert stages["accuracy"].did == [0, 1, 2]


def test_a_cut_leaves_its_rows_and_the_next_run_does_the_rest(stages, path, capsys):
    def cut(piece):
        if piece == 2:
            raise KeyboardInterrupt

    stages["race"].before = cut
    assert driver.main(["--dry-run"]) == 130
    assert "run `make gpu` again" in capsys.readouterr().err
    assert [row["stage"] for row in rows(path, "piece")] == ["accuracy"] * 3 + ["race"] * 2
    stages["race"].before = lambda piece: None
    assert driver.main(["--dry-run"]) == 0
    assert [stages[name].did for name in ("accuracy", "race", "models")] == [[0, 1, 2]] * 3


def test_a_stage_that_breaks_is_named_and_the_later_ones_run(stages, path, capsys):
    def crash(piece):
        if piece == 1:
            raise IndexError("out of\nits bounds")

    stages["race"].before = crash
    assert driver.main(["--dry-run"]) == 1
    told = capsys.readouterr()
    assert "race stopped: IndexError: out of its bounds" in told.err
    assert "1 failures" in told.err
    assert stages["race"].did == [0]
    assert stages["models"].did == [0, 1, 2]
    assert "IndexError: out of its bounds" in path.with_suffix(".md").read_text()
    stages["race"].before = lambda piece: None
    assert driver.main(["--dry-run"]) == 0
    assert stages["race"].did == [0, 1, 2]


def test_a_stage_that_cannot_be_imported_is_named_and_the_others_run(stages, path, monkeypatch, capsys):
    whole = stage.Loaded({k: s for k, s in stages.items() if k != "race"}, {"race": "race cannot be loaded: no triton"})
    monkeypatch.setattr(driver, "load", lambda: whole)
    assert driver.main(["--dry-run"]) == 1
    assert "race cannot be loaded: no triton" in capsys.readouterr().err
    assert stages["models"].did == [0, 1, 2]
    assert driver.main(["--dry-run", "--stages", "models"]) == 0


def test_every_failing_case_is_named_and_the_status_is_1(stages, path, capsys):
    stages["race"].wrong, stages["models"].wrong = (0, 2), (1,)
    for _ in range(2):  # what an earlier part of the run found still counts
        assert driver.main(["--dry-run", "--stages", "accuracy,race,models"]) == 1
        told = capsys.readouterr().err
        assert "3 failures" in told
        for sentence in ("piece 0 of race is wrong", "piece 2 of race is wrong", "piece 1 of models is wrong"):
            assert sentence in told
    assert stages["race"].did == [0, 1, 2]


@pytest.mark.parametrize("arguments", [["--stages", "rice,race", "--dry-run"], ["--stages", "", "--dry-run"]])
def test_an_unknown_stage_is_one_sentence_and_status_2(stages, path, capsys, arguments):
    assert driver.main(arguments) == 2
    told = capsys.readouterr().err
    assert "unknown stage" in told
    assert "environment,accuracy,race,outputs,norms,models,tune" in told
    assert told.count("\n") == 1
    assert not path.exists()


def test_no_gpu_is_one_sentence_and_status_2(stages, path, monkeypatch, capsys):
    monkeypatch.setattr(driver.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(mode, "INTERPRETING", False)
    assert driver.main([]) == 2
    told = capsys.readouterr().err
    assert "sees no CUDA GPU: `make gpu DRY=1`" in told
    assert told.count("\n") == 1


def test_the_interpreter_on_a_gpu_is_one_sentence_and_status_2(stages, path, monkeypatch, capsys):
    monkeypatch.setattr(driver.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mode, "INTERPRETING", True)
    assert driver.main([]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


def test_a_file_in_the_way_is_one_sentence_and_status_2(stages, path, capsys):
    path.write_text("not json")
    assert driver.main(["--dry-run"]) == 2
    assert "is not a result file of this version" in capsys.readouterr().err
    assert path.read_text() == "not json"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "No such file"),
        ("not json", "is not a result file"),
        (f'{{"schema": {results.SCHEMA}, "run": {{}}, "complete": true, "rows": []}}', "not of a GPU run"),
    ],
)
def test_a_report_of_an_unreadable_file_is_one_sentence_and_status_2(stages, path, capsys, text, sentence):
    if text is not None:
        path.write_text(text)
    assert driver.main(["--report", str(path)]) == 2
    told = capsys.readouterr().err
    assert sentence in told
    assert told.count("\n") == 1


def test_a_report_is_drawn_again_from_the_file_alone(stages, path, capsys):
    driver.main(["--dry-run"])
    table = path.with_suffix(".md").read_text()
    path.with_suffix(".md").unlink()
    capsys.readouterr()
    assert driver.main(["--report", str(path)]) == 0
    assert path.with_suffix(".md").read_text() == table
    assert table in capsys.readouterr().out
    assert stages["race"].did == [0, 1, 2]


class Replaced(Exception):
    """What stands for the new process."""


@pytest.fixture
def breaking(stages, monkeypatch):
    """The race loses the GPU in its second piece; what the process was replaced with."""
    gone, commands = [], []

    def crash(piece):
        if piece == 1:
            gone.append(piece)
            raise RuntimeError("an illegal memory access was encountered")

    def replace(program, command):
        commands.append(command)
        raise Replaced

    stages["race"].before = crash
    monkeypatch.setattr(driver, "lost", lambda device: bool(gone))
    monkeypatch.setattr(driver.os, "execv", replace)
    return commands


def test_after_a_kernel_that_loses_the_gpu_a_new_process_goes_on(stages, path, breaking):
    with pytest.raises(Replaced):
        driver.main(["--dry-run", "--fresh"])
    assert breaking == [[sys.executable, "-m", "benchmarks.gpu", "--dry-run"]]
    assert stages["outputs"].did == []
    assert rows(path, "stage")[-1]["error"] == "RuntimeError: an illegal memory access was encountered"


@pytest.mark.parametrize("why", ["nothing was written", "the tiles are others now"])
def test_a_new_process_that_would_break_again_is_not_started(stages, path, breaking, monkeypatch, machine, capsys, why):
    if why == "nothing was written":
        with pytest.raises(Replaced):
            driver.main(["--dry-run", "--stages", "race"])  # leaves piece 0
        breaking.clear()
    else:
        monkeypatch.setattr(driver.machine, "sources", lambda: "fedcba9876543210")
    assert driver.main(["--dry-run", "--stages", "race,models"]) == 1
    assert breaking == []
    assert "the stages after it did not run" in capsys.readouterr().err
    assert stages["models"].did == []


def test_every_stage_is_there_and_a_default_run_fits_into_eight_minutes():
    loaded = stage.load()
    assert loaded.broken == {}
    assert [module.NAME for module in loaded.stages.values()] == list(stage.NAMES)
    assert sum(loaded.stages[name].SECONDS for name in stage.DEFAULT) <= driver.SECONDS <= 8 * 60
    assert all(module.__doc__ for module in loaded.stages.values())


def test_the_command_needs_torch_triton_and_numpy_alone(tmp_path):
    """Everything that a system Python may lack is hidden; the stages still load, and the first runs."""
    code = f"""
import sys
for name in ("tqdm", "matplotlib", "timm", "torchvision", "xformers", "flash_attn", "skimage", "sklearn", "pytest"):
    sys.modules[name] = None
from pathlib import Path
from benchmarks import results
from benchmarks.gpu import __main__ as driver, stage
results.FOLDER = Path({str(tmp_path)!r})
assert stage.load().broken == {{}}, stage.load().broken
sys.exit(driver.main(["--dry-run", "--stages", "environment"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("asked", "command"),
    [
        (["PYTHON=python3"], "python3 -m benchmarks.gpu"),
        (["PYTHON=python3", "STAGES=race,models", "FRESH=1"], "python3 -m benchmarks.gpu --stages race,models --fresh"),
        (["PYTHON=python3", "DRY=1"], "TRITON_INTERPRET=1 python3 -m benchmarks.gpu --dry-run"),
        ([], ".venv/bin/python -m benchmarks.gpu"),
    ],
)
def test_make_gpu_takes_the_python_it_is_given_as_it_is(asked, command):
    plain = {"PATH": "/usr/bin:/bin:/usr/local/bin"}
    told = subprocess.run(
        ["make", "-n", "gpu", *asked], capture_output=True, text=True, cwd=ROOT, env=plain, check=True
    )
    assert " ".join(told.stdout.splitlines()[-1].split()) == command
    if asked:
        assert "pip" not in told.stdout
        assert "venv" not in told.stdout
