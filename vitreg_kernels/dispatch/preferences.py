"""Which backend a measurement made the default for a call: the user's own table is asked first, then the shipped one.

Where neither has a row for the call, the declared order of the backends decides (``rules.select``). Tables are read
once, when this is imported: torch.compile traces through the choice of a backend, and could not trace reading a file.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .._native import library
from . import tables
from .request import Request
from .tables import Default, Key, Size


class Table(NamedTuple):
    """Rows of one origin.

    Attributes:
        name: for a person.
        rows: what they decide for -> what they say.
        covers: the ops and devices that it has rows of.
    """

    name: str
    rows: dict[Key, Default]
    covers: frozenset[tuple[str, str]]

    @staticmethod
    def of(name: str, rows: dict[Key, Default]) -> Table:
        """The table of these rows."""
        return Table(name, rows, frozenset((key.op, key.device) for key in rows))


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


# For what a user measures on the machine at hand. Nothing writes it yet, so it is empty.
USER = Table.of("your calibration", {})
SHIPPED = Table.of("the shipped table", tables.defaults(tables.read(tables.CONFIGS, "defaults")))

# In the order they are asked.
TABLES: tuple[Table, ...] = (USER, SHIPPED)

_CPU = f"cpu_{library.isa()}" if library.isa() else "cpu"


def device_name(device: str, capability: int) -> str:
    """What tables call a device: ``"sm_90"``, ``"cpu_avx512"`` (by the instruction set in use), or its type."""
    if device == "cuda":
        return f"sm_{capability}"
    return _CPU if device == "cpu" else device


def size(op: str, device: str, capability: int, tokens: int, heads: int) -> Size | None:
    """The size of a call where some table has rows of its op on its device, elsewhere ``None``.

    A graph that is compiled for any size is bound to this one; where no choice hangs on the size it stays free.
    """
    subject = (op, device_name(device, capability))
    for table in TABLES:
        if subject in table.covers:
            return tables.size_of(tokens, heads)
    return None


def measured(request: Request) -> Measured | None:
    """What the first table that has a row for exactly this call says; ``None`` if there is none."""
    if request.size is None:
        return None
    key = (
        request.op,
        device_name(request.device, request.capability),
        torch.finfo(request.dtype).bits,
        request.head_dim or request.channels or 0,
        request.size.tokens,
        request.size.heads,
        request.features,
    )
    for table in TABLES:
        row = table.rows.get(key)
        if row is not None:
            return Measured(row.backend, row.date, table.name)
    return None
