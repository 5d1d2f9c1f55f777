"""What a user's strict type checker says of the installed package."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import vitreg_kernels
from vitreg_kernels import functional

USER = Path(__file__).parents[1] / "typing" / "user.py"


def test_a_users_code_is_right_to_the_letter(installed, tmp_path):
    """With the types of the torch that is installed, and without a look into this checkout."""
    options = ("--strict", "--no-incremental", "--config-file=", f"--python-executable={installed / 'python'}")
    done = subprocess.run([sys.executable, "-m", "mypy", *options, USER], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_users_code_has_every_public_name():
    imports = [node for node in ast.walk(ast.parse(USER.read_text())) if isinstance(node, ast.ImportFrom)]
    used = {(node.module, alias.name) for node in imports for alias in node.names}
    assert {name for module, name in used if module == "vitreg_kernels"} >= set(vitreg_kernels.__all__)
    assert {name for module, name in used if module == "vitreg_kernels.functional"} == set(functional.__all__)
