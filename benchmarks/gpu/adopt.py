"""Makes the fastest backend of a GPU run the default there: ``python -m benchmarks.gpu.adopt RESULTS.json``.

Writes into the table of the run's architecture (``dispatch/configs``) what a call that names no backend gets at each
size that was raced, with gradients and without. Nobody is to get slower: a backend takes the place of torch's own
choice only where it was raced against that, won every race of the size, and nothing of it broke in inputs of that many
bits; and only where the stage that judges it was finished. Multi-crop races decide nothing: their rows do not say how
long an image is.
"""

from __future__ import annotations

import argparse
import datetime
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import results
from benchmarks.gpu import accuracy, memcheck, norms, race, smoke
from benchmarks.gpu.stage import load
from benchmarks.results import Row
from benchmarks.shapes import DTYPES
from vitreg_kernels.dispatch import tables
from vitreg_kernels.dispatch.calibration import LEAST_LEAD
from vitreg_kernels.dispatch.tables import Default, Key
from vitreg_kernels.ops.attention import features as attention_features
from vitreg_kernels.ops.residual_norm import features as norm_features

# Backends that may be the default in the place of torch's own choice.
CHALLENGERS = ("triton", "sdpa_flash", "sdpa_cudnn", "sdpa_efficient", "sdpa_math")


class Race(NamedTuple):
    """How the rows of an op's races are read.

    Attributes:
        op: the op's name.
        kind: of the rows.
        stages: those that judge the op's backends, and race them.
        modes: those that a backend has to win to be the default without gradients, and with.
        case: fields that tell one race from another.
        width: the field of a row that the table calls so.
        variant: what a row's calls are called in the table.
        incumbent: torch's own choice, the default where nothing is measured.
    """

    op: str
    kind: str
    stages: tuple[str, ...]
    modes: Mapping[bool, tuple[str, ...]]
    case: tuple[str, ...]
    width: str
    variant: Callable[[Row], str]
    incumbent: str


def _of_attention(row: Row) -> str:
    return attention_features.variant_of(packed_projection=row["layout"] == "packed", statistics=False)


def _of_norm(row: Row) -> str:
    dtype = DTYPES[row["dtype"]]
    return norm_features.variant_of(
        rms=row["norm"] == "RMSNorm", branch=dtype, scaled=True, dropped=False, normalized=dtype
    )


RACES = (
    Race(
        "attention",
        "race",
        (accuracy.NAME, race.NAME),
        {False: ("forward",), True: ("forward+backward",)},
        ("layout", "dtype", "batch", "heads", "tokens", "head_dim", "mode"),
        "head_dim",
        _of_attention,
        "sdpa",
    ),
    Race(
        "residual_norm",
        "residual_norm",
        (norms.NAME,),
        {False: ("forward",), True: ("forward", "backward")},
        ("norm", "dtype", "batch", "tokens", "channels", "memory", "mode"),
        "channels",
        _of_norm,
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
        training = ", training" if key.gradients else ""
        print(f"{key.op} on {key.device}, {key.dtype}, width {key.width}, {_size(key)}{training}: {row.backend}")
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
        raise ValueError(
            f"{file} holds no race that counts: run `make gpu` until nothing is unfinished of accuracy, race and norms"
        )
    tables.adopt(folder, winners)
    return winners


def defaults(rows: Sequence[Row], device: str) -> dict[Key, str]:
    """The default of each size that was raced in every mode on a device, by a run that judged all it had to."""
    winners = {}
    for of_op in RACES:
        sizes: dict[Key, dict[tuple, dict[str, float]]] = {}  # milliseconds by backend, of each case
        for row in rows:
            if not _counts(row, of_op):
                continue
            for gradients, modes in of_op.modes.items():
                if row["mode"] in modes:
                    key = _key(row, of_op, device, gradients)
                    times = sizes.setdefault(key, {}).setdefault(_case(row, of_op), {})
                    if row["median_ms"] is not None:
                        times[_backend(row)] = row["median_ms"]
        if not _finished(rows, of_op):
            continue
        for key, cases in sizes.items():
            if {case[of_op.case.index("mode")] for case in cases} != set(of_op.modes[key.gradients]):
                continue
            leads = {
                challenger: lead
                for challenger in CHALLENGERS
                if _passed(rows, of_op, challenger, key.dtype)
                if (lead := _lead(challenger, of_op.incumbent, list(cases.values()))) is not None
            }
            winners[key] = max(leads, key=leads.__getitem__, default=of_op.incumbent)
    return winners


def _counts(row: Row, of_op: Race) -> bool:
    return (
        row["kind"] == of_op.kind
        and row.get("layout") != "multicrop"
        and _backend(row) in (*CHALLENGERS, of_op.incumbent)
    )


def _backend(row: Row) -> str:
    return row["variant"].removeprefix("vitreg:")


def _case(row: Row, of_op: Race) -> tuple:
    return tuple(row[name] for name in of_op.case)


def _key(row: Row, of_op: Race, device: str, gradients: bool) -> Key:
    """What the race decides for: calls without a mask, rotation or any other feature, like its own."""
    size = tables.size_of(row["tokens"], row["batch"] * row.get("heads", 1))
    dtype = str(DTYPES[row["dtype"]]).removeprefix("torch.")
    return Key(of_op.op, device, dtype, row[of_op.width], *size, gradients, of_op.variant(row), features=())


def _lead(backend: str, incumbent: str, cases: Sequence[Mapping[str, float]]) -> float | None:
    """How many times as fast as torch's own choice over all cases; ``None`` where it does not lead in each."""
    if not all({backend, incumbent} <= times.keys() for times in cases):
        return None
    leads = [times[incumbent] / times[backend] for times in cases]
    return None if min(leads) < LEAST_LEAD else math.prod(leads) ** (1 / len(leads))


def _finished(rows: Sequence[Row], of_op: Race) -> bool:
    """Whether all was judged and raced that had to be: what was not reached, or broke, may be what fails or loses."""
    last = {row["stage"]: row for row in rows if row["kind"] == "stage"}
    ended = all(name in last and last[name]["unfinished"] == 0 and not last[name]["error"] for name in of_op.stages)
    broken = any(row["kind"] == "broken" and row["stage"] in of_op.stages for row in rows)
    return ended and not broken


def _passed(rows: Sequence[Row], of_op: Race, backend: str, dtype: str) -> bool:
    """Whether a backend was judged in a dtype, and nothing about it is wrong in any stage in inputs of as many bits."""
    bits = torch.finfo(getattr(torch, dtype)).bits
    if of_op.op == "attention":
        judged = [r for r in rows if r["kind"] == "accuracy" and r["backend"] == backend and _bits(r) == bits]
        smoked = [
            r for r in rows if r["kind"] == memcheck.NAME or (r["kind"], r.get("backend")) == (smoke.NAME, backend)
        ]
        failures = accuracy.failures(judged) + smoke.failures(smoked)
    else:
        named = f"{of_op.op}:{backend}"
        judged = [r for r in rows if r["kind"] == "norm_accuracy" and r["backend"] == named and _bits(r) == bits]
        failures = norms.failures(judged)
    variant = f"vitreg:{backend}"
    raced = [r for r in rows if r["kind"] == of_op.kind and r["variant"] == variant and _bits(r) == bits]
    broken = race.failures(raced) if of_op.op == "attention" else norms.failures(raced)
    in_dtype = any(r["errors"] and str(_dtype(r)).removeprefix("torch.") == dtype for r in judged)
    return in_dtype and not failures and not broken


def _dtype(row: Row) -> torch.dtype:
    """Of the inputs; ``tf32`` multiplies inputs of fp32."""
    return torch.float32 if row["dtype"] == "tf32" else DTYPES.get(row["dtype"], torch.float16)


def _bits(row: Row) -> int:
    return torch.finfo(_dtype(row)).bits


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
