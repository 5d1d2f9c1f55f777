"""Runs the cells of a notebook one after another, without Jupyter: ``python tests/examples/run_notebook.py
NOTEBOOK`` writes into it what they print and draw.
"""

from __future__ import annotations

import base64
import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt


def run(notebook: dict[str, Any]) -> tuple[list[list[dict[str, Any]]], dict[str, Any]]:
    """Run every code cell in one namespace.

    Args:
        notebook: of nbformat 4, without magics and without values on the last lines of cells, which only IPython shows.

    Returns:
        The outputs of each code cell, as the notebook's format has them, and the namespace.
    """
    outputs, names = [], {"__name__": "__main__"}
    with matplotlib.rc_context():
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                outputs.append(_run_cell("".join(cell["source"]), names))
    return outputs, names


def _run_cell(source: str, names: dict[str, Any]) -> list[dict[str, Any]]:
    with redirect_stdout(io.StringIO()) as printed, mock.patch.object(plt, "show"):  # drawn when the cell has ended
        exec(compile(source, "<cell>", "exec"), names)
    text = printed.getvalue().splitlines(keepends=True)
    return [*([{"output_type": "stream", "name": "stdout", "text": text}] if text else []), *_drawn()]


def _drawn() -> list[dict[str, Any]]:
    """Every open figure as a PNG; they are closed."""
    found = []
    for number in plt.get_fignums():
        file = io.BytesIO()
        plt.figure(number).savefig(file, format="png", metadata={"Software": None})
        data = {"image/png": base64.b64encode(file.getvalue()).decode()}
        found.append({"output_type": "display_data", "data": data, "metadata": {}})
    plt.close("all")
    return found


def main(path: Path) -> None:
    """Writes the outputs of a notebook into it."""
    notebook = json.loads(path.read_text())
    outputs = iter(run(notebook)[0])
    for count, cell in enumerate((c for c in notebook["cells"] if c["cell_type"] == "code"), 1):
        cell["execution_count"], cell["outputs"] = count, next(outputs)
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
