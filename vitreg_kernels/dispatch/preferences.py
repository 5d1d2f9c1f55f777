"""Which backend a measurement made the default for a call: the user's own table is asked first, then the shipped one.

Where neither has a row for the call, the declared order of the backends decides (``rules.select``). Tables are read
once, when this is imported: torch.compile traces through the choice of a backend, and could not trace reading a file.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from .._symbolic import exporting
from . import calibration, devices, tables
from .request import Request, Workload
from .tables import Key, Table


class Measured(NamedTuple):
    """What a table says of a call.

    Attributes:
        backend: the default.
        date: when that was measured.
        table: the table's name.
    """

    backend: str
    date: str
    table: str


SHIPPED = Table.of("the shipped table", tables.defaults(tables.read(tables.CONFIGS, "defaults")))

# In the order they are asked.
TABLES: tuple[Table, ...] = (calibration.table(), SHIPPED)

_SUGGESTED = False


def read_calibration() -> None:
    """Read again what the user measured. Graphs that are compiled keep the backends that they have."""
    global TABLES
    TABLES = (calibration.table(), SHIPPED)


def workload(
    request: Request,
    device: torch.device,
    tokens: int,
    heads: int,
    inputs: Iterable[Tensor | None],
) -> Workload | None:
    """What measurements tell apart of a call where some table has anything to say about it, elsewhere ``None``.

    A graph that is compiled for any size is bound to the sizes that are measured; where no choice hangs on the size it
    stays free. A program that is exported is for other machines, so what this one measured counts for nothing in it.

    Args:
        request: all else that is known of the call.
        device: of the call.
        tokens, heads: as ``tables.size_of`` takes them.
        inputs: what the op gives gradients of.

    Returns:
        A workload without its variant, which ops spell out where one is wanted only.
    """
    for table in TABLES:
        if not table.sizes:
            continue
        subject = request.op, _device(table, device, request.capability), _dtype(request), _width(request)
        for size in table.sizes.get(subject, ()):
            if exporting():
                return None
            if tables.holds(size, tokens, heads):
                gradients = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
                return Workload(*size, gradients, gpu=_gpu(device))
    return None


def of_size(device: torch.device, tokens: int, heads: int, *, gradients: bool, variant: str) -> Workload:
    """The workload of a call with so many tokens an image and heads, or images, in all; whatever the tables hold."""
    return Workload(*tables.size_of(tokens, heads), gradients, variant, _gpu(device))


def measured(request: Request) -> Measured | None:
    """What the first table that has a row for exactly this call says; ``None`` if there is none."""
    if request.workload is None:
        return None
    for table in TABLES:
        row = table.rows.get(_key(table, request))
        if row is not None:
            return Measured(row.backend, row.date, table.name)
    return None


def wrong(request: Request) -> dict[str, str]:
    """The backends that a measurement of such a call found wrong on this machine, and what was wrong."""
    found = {}
    if request.workload is not None:
        for table in TABLES:
            found.update(table.wrong.get(_key(table, request), {}))
    return found


def ignored(request: Request) -> str:
    """Why what the user measured does not count for a call, or not all of it; empty if it does or there is nothing."""
    reasons = [table.ignored for table in TABLES]
    if request.workload is not None:
        reasons += [table.disputed.get(_key(table, request), "") for table in TABLES]
    return "; ".join(filter(None, reasons))


def suggest_nothing() -> None:
    """Let ``suggest_calibration`` say nothing from now on: it is being done."""
    global _SUGGESTED
    _SUGGESTED = True


def suggest_calibration(device: str) -> None:
    """Say once a process, on a GPU that was never calibrated, that it can be. Of several ranks the first says it."""
    global _SUGGESTED
    first = os.environ.get("RANK", "0") == "0" and os.environ.get("LOCAL_RANK", "0") == "0"
    if device != "cuda" or _SUGGESTED or not first or calibration.path() is None:
        return
    _SUGGESTED = True
    if not any(devices.is_gpu(name) for table in TABLES for _, name, *_ in table.sizes):
        with contextlib.suppress(Warning):  # where warnings are made errors, a hint is none
            warnings.warn(
                "torch's own kernels serve this GPU until it is calibrated: `vitreg calibrate` takes a minute or two "
                "and makes the fastest the default (VITREG_CALIBRATION=0 leaves it so, without this line)",
                stacklevel=2,
            )


def key_of(request: Request, device: str) -> Key:
    """What a row decides for that is made for such a call, its workload known, on a device of that name."""
    tokens, heads, gradients, variant, _ = request.workload
    width = _width(request)
    return Key(request.op, device, _dtype(request), width, tokens, heads, gradients, variant, request.features)


def _key(table: Table, request: Request) -> Key:
    name = request.workload.gpu if table.of_one_gpu else ""
    return key_of(request, name or devices.kind(request.device, request.capability))


def _device(table: Table, device: torch.device, capability: int) -> str:
    if table.of_one_gpu and device.type == "cuda":
        return devices.gpu(device)
    return devices.kind(device.type, capability)


def _gpu(device: torch.device) -> str:
    return devices.gpu(device) if device.type == "cuda" and any(table.of_one_gpu for table in TABLES) else ""


def _dtype(request: Request) -> str:
    return str(request.dtype).removeprefix("torch.")


def _width(request: Request) -> int:
    return request.head_dim or request.channels or 0
