"""What ``torch.utils.flop_counter.FlopCounterMode`` counts of the ops, which it cannot look into.

It counts products of matrices and nothing else; so do these formulas.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

_COUNTER = "torch.utils.flop_counter"
_FORMULAS: dict[Any, Callable[..., int]] = {}


def register(op: Any, formula: Callable[..., int]) -> None:
    """Let torch count an op.

    Args:
        op: the packet, ``torch.ops.vitreg.name``.
        formula: called with the op's arguments and ``out_val``, gives the number of operations.
    """
    if _COUNTER in sys.modules:
        _tell(sys.modules[_COUNTER], {op: formula})
    _FORMULAS[op] = formula


def no_products(*_: Any, **__: Any) -> int:
    """Of an op that multiplies no matrices: 0, as torch counts its own norms and sums."""
    return 0


def _tell(counter: ModuleType, formulas: dict[Any, Callable[..., int]]) -> None:
    for op, formula in formulas.items():
        counter.register_flop_formula(op, get_raw=True)(formula)


class _WhenImported(MetaPathFinder):
    """Tells torch's counter the formulas when somebody imports it: it imports all of triton, which takes long."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def and_tell(module: ModuleType) -> None:
                execute(module)
                _tell(module, _FORMULAS)

            spec.loader.exec_module = and_tell
        return spec


if _COUNTER not in sys.modules:
    sys.meta_path.insert(0, _WhenImported())
