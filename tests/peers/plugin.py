"""A pytest plugin for other libraries' tests: patches every model that is built, and writes a row of every test.

Without ``--patched`` it changes nothing. Rows are lines of JSON, of which the first says which tests there are; a test
that has a row in the file already is not run again.
"""

from __future__ import annotations

import functools
import importlib
import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn


class Tally:
    """What became of the attention modules during one test.

    Attributes:
        built: names of the classes that were patched.
        fused: calls that went through the op, by class.
        left: classes and models that were left alone, and why.
    """

    def __init__(self) -> None:
        self.built: set[str] = set()
        self.fused: Counter[str] = Counter()
        self.left: dict[str, str] = {}


class Rows:
    """Chooses the tests, starts each from the same seeds, and writes what came of it."""

    def __init__(self, path: Path, patterns: list[str], left_out: list[str], tally: Tally) -> None:
        self._path = path
        self._patterns = patterns
        self._left_out = left_out
        self._tally = tally
        self._reports: list[pytest.TestReport] = []

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        done = _tests_of(self._path)
        groups = {
            item.nodeid: _group(item, self._patterns) for item in items if item.originalname not in self._left_out
        }
        chosen = {test: group for test, group in groups.items() if group is not None}
        self._write({"chosen": chosen})
        todo = [item for item in items if item.nodeid in chosen and item.nodeid not in done]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(todo)])
        items[:] = sorted(todo, key=lambda item: self._patterns.index(chosen[item.nodeid]))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        random.seed(0)
        torch.manual_seed(0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._reports.append(report)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        outcomes = [report.outcome for report in self._reports]
        row = {
            "test": nodeid,
            "outcome": next((outcome for outcome in ("failed", "skipped") if outcome in outcomes), "passed"),
            "error": next((_message(report) for report in self._reports if report.failed), ""),
            "built": sorted(self._tally.built),
            "fused": self._tally.fused,
            "left": self._tally.left,
        }
        self._write(row)
        self._reports.clear()
        self._tally.__init__()

    def _write(self, row: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("peers")
    group.addoption("--rows", type=Path, help="file of the rows")
    group.addoption("--group", action="append", help="pattern of a model's, class's or function's name")
    group.addoption("--left-out", action="append", default=[], help="name of a function that is no test to run")
    group.addoption("--patched", action="store_true", help="patch every model")
    group.addoption("--built-by", help="module:function or module:Class.method that every model passes")


def pytest_configure(config: pytest.Config) -> None:
    tally = Tally()
    options = [config.getoption(name) for name in ("--rows", "--group", "--left-out")]
    config.pluginmanager.register(Rows(*options, tally))
    if config.getoption("--patched"):
        _patch_what_is_built(config.getoption("--built-by"), tally)
        _count_fused_calls(tally)


def _group(item: pytest.Item, patterns: list[str]) -> str | None:
    """The first pattern that fits the test's model, class or function."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    model = parameters.get("model_name", "").partition(".")[0]  # without the tag of its weights
    names = (model, item.cls and item.cls.__name__, item.originalname)
    return next((p for p in patterns if any(fnmatchcase(name, p) for name in names if name)), None)


def _tests_of(path: Path) -> set[str]:
    rows = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return {row["test"] for row in rows if "test" in row}


def _message(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash else report.longreprtext).strip().partition("\n")[0]


def _patch_what_is_built(built_by: str, tally: Tally) -> None:
    from vitreg_kernels.integrations.patching import patch

    module, _, path = built_by.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    build: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(build)
    def build_and_patch(*args: Any, **options: Any) -> Any:
        result = build(*args, **options)
        model = result if isinstance(result, nn.Module) else args[0]
        try:
            report = patch(model)
        except ValueError as error:
            if "no attention module known here" not in str(error):
                raise
            tally.left[type(model).__name__] = "has none known here"
            return result
        tally.built.update(entry.cls for entry in report.patched)
        tally.left.update({entry.cls: entry.reason for entry in report.left})
        return result

    for holder in (owner, *_modules_of(module)):  # wherever it was imported to
        if vars(holder).get(name) is build:
            setattr(holder, name, build_and_patch)


def _modules_of(package: str) -> Iterator[Any]:
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == package:
            yield module


def _count_fused_calls(tally: Tally) -> None:
    from vitreg_kernels.integrations.attention.attend import Attend
    from vitreg_kernels.integrations.patching.method import FusedMethod

    callers: list[str] = []
    call, attend = FusedMethod.__call__, Attend._call

    @functools.wraps(call)
    def counted_call(self: FusedMethod, *args: Any, **options: Any) -> Any:
        callers.append(type(self._module()).__name__)
        try:
            return call(self, *args, **options)
        finally:
            callers.pop()

    @functools.wraps(attend)
    def counted_attend(self: Attend, *args: Any, **options: Any) -> Any:
        if not torch.compiler.is_compiling():  # which traces this once, and for all calls
            tally.fused[callers[-1]] += 1
        return attend(self, *args, **options)

    FusedMethod.__call__, Attend._call = counted_call, counted_attend
