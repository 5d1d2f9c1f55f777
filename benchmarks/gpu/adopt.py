"""Makes the fastest backend of a GPU run the default there: ``python -m benchmarks.gpu.adopt RESULTS.json``.

Writes into the table of the run's architecture (``dispatch/configs``) what a call that names no backend gets at each
size that was raced. Nobody is to get slower: a backend takes the place of torch's own only where it was raced against
that in every mode, won every race of the size, and nothing of it broke in inputs of that many bits. Multi-crop races
decide nothing: their rows do not say how long an image is.
"""

from __future__ import annotations

import argparse
import datetime
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import results
from benchmarks.gpu import accuracy, norms, race
from benchmarks.gpu.stage import load
from benchmarks.results import Row
from benchmarks.shapes import DTYPES
from vitreg_kernels.dispatch import tables
from vitreg_kernels.dispatch.tables import Default, Key

CHALLENGERS = ("triton",)  # backends that may be the default in the place of torch's own


class Race(NamedTuple):
    """How the rows of an op's races are read.

    Attributes:
        op: the op's name.
        kind: of the rows.
        modes: a backend has to win them all.
        case: fields that tell one race from another.
        width: the field of a row that the table calls so.
        incumbent: torch's own, the default where nothing is measured.
    """

    op: str
    kind: str
    modes: tuple[str, ...]
    case: tuple[str, ...]
    width: str
    incumbent: str


RACES = (
    Race(
        "attention",
        "race",
        ("forward", "forward+backward"),
        ("layout", "dtype", "batch", "heads", "tokens", "head_dim", "mode"),
        "head_dim",
        "sdpa",
    ),
    Race(
        "residual_norm",
        "residual_norm",
        ("forward", "backward"),
        ("norm", "dtype", "batch", "tokens", "channels", "memory", "mode"),
        "channels",
        "composite",
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Adopts what the command line names and returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.adopt", description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path, help="a result file of a GPU run")
    try:
        winners = adopt(parser.parse_args(arguments).results, tables.CONFIGS)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    for key, row in winners.items():
        print(f"{key.op} on {key.device}, {key.bits} bits, width {key.width}, {_size(key)}: {row.backend}")
    print(f"written to {tables.CONFIGS}")
    return 0


def adopt(file: Path, folder: Path) -> dict[Key, Default]:
    """Merges the winners of a result file into its architecture's table in ``folder``, and gives them.

    Raises:
        ValueError: if the file is not of a run on a GPU, or holds no race.
    """
    load()  # the schema of result files is in the stages
    rows = results.load(file)
    device = rows[0]["machine"]["capability"] if rows else "nothing"
    if not device.startswith("sm_"):
        raise ValueError(f"{file} must be of a run on a GPU, not on {device}: run `make gpu` on one")
    winners = {key: Default(backend, _date(file)) for key, backend in defaults(rows, device).items()}
    if not winners:
        raise ValueError(f"{file} holds no race that counts: run `make gpu` with its stages accuracy, race and norms")
    tables.adopt(folder, winners)
    return winners


def defaults(rows: Sequence[Row], device: str) -> dict[Key, str]:
    """The default of each size that was raced on a device."""
    winners = {}
    for of_op in RACES:
        raced = [row for row in rows if _counts(row, of_op)]
        sizes: dict[Key, dict[tuple, dict[str, float]]] = {}  # milliseconds by backend, of each case
        for row in raced:
            times = sizes.setdefault(_key(row, of_op, device), {}).setdefault(_case(row, of_op), {})
            if row["median_ms"] is not None:
                times[_backend(row)] = row["median_ms"]
        for key, cases in sizes.items():
            every_mode = {case[of_op.case.index("mode")] for case in cases} == set(of_op.modes)
            won = [
                challenger
                for challenger in CHALLENGERS
                if every_mode
                and _passed(rows, of_op, challenger, key.bits)
                and all(_wins(challenger, of_op.incumbent, times) for times in cases.values())
            ]
            winners[key] = won[0] if won else of_op.incumbent
    return winners


def _counts(row: Row, of_op: Race) -> bool:
    return (
        row["kind"] == of_op.kind
        and row["mode"] in of_op.modes
        and row.get("layout") != "multicrop"
        and _backend(row) in (*CHALLENGERS, of_op.incumbent)
    )


def _backend(row: Row) -> str:
    return row["variant"].removeprefix("vitreg:")


def _case(row: Row, of_op: Race) -> tuple:
    return tuple(row[name] for name in of_op.case)


def _key(row: Row, of_op: Race, device: str) -> Key:
    """What the race decides for: calls without a mask, rotation or any other feature, like its own."""
    size = tables.size_of(row["tokens"], row["batch"] * row.get("heads", 1))
    return Key(of_op.op, device, _bits(row), row[of_op.width], *size, features=())


def _wins(backend: str, incumbent: str, times: dict[str, float]) -> bool:
    return {backend, incumbent} <= times.keys() and times[backend] == min(times.values())


def _passed(rows: Sequence[Row], of_op: Race, backend: str, bits: int) -> bool:
    """Whether a backend was judged in inputs of so many bits, and nothing about it is wrong in any stage."""
    if of_op.op == "attention":
        judged = [r for r in rows if r["kind"] == "accuracy" and r["backend"] == backend and _bits(r) == bits]
        failures = accuracy.failures(judged)
    else:
        named = f"{of_op.op}:{backend}"
        judged = [r for r in rows if r["kind"] == "norm_accuracy" and r["backend"] == named and _bits(r) == bits]
        failures = norms.failures(judged)
    variant = f"vitreg:{backend}"
    raced = [r for r in rows if r["kind"] == of_op.kind and r["variant"] == variant and _bits(r) == bits]
    broken = race.failures(raced) if of_op.op == "attention" else norms.failures(raced)
    return any(row["errors"] for row in judged) and not failures and not broken


def _bits(row: Row) -> int:
    """Of a number of the inputs; ``tf32`` multiplies inputs of 32."""
    return 32 if row["dtype"] == "tf32" else torch.finfo(DTYPES.get(row["dtype"], torch.float16)).bits


def _date(file: Path) -> str:
    """The day of a run, which stands in its file's name, or else when that was written."""
    found = re.search(r"\d{4}-\d\d-\d\d", file.stem)
    return found.group() if found else datetime.date.fromtimestamp(file.stat().st_mtime).isoformat()


def _size(key: Key) -> str:
    tokens = f"up to {key.tokens}" if key.tokens else f"over {tables.TOKEN_BUCKETS[-1]}"
    heads = f"up to {key.heads}" if key.heads else f"over {tables.HEAD_BUCKETS[-1]}"
    return f"{tokens} tokens, {heads} {'heads' if key.op == 'attention' else 'images'}"


if __name__ == "__main__":
    sys.exit(main())
