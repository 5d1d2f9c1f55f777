"""Lets torchvision, which timm needs, be imported beside a torch that its wheel was not built against (a CPU build).

Importing it ends there at the fake kernels it registers for two operators that its C++ library failed to bring, so
their bare schemas are declared first. No ViT calls them.

``python -m benchmarks.torchvision_beside_torch`` sets the running environment up so that ``import torchvision`` does
this by itself, as ``make`` does with its own; a copy of this file then lies among the installed packages.
"""

from __future__ import annotations

import shutil
import sysconfig
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def declare() -> None:
    """Declare the operators, unless torchvision brings them; nothing without torchvision."""
    import torch

    spec = PathFinder.find_spec("torchvision")
    if spec is None or hasattr(torch.ops.torchvision, "nms") or _brings_them(Path(spec.origin).parent):
        return
    for name, schema in _SCHEMAS.items():
        torch.library.define(f"torchvision::{name}", schema)


def _brings_them(torchvision: Path) -> bool:
    import torch

    try:
        libraries = list(torchvision.glob("_C*.so"))
        for library in libraries:
            torch.ops.load_library(library)
    except OSError:
        return False
    return bool(libraries)


class Finder:
    """Finds torchvision where it is, and has the operators declared right before it runs."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != "torchvision":
            return None
        spec = PathFinder.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def declare_and_run(module: ModuleType) -> None:
            declare()
            run(module)

        spec.loader.exec_module = declare_and_run
        return spec


def set_up(packages: Path) -> None:
    """Have every Python of an environment ask ``Finder`` first; torch is imported when torchvision is, not before.

    Args:
        packages: the environment's folder of installed packages, whose ``.pth`` files Python runs when it starts.
    """
    name = Path(__file__).stem
    shutil.copyfile(__file__, packages / f"{name}.py")
    (packages / f"{name}.pth").write_text(f"import sys, {name}; sys.meta_path.insert(0, {name}.Finder)\n")


if __name__ == "__main__":
    set_up(Path(sysconfig.get_path("purelib")))
