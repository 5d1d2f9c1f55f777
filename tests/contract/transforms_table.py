"""Writes docs/function_transforms.md from trials, and reads it: ``python tests/contract/transforms_table.py``.

The trials of the Triton kernels run in Triton's interpreter, in a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/function_transforms.md"

Outcomes = dict[tuple[str, str, str], str]  # of trial, op and backend

_NAMES = {
    "Attention": "`register_attention`",
    "PackedAttention": "`register_attention_qkv`",
    "ResidualNorm": "`residual_layer_norm`",
    "TokenNorms": "`token_norms`",
    "TokenNormStats": "`token_norm_stats`",
    "Assemble": "`assemble_tokens`",
}
_HEAD = """# Function transforms

What torch can do with each op, backend by backend: it works and gives the right numbers, or one gets the sentence
quoted. `python tests/contract/transforms_table.py` tries everything on a CPU and writes this page; the tests try it
again. `triton` is tried in Triton's interpreter, which no tracer may look into, so cells of tracers are empty there.
`xformers` and `flash_attn`, which torch.compile cannot trace, need a GPU and were not tried. Every other backend
compiles with `fullgraph=True` and gradients. Of torch's kernels by name, `sdpa_math` does as `reference` and the others
do as `sdpa`, but none is written to ONNX, and `torch.jit.trace` keeps only `sdpa_flash` and `sdpa_math`. A graph keeps
the kernel that was the default when it was made. What tracers do of packed attention is told at
`register_attention`. A call that names no backend takes one that can be traced (`explain` says which). That a second
derivative will be asked for nobody knows when the call is made: where the default is `sdpa` or one of torch's kernels,
which have none but for the formula, name `reference`.

The first derivative is a kernel's own. A second derivative and a forward-mode one are those of the formula, plain torch
code, which holds N x N numbers where attention is concerned. `vmap` folds the mapped dimension into the batch, or into
the tokens of a pack; where each call has parameters, or gradients of parameters, of its own, the formula is mapped.
`cu_seqlens` is not mapped.

torch.export takes any batch and number of tokens of an op or a module, and any height and width of a `RegisterViT`,
whatever the example's size. Where tokens are cut off an open number of them, as `TokenLayout.split` and a rotation in
torch code do, torch itself asks for `Dim("tokens", min=...)` or `Dim.AUTO`.

A backend named in an exported program stays the one that runs it; such a program and a TorchScript file need `import
vitreg_kernels` where they are loaded. ONNX files are torch's own operations and need nothing.
"""


def outcomes(folder: Path) -> Outcomes:
    """Of all trials that run in this process."""
    from contract.test_contract import OPS
    from contract.transforms import TRIALS, is_tried, outcome

    return {
        (trial.name, str(op), backend.name): outcome(trial, op, backend.name, folder)
        for trial in TRIALS
        for op in OPS
        if is_tried(trial, op)
        for backend in op.backends
    }


def page(found: Outcomes) -> str:
    """One table an op, the sentences below it."""
    trials = list(dict.fromkeys(trial for trial, _, _ in found))
    parts = [_HEAD]
    for op, name in _NAMES.items():
        backends = list(dict.fromkeys(backend for _, its, backend in found if its == op))
        sentences: list[str] = []
        lines = ["| | " + " | ".join(f"`{b}`" for b in backends) + " |", "|---" * (len(backends) + 1) + "|"]
        for trial in trials:
            cells = [found.get((trial, op, backend)) for backend in backends]
            if any(cells):
                lines.append(f"| {trial} | " + " | ".join(_cell(cell, sentences) for cell in cells) + " |")
        notes = [f"{i}. {sentence}" for i, sentence in enumerate(sentences, 1)]
        parts += [f"## {name}\n", *lines, "", *notes, *([""] if notes else [])]
    return "\n".join(parts).rstrip() + "\n"


def _cell(outcome: str | None, sentences: list[str]) -> str:
    if outcome is None or outcome == "works":
        return outcome or ""
    if outcome not in sentences:
        sentences.append(outcome)
    return f"({sentences.index(outcome) + 1})"


def read() -> Outcomes:
    """What the page says."""
    found: Outcomes = {}
    ops = {name: op for op, name in _NAMES.items()}
    for section in PAGE.read_text().split("\n## ")[1:] if PAGE.exists() else ():
        title, *lines = section.splitlines()
        rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("|")]
        sentences = dict(line.split(". ", 1) for line in lines if line[:1].isdigit())
        (_, *backends), _, *body = rows
        for trial, *cells in body:
            for backend, cell in zip(backends, cells, strict=True):
                if cell:
                    outcome = sentences[cell.strip("()")] if cell.startswith("(") else cell
                    found[trial.strip(), ops[title], backend.strip("`")] = outcome
    return found


def _ordered(found: Outcomes) -> Outcomes:
    from contract.test_contract import OPS
    from contract.transforms import TRIALS

    keys = [(t.name, str(op), b.name) for t in TRIALS for op in OPS for b in op.BACKENDS]
    return {key: found[key] for key in keys if key in found}


def main(arguments: Iterable[str]) -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    with tempfile.TemporaryDirectory() as folder:
        found = outcomes(Path(folder))
    if list(arguments) == ["--json"]:  # for the process that writes the page
        print(json.dumps([[*key, outcome] for key, outcome in found.items()]))
        return
    interpreted = subprocess.run(
        [sys.executable, __file__, "--json"],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        check=True,
    )
    found |= {(trial, op, backend): outcome for trial, op, backend, outcome in json.loads(interpreted.stdout)}
    PAGE.write_text(page(_ordered(found)))


if __name__ == "__main__":
    main(sys.argv[1:])
