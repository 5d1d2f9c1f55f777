"""What the user measured on the machine at hand (``vitreg calibrate``): kept in one file of their cache.

The file is ``calibration.json`` in ``$VITREG_CACHE_DIR``, else in ``$XDG_CACHE_HOME/vitreg_kernels``, else in
``~/.cache/vitreg_kernels``. ``VITREG_CALIBRATION=FILE`` names another, which the ranks of a cluster can share, and
``VITREG_CALIBRATION=0`` reads none. A measurement counts only where everything is as it was when it was made: the
processor or GPU, its driver, torch, triton, and this package down to its kernels.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import _version
from . import devices, tables
from .tables import Default, Key, Table

NAME = "your calibration"
# A backend that is faster by less than this is so by luck.
LEAST_LEAD = 1.03

# Of the fields of a ``Measurement`` that anything is decided by.
_KINDS: dict[str, Any] = {
    **dict.fromkeys(("op", "device", "dtype", "variant", "date"), str),
    **dict.fromkeys(("width", "tokens", "heads"), int),
    "gradients": bool,
    "backend": (str, type(None)),
    **dict.fromkeys(("wrong", "times_ms"), dict),
}

_FORMAT = 1
_LARGEST = 2**24  # bytes of a file
_DRIVER = re.compile(r"Kernel Module.*?\s(\d+\.\d[\d.]*)")  # NVIDIA's own module and the open one word it differently
_PACKAGE = Path(__file__).parents[1]
# What a time or a result can hang on, beside the code: whichever of them is installed.
_LIBRARIES = ("torch", "triton", "xformers", "flash_attn", "flash_attn_3", "flash_attn_4")


class Measurement(NamedTuple):
    """What was measured of one call, on one machine.

    Attributes:
        op, device, dtype, width, gradients, variant, features: as of ``tables.Key``.
        tokens, heads: of the call itself, not their buckets.
        backend: the one that is to be the default; ``None`` where none was clearly the fastest.
        wrong: the backends that broke the accuracy rule, each with what was wrong.
        times_ms: milliseconds a call, by backend.
        errors: of the tensor nearest to its bound, the largest error, and that of the eager formula; by backend.
        date: ISO 8601.
    """

    op: str
    device: str
    dtype: str
    width: int
    tokens: int
    heads: int
    gradients: bool
    variant: str
    features: tuple[str, ...]
    backend: str | None
    wrong: Mapping[str, str]
    times_ms: Mapping[str, float]
    errors: Mapping[str, tuple[float, float]]
    date: str

    @property
    def key(self) -> Key:
        """What it decides for."""
        size = tables.size_of(self.tokens, self.heads)
        return Key(self.op, self.device, self.dtype, self.width, *size, self.gradients, self.variant, self.features)

    @property
    def call(self) -> tuple[Any, ...]:
        """What tells it from the measurements of other calls."""
        return self[: self._fields.index("backend")]


class Contents(NamedTuple):
    """What a file says here and now.

    Attributes:
        measurements: those that count.
        ignored: why some or all do not; empty if all do, or there is no file.
    """

    measurements: tuple[Measurement, ...]
    ignored: str


def path() -> Path | None:
    """The file; ``None`` where the user turned it off."""
    named = os.environ.get("VITREG_CALIBRATION", "")
    if named:
        return None if named == "0" else Path(named).expanduser()
    if folder := os.environ.get("VITREG_CACHE_DIR"):
        return Path(folder).expanduser() / "calibration.json"
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "vitreg_kernels" / "calibration.json"


def table() -> Table:
    """The defaults that the user's measurements make. Never raises, and never touches a GPU."""
    contents = read()
    by_key: dict[Key, list[Measurement]] = {}
    for one in contents.measurements:
        by_key.setdefault(one.key, []).append(one)
    rows, wrong, disputed = {}, {}, {}
    for key, group in by_key.items():
        if its := {name: what for one in group for name, what in one.wrong.items()}:
            wrong[key] = its
        winners = {one.backend: one for one in group if one.backend is not None}
        if len(winners) > 1:
            found = ", ".join(f"{name} at {one.tokens} tokens and {one.heads} heads" for name, one in winners.items())
            disputed[key] = f"{NAME} found different backends fastest for calls like this: {found}"
            continue
        for name in winners.keys() - its.keys():
            if slower := next((one for one in group if not _is_as_fast(name, one)), None):
                where = f"at {slower.tokens} tokens and {slower.heads} heads"
                disputed[key] = f"{NAME} found {name} fastest for calls like this, but not {where}"
            else:
                rows[key] = Default(name, max(one.date for one in group))
    return Table.of(NAME, rows, wrong, disputed, of_one_gpu=True, ignored=contents.ignored)


def _is_as_fast(name: str, one: Measurement) -> bool:
    """Whether a backend was the fastest of a measurement, or slower by luck; one without times says nothing of it."""
    times = one.times_ms
    return not times or (name in times and times[name] < LEAST_LEAD * min(times.values()))


def read() -> Contents:
    """What the user's file says; one that cannot be read is told in a warning, and counts for nothing. Never raises."""
    file = None
    try:
        file = path()
        if file is None or not file.exists():
            named = file is not None and os.environ.get("VITREG_CALIBRATION")
            return Contents((), f"VITREG_CALIBRATION names {file}, which is not there" if named else "")
        return _counting(file, _entries(file))
    except Exception as error:  # whatever is wrong with a cache, the library has to be imported
        ignored = f"{file or 'the cache'} cannot be read ({type(error).__name__}: {error})"
        with contextlib.suppress(Warning):  # where warnings are made errors
            warnings.warn(f"{NAME} does not count: {ignored}; vitreg calibrate --clear removes it", stacklevel=3)
        return Contents((), ignored)


def _counting(file: Path, entries: Sequence[tuple[Mapping[str, str], Measurement]]) -> Contents:
    """Of the measurements of a file those that were made as things are now, and why the others do not count."""
    here = {of_gpu: identity_of_machine(gpu=of_gpu) for of_gpu in {devices.is_gpu(one.device) for _, one in entries}}
    current, others = [], []
    for identity, one in entries:
        now = here[devices.is_gpu(one.device)]
        if identity == now:
            current.append(one)
        else:
            others.append((one, _difference(identity, now)))
    anew = {one.call for one in current}
    reasons = [reason for one, reason in others if one.call not in anew]
    if not reasons:
        return Contents(tuple(current), "")
    what = "; ".join(dict.fromkeys(reasons))
    return Contents(tuple(current), f"{len(reasons)} of the {len(entries)} measurements in {file} are of {what}")


def identity_of_machine(*, gpu: bool) -> dict[str, str]:
    """What a measurement must have been made with to count, beside the GPU, whose name is in its rows.

    Of a CPU, the number of threads that torch has when this package is imported: what is set later is not seen.
    """
    identity = {
        "vitreg_kernels": _version.__version__,
        "kernels": _digest_of_kernels(),
        "python": ".".join(platform.python_version_tuple()[:2]),
        "processor": f"{devices.processor()}, {devices.kind('cpu', 0)}",
        **{name: version for name in _LIBRARIES if (version := _version_of(name))},
    }
    if gpu:
        identity["driver"] = _driver()
    else:
        identity["threads"] = str(torch.get_num_threads())
    return identity


def record(measurements: Iterable[Measurement]) -> Path:
    """Put measurements into the user's file, in place of those of the same calls on this machine; all others stay.

    Two processes may do so at once. A cut leaves the old file or the new one.

    Returns:
        The file.

    Raises:
        OSError: if it cannot be written.
        ValueError: if VITREG_CALIBRATION=0 turned it off.
    """
    file = _writable()
    new = [(identity_of_machine(gpu=devices.is_gpu(one.device)), one) for one in measurements]
    with _locked(file):
        try:
            entries = _entries(file) if file.exists() else []
        except (ValueError, RecursionError):
            entries = []  # it counted for nothing, and had been told
        merged = {(_frozen(identity), one.call): (identity, one) for identity, one in (*entries, *new)}
        text = json.dumps({"format": _FORMAT, "entries": [_row(*entry) for entry in merged.values()]}, indent=1)
        beside = file.with_name(f"{file.name}.{os.getpid()}.part")
        try:
            beside.write_text(text + "\n")
            os.replace(beside, file)
        finally:
            beside.unlink(missing_ok=True)
    return file


def clear() -> Path | None:
    """Remove the user's file; which, or ``None`` if there is none.

    Raises:
        OSError: if it cannot be removed.
        ValueError: if VITREG_CALIBRATION=0 turned it off.
    """
    file = _writable()
    with _locked(file):
        if not file.exists():
            return None
        file.unlink()
    return file


def check_writable() -> None:
    """Raise what ``record`` would, before anything is measured."""
    file = _writable()
    with _locked(file):
        if file.exists() and not file.is_file():
            raise FileExistsError(f"{file} is no file: move it away, or set VITREG_CACHE_DIR")


def _writable() -> Path:
    """The file itself, not a link to it, in a folder that is there."""
    file = path()
    if file is None:
        raise ValueError("VITREG_CALIBRATION=0 turns calibration off: unset it to calibrate")
    file = Path(os.path.realpath(file))
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Holds a lock beside the file, so that of two processes neither loses what the other writes."""
    with file.with_name(file.name + ".lock").open("w") as lock:
        # Not every system and file system has locks; the file is replaced as a whole all the same.
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _entries(file: Path) -> list[tuple[dict[str, str], Measurement]]:
    """Every measurement of a file with its machine.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no file of measurements of this format.
    """
    if not file.is_file() or file.stat().st_size > _LARGEST:
        raise ValueError("it is no file of measurements")
    contents = json.loads(file.read_text())
    if not isinstance(contents, dict) or contents.get("format") != _FORMAT:
        raise ValueError("it is of another version of this package")
    try:
        return [_entry(row) for row in contents["entries"]]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"an entry is not as it should be: {type(error).__name__}: {error}") from error


def _entry(row: Mapping[str, Any]) -> tuple[dict[str, str], Measurement]:
    fields = {name: row[name] for name in Measurement._fields}
    fields["features"] = tuple(map(str, fields["features"]))
    fields["errors"] = {name: (error, eager) for name, (error, eager) in fields["errors"].items()}
    fields["times_ms"] = {name: float(ms) for name, ms in fields["times_ms"].items()}
    one = Measurement(**fields)
    for name, kinds in _KINDS.items():
        if not isinstance(getattr(one, name), kinds):
            raise TypeError(f"{name} is {getattr(one, name)!r}")
    return {str(name): str(value) for name, value in row["machine"].items()}, one


def _row(identity: Mapping[str, str], one: Measurement) -> dict[str, Any]:
    return {**one._asdict(), "features": list(one.features), "machine": dict(identity)}


def _frozen(identity: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(identity.items()))


def _difference(then: Mapping[str, str], now: Mapping[str, str]) -> str:
    """The first thing in which a machine is not what it was."""
    name = next(name for name in (*now, *then) if then.get(name) != now.get(name))
    if name == "kernels":
        return "other kernels than this package's"
    return f"{name} {then.get(name, 'absent')}, and this is {now.get(name, 'absent')}"


def _digest_of_kernels() -> str:
    """Of all that computes: a kernel that was changed, or given other tiles, has to be measured anew."""
    digest = hashlib.sha256()
    rooms = (("ops", "*.py"), ("_triton", "*.py"), ("_native", "*.py"), ("_native", "*.so"), ("dispatch", "*.json"))
    for file in sorted(file for room, kind in rooms for file in (_PACKAGE / room).rglob(kind)):
        digest.update(file.relative_to(_PACKAGE).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _driver() -> str:
    """The NVIDIA driver's version, which the kernel tells without a GPU being touched; empty where it does not."""
    told = Path("/proc/driver/nvidia/version")
    match = _DRIVER.search(told.read_text()) if told.exists() else None
    return match.group(1) if match else ""


def _version_of(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return ""
