"""What importing the package loads and costs, and which way imports point."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vitreg_kernels
from vitreg_kernels.ops import catalogue

PACKAGE = Path(vitreg_kernels.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
OPTIONAL = {
    "triton",
    "xformers",
    "flash_attn",
    "flash_attn_interface",
    "timm",
    "transformers",
    "matplotlib",
    "torchvision",
    "open_clip",
    "onnx",
    "onnxruntime",
}

# What only ``analysis`` uses, where it may stand at the top of a file.
ANALYSIS = {"scipy", "sklearn", "jinja2", "markupsafe", "PIL"}  # and tqdm, which torch loads itself

OPS = sorted(path.parent.name for path in (PACKAGE / "ops").glob("*/api.py"))
BACKENDS = {
    op: sorted(path.stem for path in (PACKAGE / "ops" / op / "backends").iterdir() if not path.name.startswith("__"))
    for op in OPS
}

# A row may import itself and the rows below it. The face of the package, which imports from all, is in none.
LAYERS = (
    ("cli", "__main__"),
    ("analysis",),
    ("monitor",),
    ("integrations",),
    ("nn", "measure"),
    ("functional", "ops.catalogue"),
    tuple(f"ops.{op}" for op in OPS),
    ("dispatch", "_triton", "_native", "ops._shared", "layout", "errors", "_symbolic", "_version"),
)


def imports_of(path: Path, *, at_top: bool = False) -> set[str]:
    """Dotted names of the modules a file imports, those of the package absolute; only at import time if `at_top`."""
    found = set()
    for prefix, names in _imported(path, at_top=at_top):
        found |= {prefix, *(f"{prefix}.{name}" for name in names)}
    return found


def files_imported_by(path: Path) -> set[str]:
    """Of the package: ``from .room import thing`` is of the file ``thing`` if it is one, else of the room's face."""
    found = set()
    for prefix, names in _imported(path):
        found |= {f"{prefix}.{name}" if f"{prefix}.{name}" in FILES else prefix for name in names or [""]}
    return found & FILES.keys()


def _imported(path: Path, *, at_top: bool = False) -> Iterator[tuple[str, list[str]]]:
    """Each import as a module and the names taken from it, none if it is taken whole."""
    package = ("vitreg_kernels", *path.relative_to(PACKAGE).parent.parts)
    tree = ast.parse(path.read_text())
    for node in _executed_on_import(tree) if at_top else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            yield ".".join((*base, *filter(None, [node.module]))), [alias.name for alias in node.names]


def _executed_on_import(tree: ast.AST):
    """All nodes but those in function bodies and those for type checkers."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
            yield from _executed_on_import(child)


def layer_of(name: str) -> int | None:
    inside = name.removeprefix("vitreg_kernels.")
    return next((i for i, row in enumerate(LAYERS) if any(f"{inside}.".startswith(f"{room}.") for room in row)), None)


def name_of(path: Path) -> str:
    return ".".join(("vitreg_kernels", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


FILES = {name_of(path): path for path in MODULES}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down(path: Path) -> None:
    own = layer_of(name_of(path))
    if name_of(path) in ("vitreg_kernels", "vitreg_kernels.ops"):
        return
    assert own is not None, f"{path.name} stands in no layer: add it to LAYERS"
    upward = {name for name in imports_of(path) if (layer := layer_of(name)) is not None and layer < own}
    assert not upward


@pytest.mark.parametrize("op", OPS)
def test_no_op_imports_another(op: str) -> None:
    others = tuple(f"vitreg_kernels.ops.{other}." for other in OPS if other != op)
    for path in (PACKAGE / "ops" / op).rglob("*.py"):
        assert not {name for name in imports_of(path) if f"{name}.".startswith(others)}, path


def test_no_file_imports_itself_by_way_of_others() -> None:
    imports = {name: files_imported_by(path) for name, path in FILES.items()}
    while leaves := [name for name, found in imports.items() if not found & imports.keys()]:
        for name in leaves:
            del imports[name]
    assert not imports, "a circle is among these"


@pytest.mark.parametrize(("op", "backend"), [(op, backend) for op in BACKENDS for backend in BACKENDS[op]])
def test_backends_import_neither_each_other_nor_the_reference(op: str, backend: str) -> None:
    folder = PACKAGE / "ops" / op / "backends"
    files = (
        [folder / f"{backend}.py"] if (folder / f"{backend}.py").exists() else sorted((folder / backend).glob("*.py"))
    )
    assert files
    base = f"vitreg_kernels.ops.{op}"
    others = {f"{base}.backends.{other}" for other in BACKENDS[op] if other != backend}
    forbidden = (
        others | {f"{base}.api", f"{base}.autograd"} | ({f"{base}.reference"} if backend != "reference" else set())
    )
    for file in files:
        assert not {n for n in imports_of(file) if any(n == f or n.startswith(f"{f}.") for f in forbidden)}


@pytest.mark.parametrize("op", OPS)
def test_every_file_of_a_backend_is_in_the_registry(op: str) -> None:
    """One named as its file or folder; a folder may hold others, whose names begin with its own."""
    names = [backend.name for backend in catalogue.OPS[op].backends]
    assert set(BACKENDS[op]) <= set(names)
    assert all(name in BACKENDS[op] or name.partition("_")[0] in BACKENDS[op] for name in names)


@pytest.mark.parametrize("op", BACKENDS)
def test_schemas_need_torch_alone(op: str) -> None:
    names = imports_of(PACKAGE / "ops" / op / "schema.py")
    inside = {name for name in names if name.startswith(f"vitreg_kernels.ops.{op}.")}
    assert all(name.startswith(f"vitreg_kernels.ops.{op}.types") for name in inside)
    assert {name.split(".")[0] for name in names - inside} <= {"__future__", "torch", "vitreg_kernels"}


def test_optional_libraries_are_imported_where_they_are_used() -> None:
    """Only the kernel modules, themselves imported inside functions, may import triton at their top, and only
    ``analysis``, whose extra has it, matplotlib."""
    kernels = [PACKAGE / "ops" / op / "backends" / "triton" for op in BACKENDS]
    for path in MODULES:
        if path.parent in kernels and path.name not in ("__init__.py", "plan.py", "tiles.py"):
            continue
        if path in (PACKAGE / "_triton" / "offline.py", PACKAGE / "ops" / "_shared" / "triton_rows.py"):
            continue
        loaded = {name.split(".")[0] for name in imports_of(path, at_top=True)}
        optional = OPTIONAL - {"matplotlib"} if PACKAGE / "analysis" in path.parents else OPTIONAL
        assert not loaded & optional, path


def test_importing_loads_no_optional_library() -> None:
    names = OPTIONAL | ANALYSIS | {"torch.distributed.tensor"}
    code = f"import sys, vitreg_kernels; print(sorted({names!r} & set(sys.modules)))"
    assert run(code) == "[]"


def test_importing_adds_little_to_torch(tmp_path: Path) -> None:
    """Less than a twelfth of the processor time of torch's own import, which a busy or slow machine makes longer too.

    With byte code, as pip installs it: the first of the processes writes it. The best of three counts.
    """
    code = (
        "import time; t = time.process_time; before = t(); import torch; between = t(); import vitreg_kernels; "
        "print((t() - between) / (between - before))"
    )
    byte_code = {"PYTHONPYCACHEPREFIX": str(tmp_path), "PYTHONDONTWRITEBYTECODE": ""}
    assert min(float(run(code, **byte_code)) for _ in range(3)) < 1 / 12


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
