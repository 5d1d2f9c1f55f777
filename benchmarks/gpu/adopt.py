"""Makes the fastest backend of a GPU run the default there: ``python -m benchmarks.gpu.adopt RESULTS.json``.

Writes, into the configs file of the run's architecture, what a call that names no backend gets at each size that was
raced. Nobody is to get slower: a backend takes sdpa's place only where it won every forward+backward of the size,
packed and separate, and nothing of it broke in inputs of that many bits. Multi-crop races decide nothing: their rows
do not say how long an image is.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import results
from benchmarks.gpu import accuracy, configs, race
from benchmarks.gpu.stage import load
from benchmarks.results import Row
from benchmarks.shapes import DTYPES
from vitreg_kernels._runtime import tuning
from vitreg_kernels.ops.attention.backends import sdpa, triton

CHALLENGERS = (triton.NAME,)  # backends that may be the default in sdpa's place


def main(arguments: Sequence[str] | None = None) -> int:
    """Adopts what the command line names and returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.adopt", description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path, help="a result file of a GPU run")
    try:
        path, winners = adopt(parser.parse_args(arguments).results, tuning.CONFIGS)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    for size, backend in winners.items():
        print(f"{size}: {backend}")
    print(f"written to {path}")
    return 0


def adopt(file: Path, folder: Path) -> tuple[Path, dict[str, str]]:
    """Merges the winners of a result file into its architecture's file in ``folder``; that file, and the winners.

    Raises:
        ValueError: if the file is not of a run on a GPU, or holds no race.
    """
    load()  # the schema of result files is in the stages
    rows = results.load(file)
    capability = rows[0]["machine"]["capability"] if rows else "nothing"
    if not capability.startswith("sm_"):
        raise ValueError(f"{file} must be of a run on a GPU, not on {capability}: run `make gpu` on one")
    winners = fastest(rows)
    if not winners:
        raise ValueError(f"{file} holds no forward+backward race: run `make gpu` with its stages accuracy and race")
    return configs.merge(folder, int(capability.removeprefix("sm_")), {"fastest": winners}), winners


def fastest(rows: Sequence[Row]) -> dict[str, str]:
    """The default of each size that was raced."""
    sizes: dict[str, list[dict[str, float]]] = {}  # milliseconds of each case by backend
    for case in dict.fromkeys(_case(row) for row in rows if _counts(row)):
        its = [row for row in rows if _counts(row) and _case(row) == case]
        times = {
            row["variant"].removeprefix("vitreg:"): row["median_ms"] for row in its if row["median_ms"] is not None
        }
        sizes.setdefault(_size(its[0]), []).append(times)
    winners = {}
    for size, cases in sizes.items():
        won = [name for name in CHALLENGERS if _passed(rows, name, _bits(size)) and all(_wins(name, c) for c in cases)]
        winners[size] = won[0] if won else sdpa.NAME
    return winners


def _counts(row: Row) -> bool:
    return (
        row["kind"] == "race"
        and row["mode"] == "forward+backward"
        and row["layout"] != "multicrop"
        and row["variant"].removeprefix("vitreg:") in (*CHALLENGERS, sdpa.NAME)
    )


def _case(row: Row) -> tuple:
    return tuple(row[name] for name in ("layout", "dtype", "batch", "heads", "tokens", "head_dim"))


def _size(row: Row) -> str:
    return tuning.size_key(DTYPES[row["dtype"]], row["head_dim"], tuning.length_bucket(row["tokens"]))


def _wins(backend: str, times: dict[str, float]) -> bool:
    return backend in times and times[backend] == min(times.values())


def _passed(rows: Sequence[Row], backend: str, bits: str) -> bool:
    """Whether a backend was judged in inputs of so many bits, and nothing about it is wrong in any stage."""
    judged = [r for r in rows if r["kind"] == "accuracy" and r["backend"] == backend and _bits(r["dtype"]) == bits]
    raced = [
        r for r in rows if r["kind"] == "race" and r["variant"] == f"vitreg:{backend}" and _bits(r["dtype"]) == bits
    ]
    ran = any(row["errors"] for row in judged)
    return ran and not accuracy.failures(judged) and not race.failures(raced)


def _bits(name: str) -> str:
    """Of the inputs, from a dtype (``bf16``; ``tf32`` multiplies inputs of 32) or a size (``16-bit,64,272``)."""
    return re.search("16|32", name).group()


if __name__ == "__main__":
    sys.exit(main())
