"""What a user installs who has no compiler: the package alone, where there is torch and nothing of this checkout."""

from __future__ import annotations

import importlib.util
import re
import zipfile
from pathlib import Path

import pytest
from environments import run

ROOT = Path(__file__).parents[2]


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


def test_it_requires_torch_and_numpy_and_no_triton_of_its_own(wheel):
    with zipfile.ZipFile(wheel) as file:
        (metadata,) = (file.read(name).decode() for name in file.namelist() if name.endswith(".dist-info/METADATA"))
    required = re.findall(r"^Requires-Dist: (.*)$", metadata, flags=re.MULTILINE)
    assert {line for line in required if "extra ==" not in line} == {"torch>=2.10", "numpy"}


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
    assert "native kernels: none, the C++ compiler /bin/false does not answer to --version" in shown


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
