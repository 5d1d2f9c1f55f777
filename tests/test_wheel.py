"""What a user installs: the wheel alone, in an environment that has torch and nothing of this checkout."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: object, cwd: Path, **environment: str) -> str:
    """What the command prints. It sees no variable of the tests, such as ``PYTHONPATH``, that leads back here."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VITREG"))}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=clean | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of what a source distribution holds; without the C++ library, whose build takes a minute."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    leave_out = shutil.ignore_patterns("*.so", "cpu.json", "__pycache__")
    for name in ("csrc", "vitreg_kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=leave_out)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")
    options = ("--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    run(*pip, "wheel", source, *options, cwd=folder, VITREG_NATIVE="0")
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """``bin`` of an environment with the wheel in it, which finds torch where this Python does.

    The path is named in a ``.pth`` file, whose folder's own ``.pth`` files Python does not read: one of them may be
    that of an editable install of this checkout.
    """
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    (packages / "torch_of_the_tests.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check", "--quiet")
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    where = run(python, "-c", "import vitreg_kernels; print(vitreg_kernels.__file__)", cwd=folder).strip()
    assert Path(where) == packages / "vitreg_kernels" / "__init__.py"
    return python.parent


def test_it_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as file:
        held = {name for name in file.namelist() if ".dist-info/" not in name}
    package = ROOT / "vitreg_kernels"
    files = [*package.rglob("*.py"), *(package / "analysis").glob("*.json")]
    sources = {path.relative_to(ROOT).as_posix() for path in files}
    assert sources <= held
    assert {name.partition("/")[0] for name in held} == {"vitreg_kernels"}
    templates = {name for name in held if name.startswith("vitreg_kernels/analysis/page/templates/")}
    assert {Path(name).suffix for name in templates} == {".html", ".css", ".js"}
    assert all(name.endswith((".py", ".json", "py.typed")) for name in held - templates)


def test_whatever_measures_is_in_it(installed, tmp_path):
    code = """
import importlib, pkgutil
from vitreg_kernels import measure
for module in pkgutil.walk_packages(measure.__path__, "vitreg_kernels.measure."):
    print(importlib.import_module(module.name).__name__)
"""
    imported = run(installed / "python", "-c", code, cwd=tmp_path).split()
    assert {"vitreg_kernels.measure.race", "vitreg_kernels.measure.cases.attention"} <= set(imported)


def test_vitreg_info(installed, tmp_path):
    shown = run(installed / "vitreg", "info", cwd=tmp_path)
    assert "native kernels: none, it was installed with VITREG_NATIVE=0" in shown


def test_vitreg_check(installed, tmp_path):
    """Of two ops: attention's cases take half a minute, and need nothing that these do not."""
    ops = ("--op", "token_norms", "--op", "assemble")
    shown = run(installed / "vitreg", "check", "--device", "cpu", *ops, cwd=tmp_path)
    assert re.search(r"^[1-9]\d* passed, 0 failed$", shown, flags=re.MULTILINE)


def first_block() -> tuple[str, str]:
    """The README's first code, and what it says that it prints."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.search(r"^```python\n(.*?)^```\n```\n(.*?)^```", readme, flags=re.MULTILINE | re.DOTALL).groups()


def assert_prints_as_promised(shown: str) -> None:
    assert shown.splitlines()[1:] == first_block()[1].splitlines()[1:]  # the first line is a difference by rounding
    difference = float(re.fullmatch(r"tensor\((.*)\)", shown.splitlines()[0]).group(1))
    assert difference < 1e-6


needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")


@needs_timm
def test_the_readme_starts_with_code_that_runs(installed, tmp_path):
    """Where the wheel is installed and torchvision can be imported, by the step that `make` does for it."""
    run(installed / "python", "-m", "benchmarks.torchvision_beside_torch", cwd=ROOT)
    assert_prints_as_promised(run(installed / "python", "-c", first_block()[0], cwd=tmp_path))
    at_start = "import sys; print([name for name in ('torch', 'torchvision') if name in sys.modules])"
    assert run(installed / "python", "-c", at_start, cwd=tmp_path).strip() == "[]"


@needs_timm
def test_the_readme_starts_with_code_that_runs_in_this_very_environment(tmp_path):
    """As a new user tries it after `make`: nothing stands between the block and the environment's Python."""
    assert_prints_as_promised(run(sys.executable, "-c", first_block()[0], cwd=tmp_path))
