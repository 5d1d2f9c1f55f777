"""``vitreg check``: accuracy of the backends on this machine, as a table that grows line by line."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from ..measure.accuracy import Accuracy
from ..measure.cases.tensors import short
from ..measure.check import Result, reasons_against, usable_backends
from ..measure.check import check as measure
from ..ops.catalogue import OPS
from .device import usable

_COLUMNS = "{:<13} {:<9} {:<43} {:<5} {:<20} {:>8} {:>8} {:>8} {:>8}  {}"


def check(ops: Sequence[str] | None, names: Sequence[str] | None, device: str) -> int:
    """Print the table.

    Args:
        ops: the ops to check; by default all.
        names: of backends, each for the chosen ops that have one of that name; by default all that are usable.
        device: where to run.

    Returns:
        0 if every result is within its bounds, 1 if one is not or nothing was checked, 2 if it cannot be checked.
    """
    try:
        chosen = _backends(list(dict.fromkeys(ops or OPS)), names, device)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"accuracy on {device} against fp64: of each case the tensor that comes nearest to the bound of its error")
    print(_COLUMNS.format("op", "backend", "case", "dtype", "tensor", "max", "eager", "mean", "eager", "of bound"))
    passed = failed = 0
    for result in measure(chosen, torch.device(device)):
        print(_line(result), flush=True)
        failed += bool(result.failed)
        passed += bool(result.errors) and not result.failed
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or not passed else 0


def _backends(ops: list[str], names: Sequence[str] | None, device: str) -> dict[str, tuple[str, ...]]:
    """The backends to check by op.

    Raises:
        ValueError: if there is no such op, backend or device, or a backend that was named does not run there.
    """
    for op in ops:
        if op not in OPS:
            raise ValueError(f"unknown op {op!r}: expected any of {', '.join(OPS)}")
    having = {op: [b.name for b in OPS[op].backends] for op in ops}
    known = list(dict.fromkeys(name for its in having.values() for name in its))
    for name in names or ():
        if name not in known:
            raise ValueError(f"unknown backend {name!r}: expected any of {', '.join(known)}")
    usable(device, "check")
    if names is None:
        return {op: usable_backends(op, torch.device(device)) for op in ops}
    chosen = {op: tuple(name for name in dict.fromkeys(names) if name in its) for op, its in having.items()}
    for name in names:
        against = [reasons_against(op, name, torch.device(device)) for op, its in chosen.items() if name in its]
        if all(against):
            reasons = dict.fromkeys(reason for of_op in against for reason in of_op)
            raise ValueError(f"backend {name!r} cannot be checked on {device}: {'; '.join(reasons)}")
    return chosen


def _line(result: Result) -> str:
    head = result.op, result.backend, result.case, short(result.dtype)
    if result.crash:
        return _COLUMNS.format(*head, *[""] * 5, f"FAIL: {result.crash}")
    if result.reasons:
        return _COLUMNS.format(*head, *[""] * 5, f"not served: {'; '.join(result.reasons)}")
    tensor, worst = max(result.errors.items(), key=_error_over_bound)
    numbers = worst.max_error, worst.eager_max_error, worst.mean_error, worst.eager_mean_error
    verdict = f"FAIL: {', '.join(result.failed)}" if result.failed else "pass"
    return _COLUMNS.format(*head, tensor, *(f"{n:.2e}" for n in numbers), f"{worst.error_over_bound:4.0%}, {verdict}")


def _error_over_bound(named: tuple[str, Accuracy]) -> float:
    return named[1].error_over_bound
