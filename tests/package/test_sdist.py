"""The source distribution: what building takes and what tells of the package, and nothing that needs a checkout."""

from __future__ import annotations

import tarfile
from pathlib import Path

import vitreg_kernels

ROOT = Path(__file__).parents[2]


def test_it_holds_the_sources_and_nothing_else(published):
    with tarfile.open(published.sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    assert published.sdist.name == f"vitreg_kernels-{vitreg_kernels.__version__}.tar.gz"
    beside = {"setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE"}
    folders = {name.partition("/")[0] for name in held if "/" in name}
    assert folders == {"csrc", "vitreg_kernels", "vitreg_kernels.egg-info"}
    assert {name for name in held if "/" not in name} == beside | {"PKG-INFO", "setup.cfg"}
    sources = [*(ROOT / "csrc").rglob("*"), *(ROOT / "vitreg_kernels").rglob("*.py")]
    assert {path.relative_to(ROOT).as_posix() for path in sources if path.is_file()} <= held
    assert not [name for name in held if name.endswith((".so", "cpu.json", ".pyc"))]
