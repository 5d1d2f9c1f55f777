"""An install without a native library: it works, and says why there is none."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from vitreg_kernels._native import library

ROOT = Path(__file__).parents[2]


def run(*command, cwd, **environment):
    clean = {name: value for name, value in os.environ.items() if name not in ("VITREG_NATIVE", "CXX", "PYTHONPATH")}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, env=clean | environment, capture_output=True, text=True
    )


def build(folder, **environment):
    """``setup.py build`` into the folder."""
    return run(
        "setup.py", "-q", "build", "--build-base", folder / "work", "--build-lib", folder, cwd=ROOT, **environment
    )


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def compiler_of_nothing(folder):
    """It answers as a compiler does, and leaves an empty file."""
    work = 'test "$1" = --version && echo nothing 1.0 && exit; while test "$1" != -o; do shift; done; echo > "$2"'
    return script(folder / "compiler", work)


CALL = """
import torch
from vitreg_kernels import cli
from vitreg_kernels._native import library
from vitreg_kernels.functional import register_attention_qkv, residual_layer_norm
assert register_attention_qkv(torch.randn(1, 9, 3, 2, 8)).shape == (1, 9, 16)
assert residual_layer_norm(torch.randn(1, 9, 8), weight=torch.ones(8)).normalized.shape == (1, 9, 8)
print(cli.info())
"""


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": "{folder}/absent"}, "the C++ compiler {folder}/absent does not run"),
        ({"CXX": "/bin/false"}, "the C++ compiler /bin/false does not answer to --version"),
        ({"CXX": "{folder}/broken"}, "failed on csrc/"),
        ({"PATH": "{folder}"}, "there is no C++ compiler (c++, g++ or clang++) on the path"),
        ({"VITREG_NATIVE": "0"}, "it was installed with VITREG_NATIVE=0"),
    ],
    ids=["no such compiler", "no compiler", "failing compile", "nothing on the path", "VITREG_NATIVE=0"],
)
def test_why_there_is_none(environment, reason, tmp_path):
    script(
        tmp_path / "broken", 'test "$1" = --version && echo broken 1.0 && exit; echo "error: no such thing" >&2; exit 1'
    )
    environment = {name: value.format(folder=tmp_path) for name, value in environment.items()}
    reason = reason.format(folder=tmp_path)
    done = build(tmp_path, **environment)
    assert done.returncode == 0, done.stderr
    assert reason in done.stdout
    native = tmp_path / "vitreg_kernels" / "_native"
    assert not (native / "libvitreg_cpu.so").exists()
    assert reason in json.loads((native / "cpu.json").read_text())["reason"]


def test_without_one_calls_are_served_and_info_says_why(tmp_path):
    build(tmp_path, CXX="/bin/false")
    reason = json.loads((tmp_path / "vitreg_kernels" / "_native" / "cpu.json").read_text())["reason"]
    shown = run("-c", CALL, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    line = next(line for line in shown.stdout.splitlines() if line.startswith("native kernels: none, "))
    assert reason in line


def test_one_that_is_asked_for_and_fails_is_an_error(tmp_path):
    done = build(tmp_path, VITREG_NATIVE="cpu", CXX="/bin/false")
    assert done.returncode == 1
    assert done.stderr.strip().endswith(
        "VITREG_NATIVE=cpu, but the native library cannot be built: "
        "the C++ compiler /bin/false does not answer to --version"
    )


def test_an_unknown_wish_is_an_error(tmp_path):
    done = build(tmp_path, VITREG_NATIVE="yes")
    assert done.returncode == 1
    assert "VITREG_NATIVE must be auto, cpu or 0, got 'yes'" in done.stderr


@pytest.mark.parametrize("jobs", ["four", "0", "-1"])
def test_an_odd_number_of_jobs_is_an_error(jobs, tmp_path):
    done = build(tmp_path, CXX=compiler_of_nothing(tmp_path), MAX_JOBS=jobs)
    assert done.returncode == 1
    assert done.stderr.strip().endswith(f"MAX_JOBS must be a number of processes, 1 or more, got {jobs!r}")


@pytest.mark.parametrize(
    ("compiles", "wish", "holds"), [(True, "auto", True), (False, "auto", False), (True, "0", False)]
)
def test_a_wheel_is_for_a_platform_if_it_holds_a_library(compiles, wish, holds, tmp_path):
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc", "vitreg_kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "cpu.json"))
    tables = tmp_path / "vitreg_kernels" / "dispatch" / "configs"  # as measurements write them
    tables.mkdir(exist_ok=True)
    (tables / "sm_90.json").write_text("{}")
    compiler = compiler_of_nothing(tmp_path) if compiles else "/bin/false"
    done = run("setup.py", "-q", "bdist_wheel", cwd=tmp_path, VITREG_NATIVE=wish, CXX=compiler)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert "-py3-none-" in wheel.name
    assert wheel.name.endswith("-any.whl") == (not holds)
    with zipfile.ZipFile(wheel) as file:
        held = {name.removeprefix("vitreg_kernels/") for name in file.namelist()}
    assert {"py.typed", "_native/library.py", "_native/cpu.json", "dispatch/configs/sm_90.json"} <= held
    assert ("_native/libvitreg_cpu.so" in held) == holds


def test_a_library_that_was_built_in_the_same_way_is_not_built_again(tmp_path):
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("csrc", "vitreg_kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "cpu.json"))
    in_place = tmp_path / "vitreg_kernels" / "_native" / "libvitreg_cpu.so"

    def packed(**environment):
        """What a build puts into the package of this checkout's copy."""
        environment = {"CXX": compiler_of_nothing(tmp_path)} | environment
        done = run("setup.py", "-q", "build", "--build-lib", tmp_path / "lib", cwd=tmp_path, **environment)
        assert done.returncode == 0, done.stderr
        return (tmp_path / "lib" / "vitreg_kernels" / "_native" / "libvitreg_cpu.so").read_text()

    done = run("setup.py", "-q", "build_ext", "--inplace", cwd=tmp_path, CXX=compiler_of_nothing(tmp_path))
    assert done.returncode == 0, done.stderr
    in_place.write_text("built before")
    assert packed() == "built before"
    assert packed(CXXFLAGS="-O1") == "\n"
    assert packed(LDFLAGS="-s") == "\n"
    (tmp_path / "csrc" / "cpu" / "vec.h").write_text("// other sources")
    assert packed() == "\n"
    # What a second installation finds is what the first one built.
    (tmp_path / "lib" / "vitreg_kernels" / "_native" / "libvitreg_cpu.so").write_text("built at first")
    assert packed() == "built at first"
    # While another is built there is none, lest half of one is taken for a whole one after a cut.
    told, work = Path(compiler_of_nothing(tmp_path)).read_text().removeprefix("#!/bin/sh\n").split(" && exit; ")
    there = tmp_path / "lib" / "vitreg_kernels" / "_native" / "libvitreg_cpu.so"
    wary = script(tmp_path / "wary", f"{told} && exit; test -e {there} && case $* in *' -c '*) exit 1;; esac; {work}")
    assert packed(CXX=wary, CXXFLAGS="-O1", VITREG_NATIVE="cpu") == "\n"


def test_a_library_that_does_not_load_is_a_reason(tmp_path):
    shutil.copytree(ROOT / "vitreg_kernels", tmp_path / "vitreg_kernels", ignore=shutil.ignore_patterns("*.so"))
    broken = tmp_path / "vitreg_kernels" / "_native" / "libvitreg_cpu.so"
    broken.write_bytes(b"no library")
    shown = run("-c", CALL, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    line = next(line for line in shown.stdout.splitlines() if line.startswith("native kernels: none, "))
    assert "libvitreg_cpu.so" in line


def test_a_checkout_that_hides_an_installed_library_says_so(tmp_path):
    """Python started in a checkout imports the folder there, which ``pip install .`` has left without a library."""
    ignored = shutil.ignore_patterns("*.so", "cpu.json", "__pycache__")
    for folder in ("vitreg_kernels", "csrc"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    shown = run("-c", CALL, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    line = next(line for line in shown.stdout.splitlines() if line.startswith("native kernels: none, "))
    assert f"in the checkout {tmp_path}, which this Python imports" in line


@pytest.mark.skipif(bool(library.faults()), reason="; ".join(library.faults()))
def test_a_library_of_other_sources_is_a_reason(tmp_path):
    """In a checkout, that is: a wheel holds no sources."""
    for folder in ("vitreg_kernels", "csrc"):
        shutil.copytree(ROOT / folder, tmp_path / folder)

    def shown():
        done = run("-c", CALL, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return next(line for line in done.stdout.splitlines() if line.startswith("native kernels: "))

    of_these = shown()
    assert library.isa() in of_these
    header = tmp_path / "csrc" / "cpu" / "vec.h"
    header.write_text(header.read_text() + "\n")
    assert shown() == (
        f"native kernels: none, the library was built from other sources than those in {tmp_path / 'csrc'}; "
        "build it again by python setup.py build_ext --inplace"
    )
    shutil.rmtree(tmp_path / "csrc")
    assert shown() == of_these


@pytest.mark.parametrize(
    "odd",
    [
        '{"reason": null, "instruction_sets": 5}',
        *(pytest.param(odd, marks=pytest.mark.slow) for odd in ("{", "[]", "\xff")),
    ],
)
@pytest.mark.parametrize("built", [False, True])
def test_odd_metadata_breaks_nothing(odd, built, tmp_path):
    if built and library.faults():
        pytest.skip(library.faults()[0])
    native = tmp_path / "vitreg_kernels" / "_native"
    shutil.copytree(ROOT / "vitreg_kernels", tmp_path / "vitreg_kernels")
    (native / "cpu.json").write_text(odd, encoding="latin-1")
    if not built:
        (native / "libvitreg_cpu.so").unlink(missing_ok=True)
    shown = run("-c", CALL, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    line = next(line for line in shown.stdout.splitlines() if line.startswith("native kernels: "))
    assert line.startswith("native kernels: none, ") == (not built)
    assert "None" not in line


def test_it_can_be_left_alone(tmp_path):
    shown = run("-c", CALL, cwd=ROOT, VITREG_NATIVE="0")
    assert "native kernels: none, VITREG_NATIVE=0 is set" in shown.stdout
