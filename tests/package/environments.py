"""Environments that hold what is published and nothing of this checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")


def run(*command: object, cwd: Path, **environment: str) -> str:
    """What the command prints. It sees no variable of the tests, such as ``PYTHONPATH``, that leads back here."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VITREG"))}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=clean | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def environment(wheel: Path, folder: Path) -> Path:
    """``bin`` of an environment with a wheel in it, which finds torch where this Python does.

    The path is named in a ``.pth`` file, whose folder's own ``.pth`` files Python does not read: one of them may be
    that of an editable install of this checkout.
    """
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    (packages / "torch_of_the_tests.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    run(*PIP[:3], "--python", python, *PIP[3:], "install", "--no-deps", "--no-index", wheel, cwd=folder)
    where = run(python, "-c", "import vitreg_kernels; print(vitreg_kernels.__file__)", cwd=folder).strip()
    assert Path(where) == packages / "vitreg_kernels" / "__init__.py"
    return python.parent
