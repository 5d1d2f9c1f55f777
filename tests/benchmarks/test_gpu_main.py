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
from benchmarks.gpu import environment, stage, watch, worker
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
    SECONDS, LONGEST = 60.0, 20.0

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
    for module in (driver, worker):
        monkeypatch.setattr(module, "load", lambda: loaded)
    monkeypatch.setitem(results.ROW_TYPES, "piece", PieceRow)
    return loaded.stages


@pytest.fixture
def path(stages, monkeypatch, tmp_path, machine, ceilings):
    """Of the result file of a dry run."""
    monkeypatch.setattr(roofline, "measure", lambda device: ceilings)
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(watch, "watch", in_this_process)
    monkeypatch.setattr(watch, "end_with_watcher", lambda: None)
    monkeypatch.setattr(driver.machine, "describe", lambda device: machine)
    monkeypatch.setattr(driver.machine, "sources", lambda: machine["sources"])
    return results.default_path(machine).with_name(f"dry-run-{results.default_path(machine).name}")


def in_this_process(command, mark, end):
    """What another process would do."""
    code = worker.main(command[command.index("benchmarks.gpu.worker") + 1 :])
    return watch.Ended(code, watch.read(mark))


def rows(path, kind):
    return [row for row in results.load(path) if row["kind"] == kind]


def test_the_stages_run_in_order_and_every_output_says_that_it_was_dry(stages, path, capsys):
    assert driver.main(["--dry-run"]) == 0
    told = capsys.readouterr()
    begun, ended = rows(path, "stage")[::2], rows(path, "stage")[1::2]
    assert [row["stage"] for row in begun] == [row["stage"] for row in ended] == list(stage.DEFAULT)
    assert all(row["unfinished"] is None and row["seconds"] is None for row in begun)
    assert all(row["unfinished"] == 0 and row["error"] is None and row["seconds"] >= 0 for row in ended)
    assert stages["tune"].did == []
    assert "3/9 accuracy: Stands in." in told.out
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
    assert [row["stage"] for row in rows(path, "stage")] == ["environment"] * 2 + ["race"] * 2
    assert driver.main(["--dry-run"]) == 0
    assert "from row 10 of a cut run" in capsys.readouterr().out
    assert [stages[name].did for name in stage.NAMES[1:]] == [[0, 1, 2]] * 8 + [[]]


def test_what_a_stage_does_not_need_is_the_next_ones_and_one_alone_has_all_it_needs(stages, path):
    start = time.monotonic()
    driver.main(["--dry-run"], start=start)
    end, later = start + driver.SECONDS - driver._CLOSING_S, 0.0
    for name in reversed(stage.DEFAULT[1:]):  # each has its share and all that those before it have left
        (setup,) = stages[name].setups
        assert setup.deadline == pytest.approx(end - later)
        later += stages[name].SECONDS
    driver.main(["--dry-run", "--stages", "models", "--fresh"])
    assert stages["models"].setups[-1].deadline == math.inf


def test_no_time_is_kept_for_tuning(stages, path):
    start = time.monotonic()
    driver.main(["--dry-run", "--stages", "race,tune"], start=start)
    deadlines = {stages[name].setups[0].deadline for name in ("race", "tune")}
    assert deadlines == {start + driver.SECONDS - driver._CLOSING_S}


def test_a_stage_that_hangs_again_and_again_has_its_share_but_once(stages, path, monkeypatch):
    """And no stage before it begins anew."""
    hung, processes = [], []

    def hangs(command, mark, end):
        processes.append(command[command.index("--stages") + 1].split(",")[0])
        ended = in_this_process(command, mark, end)
        if len(processes) > 3:
            return ended
        hung.append(stages["race"].setups[-1].deadline)
        return watch.Ended(-9, watch.Mark(str(path), "race", f"piece {len(processes)}"), "hung")

    monkeypatch.setattr(watch, "watch", hangs)
    stages["models"].unfinished = lambda setup, writer: int(len(processes) <= 3)  # the run is not finished before
    assert driver.main(["--dry-run"]) == 1
    assert processes == ["environment", "race", "race", "race"]
    assert len(hung) == 3
    assert hung == pytest.approx([hung[0]] * 3)


def test_what_a_stage_had_no_time_for_is_done_while_the_others_leave_some(stages, path, monkeypatch, capsys):
    run = stages["race"].run

    def first_time_late(setup, writer):
        return run(setup._replace(deadline=0.0 if not stages["race"].setups else setup.deadline), writer)

    monkeypatch.setattr(stages["race"], "run", first_time_late)
    assert driver.main(["--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "Going on in a new process: race." in told
    assert "Unfinished" not in told
    assert stages["race"].did == [0, 1, 2]
    assert [row["stage"] for row in rows(path, "stage")] == [n for n in stage.DEFAULT for _ in "be"] + ["race"] * 2


def test_no_share_goes_beyond_the_whole(stages, path):
    stages["race"].SECONDS = 1e6
    driver.main(["--dry-run"])
    assert stages["race"].setups[0].deadline <= time.monotonic() + 540


def test_what_a_stage_had_no_time_for_is_told_and_done_by_the_next_run(stages, path, capsys, monkeypatch):
    seconds = itertools.accumulate(itertools.repeat(1e-3))  # at each look at the clock
    late = 0.0

    def takes_all_the_time(piece):
        nonlocal late
        late += driver.SECONDS

    for module in (driver, worker, stage):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: late + next(seconds)))
    stages["race"].before = takes_all_the_time
    assert driver.main(["--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "; 2 pieces of work are unfinished" in told
    assert "Nothing failed. Unfinished: 2 pieces of race, 3 pieces of outputs, " in told
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
    assert [row["stage"] for row in rows(path, "piece")] == ["smoke"] * 3 + ["accuracy"] * 3 + ["race"] * 2
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
    assert "environment,smoke,accuracy,race,outputs,norms,models,compiled,flex,tune" in told
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


@pytest.fixture
def breaking(path, stages, monkeypatch):
    """The race loses the GPU in its second piece, to the process that it is in; the stages of each process."""
    gone, processes = [], []

    def crash(piece):
        if piece == 1:
            gone.append(piece)
            raise RuntimeError("an illegal memory access was encountered")

    def another(command, mark, end):
        gone.clear()
        processes.append(command[command.index("--stages") + 1].split(","))
        return in_this_process(command, mark, end)

    stages["race"].before = crash
    monkeypatch.setattr(worker, "lost", lambda device: bool(gone))
    monkeypatch.setattr(watch, "watch", another)
    return processes


def test_after_a_kernel_that_loses_the_gpu_a_new_process_goes_on_unless_it_comes_no_further(path, stages, breaking):
    """The stand-in writes no row of the piece that does it, so the second process breaks on it too, and is the last."""
    assert driver.main(["--dry-run", "--fresh"]) == 1
    assert breaking == [list(stage.DEFAULT), list(stage.DEFAULT[3:])]
    assert stages["race"].did == [0]
    assert stages["outputs"].did == []
    assert rows(path, "stage")[-1]["error"] == "RuntimeError: an illegal memory access was encountered"
    assert not path.with_stem(f"{path.stem}-2").exists()


def test_where_tuning_has_changed_the_tiles_no_new_process_is_started(path, stages, breaking, monkeypatch, capsys):
    monkeypatch.setattr(driver.machine, "sources", lambda: "fedcba9876543210")
    assert driver.main(["--dry-run", "--stages", "race,models"]) == 1
    assert len(breaking) == 1
    assert "the stages after it did not run" in capsys.readouterr().err
    assert stages["models"].did == []


@pytest.mark.parametrize(
    ("code", "piece", "why", "blamed", "follow"),
    [
        (-9, "N=261", "hung", "hung, and its process was ended", ["race", "models"]),
        (-9, None, "hung", "hung, and its process was ended", ["models"]),
        (worker.AGAIN, None, "by itself", None, ["race", "models"]),
        (-11, "N=261", "by itself", "died with status -11", ["race", "models"]),
        (1, None, "by itself", "died with status 1", ["models"]),
        (-9, "N=261", "time", None, []),
        (0, None, "by itself", None, []),
        (worker.CUT, "N=261", "by itself", None, []),
    ],
)
def test_how_a_process_ended_decides_what_follows(path, code, piece, why, blamed, follow):
    assert driver.main(["--dry-run", "--stages", "race"]) == 0
    before = results.load(path)
    ended = watch.Ended(code, watch.Mark(str(path), "race", piece), why)
    assert driver._rest(ended, ["accuracy", "race", "models"], path) == follow
    added = results.load(path)[len(before) :]
    assert [row.get("reason") or row.get("error") for row in added] == ([blamed] if blamed else [])
    assert [row["kind"] for row in added] == ([] if blamed is None else ["stage"] if piece is None else ["broken"])


def test_what_hung_as_time_ran_out_is_a_row_too(path, stages, monkeypatch, capsys):
    def hangs(command, mark, end):
        in_this_process(command, mark, end)
        monkeypatch.setattr(driver.time, "monotonic", lambda: end)
        return watch.Ended(-9, watch.Mark(str(path), "race", "N=261"), "hung")

    monkeypatch.setattr(watch, "watch", hangs)
    assert driver.main(["--dry-run", "--stages", "race,models"]) == 1
    assert [row["piece"] for row in rows(path, "broken")] == ["N=261"]
    assert "race, N=261: hung" in capsys.readouterr().err


@pytest.mark.parametrize("why", ["by itself", "hung", "time"])
def test_a_process_that_ends_before_it_has_a_file_is_a_row_of_one(path, monkeypatch, capsys, tmp_path, why):
    monkeypatch.setattr(watch, "watch", lambda command, mark, end: watch.Ended(-9, watch.read(mark), why))
    assert driver.main(["--dry-run", "--results", str(tmp_path / "there")]) == 1
    (file,) = (tmp_path / "there").glob("*.json")
    (row,) = results.load(file)
    assert (row["kind"], row["piece"], row["machine"]["device"]) == ("broken", "importing torch", "unknown GPU")
    how = "died with status -9" if why == "by itself" else "hung, and its process was ended"
    assert f"process, importing torch: {how}" in capsys.readouterr().err
    assert how in file.with_suffix(".md").read_text()
    assert "DRY RUN" not in file.with_suffix(".md").read_text()


def test_a_later_process_that_does_not_come_to_begin_is_a_row_too(stages, path, monkeypatch):
    def second_dies(command, mark, end):
        if "--file" in command:
            return watch.Ended(-9, watch.read(mark))
        in_this_process(command, mark, end)
        return watch.Ended(-9, watch.Mark(str(path), "race", "N=261"), "hung")

    monkeypatch.setattr(watch, "watch", second_dies)
    assert driver.main(["--dry-run"]) == 1
    assert [(row["stage"], row["piece"]) for row in rows(path, "broken")] == [
        ("race", "N=261"),
        ("process", "importing torch"),
    ]


def test_a_file_that_was_brought_along_is_gone_on_with_whatever_its_date(stages, path, tmp_path, capsys):
    assert driver.main(["--dry-run", "--stages", "race"]) == 0
    there = tmp_path / "there" / "dry-run-of-yesterday.json"
    there.parent.mkdir()
    path.rename(there)
    (there.parent / "another.json").write_text("not of ours")
    assert driver.main(["--dry-run", "--stages", "race,models", "--results", str(there.parent)]) == 0
    assert "dry-run-of-yesterday.json, from row" in capsys.readouterr().out
    assert stages["race"].did == stages["models"].did == [0, 1, 2]
    assert len(rows(there, "piece")) == 6
    assert driver.main(["--dry-run", "--stages", "race", "--fresh", "--results", str(there.parent)]) == 0
    assert stages["race"].did == [0, 1, 2] * 2


@pytest.mark.parametrize("content", [b"no archive", None], ids=["broken", "unreadable"])
def test_kernels_that_cannot_be_taken_are_named_and_compiled_here(stages, path, tmp_path, capsys, monkeypatch, content):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    file = tmp_path / "a.tar.xz"
    file.write_bytes(content or b"")
    if content is None:
        monkeypatch.setattr(
            environment.archive, "read", lambda file: (_ for _ in ()).throw(PermissionError("not yours"))
        )
    assert driver.main(["--dry-run", "--cache", str(file)]) == 1
    (row,) = rows(path, "broken")
    assert (row["stage"], row["piece"]) == ("environment", "kernels of a.tar.xz")
    assert f"environment, kernels of a.tar.xz: {row['reason']}" in capsys.readouterr().err
    assert stages["models"].did == [0, 1, 2]
    assert rows(path, "environment")


def test_the_results_go_where_they_are_asked_for(stages, path, tmp_path):
    assert driver.main(["--dry-run", "--stages", "race", "--results", str(tmp_path / "there")]) == 0
    assert not path.exists()
    assert (tmp_path / "there" / path.name).exists()
    assert (tmp_path / "there" / path.name).with_suffix(".md").exists()


@pytest.mark.parametrize(
    ("triton", "numpy", "told"), [("3.6.0", "2.5.2", True), ("3.6.0", "2.4.6", False), ("3.7.1", "2.5.2", False)]
)
def test_an_interpreter_that_cannot_run_here_is_one_sentence(monkeypatch, triton, numpy, told):
    versions = {"triton": triton, "numpy": numpy}
    monkeypatch.setattr(driver.importlib.metadata, "version", versions.__getitem__)
    assert ("pip install 'numpy<2.5'" in (driver._interpreter_fault() or "")) is told


def test_its_time_counts_from_before_torch_is_imported():
    code = """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        assert name != "torch" or "benchmarks.gpu.began" in sys.modules
sys.meta_path.insert(0, Finder())
import benchmarks.gpu.__main__
assert "torch" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_every_stage_is_there_and_a_default_run_fits_into_nine_minutes():
    loaded = stage.load()
    assert loaded.broken == {}
    assert [module.NAME for module in loaded.stages.values()] == list(stage.NAMES)
    shares = sum(loaded.stages[name].SECONDS for name in stage.DEFAULT)
    assert shares <= driver.SECONDS - driver._CLOSING_S < driver.SECONDS <= 9 * 60
    assert all(module.__doc__ for module in loaded.stages.values())


def test_the_command_needs_torch_triton_and_numpy_alone(tmp_path):
    """Everything that a system Python may lack is hidden; the stages still load, and the first runs."""
    code = f"""
import sys
for name in ("tqdm", "matplotlib", "timm", "torchvision", "xformers", "flash_attn", "skimage", "sklearn", "pytest"):
    sys.modules[name] = None
from benchmarks.gpu import stage, worker
assert stage.load().broken == {{}}, stage.load().broken
sys.exit(worker.main(["--dry-run", "--stages", "environment", "--results", {str(tmp_path)!r}]))
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
        (["PYTHON=python3", "CACHE=a.tar.xz", "RESULTS=b"], "python3 -m benchmarks.gpu --cache a.tar.xz --results b"),
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
