"""The schema refuses bad rows; a cut run keeps its rows and goes on; nothing else is mistaken for one."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import machine as about
from benchmarks import results
from benchmarks.machine import ROOT
from benchmarks.results import Writer
from benchmarks.shapes import Case
from vitreg_kernels.measure.timing import Timing

RUN = {"command": "bench", "size": "quick", "model": "a model"}


@pytest.fixture
def row(machine):
    return {
        "kind": "overhead",
        "call": "register_attention",
        "requires_grad": False,
        "shape": [1, 1, 16, 16],
        "raw_us": 8.0,
        "ours_us": 30,
        "overhead_us": 22.0,
        "goal_us": 25.0,
        "samples": 100,
        "machine": machine,
    }


@pytest.fixture
def bare(row):
    """As a caller gives it: the writer adds the machine."""
    return {name: value for name, value in row.items() if name != "machine"}


def test_good_rows_are_valid(row, race):
    results.validate(row)
    for mode in ("forward", "forward+backward"):
        for raced in race(Case(1, 2, 7, "fp32", mode, head_dim=16)):
            results.validate(raced)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "dance"}, "kind must be one of .*attention.*, not 'dance'"),
        ({"raw_us": float("nan")}, "overhead.raw_us must be a finite number, not nan"),
        ({"raw_us": "8"}, "overhead.raw_us must be a finite number, not '8'"),
        ({"raw_us": None}, "overhead.raw_us must be a finite number, not None"),
        ({"raw_us": True}, "overhead.raw_us must be a finite number, not True"),
        ({"samples": 1.5}, "overhead.samples must be int, not 1.5"),
        ({"samples": True}, "overhead.samples must be int, not True"),
        ({"requires_grad": 0}, "overhead.requires_grad must be bool, not 0"),
        ({"shape": [1, "1"]}, r"overhead.shape\[1\] must be int"),
        ({"shape": 4}, "overhead.shape must be a list"),
        ({"machine": {}}, "overhead.machine lacks .*'commit'"),
        ({"extra": 1}, r"overhead lacks \[\] and has unknown \['extra'\]"),
    ],
)
def test_bad_rows_are_refused(row, change, message):
    with pytest.raises(ValueError, match=message):
        results.validate(row | change)


def test_a_missing_field_is_refused(row):
    del row["samples"]
    with pytest.raises(ValueError, match=r"overhead lacks \['samples'\]"):
        results.validate(row)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "fp8"}, "attention.dtype must be one of .*, not 'fp8'"),
        ({"errors": {"output": {"max": 1.0}}}, "attention.errors.output lacks .*'eager_max'"),
        ({"reason": 3}, "attention.reason must be str"),
    ],
)
def test_bad_attention_rows_are_refused(race, change, message):
    good = race(Case(1, 2, 7, "fp32", "forward", head_dim=16))[0]
    with pytest.raises(ValueError, match=message):
        results.validate(good | change)


def test_a_cut_run_is_resumed(tmp_path, machine, bare, row):
    path = tmp_path / "new" / "run.json"
    Writer(path, RUN, machine).extend([bare])
    again = Writer(path, RUN, machine)
    assert again.rows == [row]
    assert again.resumed == 1
    again.extend([bare | {"requires_grad": True}])
    assert results.load(path) == [row, row | {"requires_grad": True}]
    assert again.find(kind="overhead", requires_grad=True) == [row | {"requires_grad": True}]


def test_the_time_of_the_host_is_in_rows_of_a_gpu_alone(race):
    good = race(Case(1, 2, 7, "fp32", "forward", head_dim=16))[0]
    assert "host_ms" not in good
    results.validate(good)
    results.validate(good | {"host_ms": 0.3})
    with pytest.raises(ValueError, match=r"attention.host_ms must be a finite number, not None"):
        results.validate(good | {"host_ms": None})
    assert results.timed(Timing(1.0, 1.0, 1.0, 1.0, 3, 0.3))["host_ms"] == 0.3
    assert "host_ms" not in results.timed(Timing(1.0, 1.0, 1.0, 1.0, 3))


def test_a_row_is_added_behind_a_process_that_is_gone(tmp_path, machine, bare, row):
    path = tmp_path / "run.json"
    Writer(path, RUN, machine).extend([bare])
    results.append(path, bare | {"requires_grad": True})
    assert results.load(path) == [row, row | {"requires_grad": True}]
    with pytest.raises(ValueError, match="unknown"):
        results.append(path, bare | {"extra": 1})
    assert Writer(path, RUN, machine).resumed == 2


@pytest.mark.parametrize("git", [True, False])
def test_the_commit_is_gits_or_what_the_environment_says(monkeypatch, git):
    monkeypatch.setattr(about, "_git", lambda *asked: "from git" if git else None)
    monkeypatch.delenv("VITREG_COMMIT", raising=False)
    assert about.describe(torch.device("cpu"))["commit"] == ("from git" if git else "unknown")
    monkeypatch.setenv("VITREG_COMMIT", "from the environment")
    assert about.describe(torch.device("cpu"))["commit"] == ("from git" if git else "from the environment")


def test_sources_do_not_hang_on_how_the_native_library_was_built(tmp_path, monkeypatch):
    for name in ("_native/cpu.json", "dispatch/configs/sm_90.json"):
        (tmp_path / "vitreg_kernels" / name).parent.mkdir(parents=True)
        (tmp_path / "vitreg_kernels" / name).write_text("{}")
    monkeypatch.setattr(about, "ROOT", tmp_path)
    monkeypatch.setattr(about, "_OF_A_BUILD", tmp_path / about._OF_A_BUILD.relative_to(ROOT))
    before = about.sources()
    (tmp_path / "vitreg_kernels" / "_native" / "cpu.json").unlink()
    assert about.sources() == before
    (tmp_path / "vitreg_kernels" / "dispatch" / "configs" / "sm_90.json").unlink()
    assert about.sources() != before


@pytest.mark.parametrize("change", ["finished", "sources", "commit", "size", "model", "dirty", "fresh"])
def test_any_other_file_is_left_as_it_is(tmp_path, machine, bare, change):
    path = tmp_path / "run.json"
    first = Writer(path, RUN, machine)
    first.extend([bare])
    if change == "finished":
        first.finish()
    changed = {"commit": "fedcba", "sources": "fedcba", "dirty": True}
    other = machine | ({change: changed[change]} if change in changed else {})
    asked = RUN | ({change: "another"} if change in RUN else {})
    left = path.read_text()
    for number in (2, 3):
        again = Writer(path, asked, other, fresh=change == "fresh")
        assert (again.path.name, again.rows, again.resumed) == (f"run-{number}.json", [], 0)
        again.extend([bare])
        again.finish()
        assert len(results.load(again.path)) == 1
    assert path.read_text() == left


def test_a_cut_run_of_changed_code_is_resumed_while_it_is_the_same_code(tmp_path, machine, bare):
    path, dirty = tmp_path / "run.json", {**machine, "commit": "unknown", "dirty": True}
    Writer(path, RUN, dirty).extend([bare])
    assert Writer(path, RUN, dirty).resumed == 1
    assert Writer(path, RUN, {**dirty, "sources": "fedcba"}).resumed == 0


def test_a_cut_run_behind_a_finished_one_is_resumed(tmp_path, machine, bare, row):
    path = tmp_path / "run.json"
    finished = Writer(path, RUN, machine)
    finished.extend([bare])
    finished.finish()
    Writer(path, RUN, machine).extend([bare])
    again = Writer(path, RUN, machine)
    assert (again.path.name, again.rows) == ("run-2.json", [row])


def test_a_bad_row_among_good_ones_changes_nothing(tmp_path, machine, bare, row):
    path = tmp_path / "run.json"
    writer = Writer(path, RUN, machine)
    writer.extend([bare])
    with pytest.raises(ValueError, match="samples"):
        writer.extend([bare, bare | {"samples": None}])
    assert writer.rows == results.load(path) == [row]


def test_a_cut_while_saving_leaves_the_file_before_it(tmp_path, machine, bare, row, monkeypatch):
    path = tmp_path / "run.json"
    writer = Writer(path, RUN, machine)
    writer.extend([bare])

    def cut(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(results.os, "replace", cut)
    with pytest.raises(KeyboardInterrupt):
        writer.extend([bare])
    assert results.load(path) == [row]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 1}', '{"schema": 3, "run": {}, "rows": []}'])
def test_a_file_that_is_none_is_refused(tmp_path, machine, text):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"run.json is not a result file .* delete it"):
        results.load(path)
    with pytest.raises(ValueError, match="not a result file"):
        Writer(path, RUN, machine)
    assert path.read_text() == text


def test_a_bad_row_in_a_file_is_refused(tmp_path, row):
    path = tmp_path / "run.json"
    document = {"schema": results.SCHEMA, "run": RUN, "complete": True}
    path.write_text(json.dumps({**document, "rows": [row | {"samples": -0.5}]}))
    with pytest.raises(ValueError, match="samples"):
        results.load(path)


def test_the_default_path_names_the_device_the_day_and_the_ending(machine):
    assert results.default_path(machine).parent == results.FOLDER
    assert results.default_path(machine).match("some-cpu-2-ghz-????-??-??.json")
    assert results.default_path(machine, "-full").match("some-cpu-2-ghz-????-??-??-full.json")
