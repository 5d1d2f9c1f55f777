"""What importing the package loads and costs, and which way imports point: nn -> functional -> api -> backends."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vitreg_kernels

PACKAGE = Path(vitreg_kernels.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
OPTIONAL = {
    "triton",
    "xformers",
    "timm",
    "transformers",
    "matplotlib",
    "torchvision",
    "open_clip",
    "onnx",
    "onnxruntime",
}

BACKENDS = {
    "assemble": ("composite", "native", "reference", "triton"),
    "attention": ("native", "reference", "sdpa", "triton", "xformers"),
    "residual_norm": ("composite", "native", "reference", "triton"),
    "token_norms": ("composite", "native", "reference", "triton"),
}

# Each layer of the package may import what stands below it, and itself; the backends have a rule of their own.
LAYERS = (
    ("cli", "__main__"),
    ("nn", "check", "integrations", "monitor"),
    ("functional",),
    ("ops",),
    ("_runtime", "layout", "accuracy"),
)


def imports_of(path: Path, *, at_top: bool = False) -> set[str]:
    """Dotted names of the modules a file imports, those of the package absolute; only at import time if `at_top`."""
    package = ("vitreg_kernels", *path.relative_to(PACKAGE).parent.parts)
    tree = ast.parse(path.read_text())
    found = set()
    for node in _executed_on_import(tree) if at_top else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            prefix = ".".join((*base, *filter(None, [node.module])))
            found |= {f"{prefix}.{alias.name}" for alias in node.names} | {prefix}
    return found


def _executed_on_import(tree: ast.AST):
    """All nodes but those in function bodies and those for type checkers."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
            yield from _executed_on_import(child)


def layer_of(name: str) -> int | None:
    parts = name.split(".")
    if parts[0] != "vitreg_kernels" or len(parts) < 2:
        return None
    return next((i for i, layer in enumerate(LAYERS) if parts[1] in layer), None)


def name_of(path: Path) -> str:
    return ".".join(("vitreg_kernels", *path.relative_to(PACKAGE).with_suffix("").parts))


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_down(path: Path) -> None:
    own = layer_of(name_of(path))
    if path.parent == PACKAGE and path.name == "__init__.py":
        return
    assert own is not None, f"{path.name} stands in no layer: add it to LAYERS"
    upward = {name for name in imports_of(path) if (layer := layer_of(name)) is not None and layer < own}
    assert not upward


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


def test_every_backend_is_held_to_that() -> None:
    assert BACKENDS.keys() == {path.name for path in (PACKAGE / "ops").iterdir() if (path / "api.py").exists()}
    for op, names in BACKENDS.items():
        paths = (PACKAGE / "ops" / op / "backends").iterdir()
        assert set(names) == {path.stem for path in paths if not path.name.startswith("__")}


@pytest.mark.parametrize("op", BACKENDS)
def test_schemas_need_torch_alone(op: str) -> None:
    names = imports_of(PACKAGE / "ops" / op / "schema.py")
    inside = {name for name in names if name.startswith(f"vitreg_kernels.ops.{op}.")}
    assert all(name.startswith(f"vitreg_kernels.ops.{op}.types") for name in inside)
    assert {name.split(".")[0] for name in names - inside} <= {"__future__", "torch", "vitreg_kernels"}


def test_optional_libraries_are_imported_where_they_are_used() -> None:
    """Only the kernel modules, themselves imported inside functions, may import triton at their top."""
    kernels = [PACKAGE / "ops" / op / "backends" / "triton" for op in BACKENDS]
    for path in MODULES:
        if path.parent in kernels and path.name not in ("__init__.py", "plan.py"):
            continue
        if path == PACKAGE / "_runtime" / "aot.py":
            continue
        loaded = {name.split(".")[0] for name in imports_of(path, at_top=True)}
        assert not loaded & OPTIONAL, path


def test_importing_loads_no_optional_library() -> None:
    code = f"import sys, vitreg_kernels; print(sorted({OPTIONAL!r} & set(sys.modules)))"
    assert run(code) == "[]"


def test_importing_adds_little_to_torch() -> None:
    """Less than 100 ms of processor time over torch's own import: best of three processes, lest others' work count."""
    code = "import torch, time; t = time.process_time(); import vitreg_kernels; print(time.process_time() - t)"
    assert min(float(run(code)) for _ in range(3)) < 0.1


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
