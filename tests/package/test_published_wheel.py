"""The wheel for Linux on x86-64: with the native library, for every Python and wherever torch's wheels go."""

from __future__ import annotations

import platform
import re
import sys
import zipfile
from pathlib import Path

import pytest
from environments import environment, run
from packaging.utils import parse_wheel_filename

import vitreg_kernels
from tools import dist
from vitreg_kernels._native import library

pytestmark = [
    pytest.mark.skipif((sys.platform, platform.machine()) != ("linux", "x86_64"), reason="of Linux on x86-64"),
    pytest.mark.skipif(bool(library.faults()), reason="; ".join(library.faults())),
]


def test_it_is_for_any_python_and_for_glibc_2_28(published):
    """auditwheel gave it the name, after a look at what the library needs."""
    name, version, _, tags = parse_wheel_filename(published.wheel.name)
    assert (name, str(version)) == ("vitreg-kernels", vitreg_kernels.__version__)
    assert {(tag.interpreter, tag.abi) for tag in tags} == {("py3", "none")}
    assert dist.PLATFORM in {tag.platform for tag in tags}


def test_it_holds_one_library_and_what_the_wheel_without_it_holds(published, wheel):
    def held(path: Path) -> set[str]:
        with zipfile.ZipFile(path) as file:
            return {name for name in file.namelist() if ".dist-info/" not in name and not name.endswith("/")}

    assert held(published.wheel) - held(wheel) == {"vitreg_kernels/_native/libvitreg_cpu.so"}
    assert held(wheel) <= held(published.wheel)


def test_its_library_runs(published, tmp_path):
    installed = environment(published.wheel, tmp_path)
    chosen = ("--device", "cpu", "--op", "token_norms", "--backend", "cpu")  # which, named, runs or fails
    shown = run(installed / "vitreg", "check", *chosen, cwd=tmp_path)
    assert re.search(r"^[1-9]\d* passed, 0 failed$", shown, flags=re.MULTILINE)
