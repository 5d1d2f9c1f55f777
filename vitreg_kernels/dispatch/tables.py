"""Tables of measurements: what a row says, how a file holds it, how a new row is put in.

A file is of one device, ``sm_90.json`` or ``cpu_amx.json``. It holds lists of flat rows by section::

    {
        "defaults": [
            {"op": "attention", "device": "sm_90", "dtype": "bfloat16", "width": 64, "tokens": 272, "heads": 512,
             "gradients": true, "variant": "", "features": [], "backend": "triton", "date": "2026-12-01"}
        ],
        "attention_tiles": [
            {"kernel": "forward", "bits": 16, "width": 64, "tokens": 272,
             "block_m": 64, "block_n": 128, "num_warps": 4, "num_stages": 1, "whole_head": true}
        ]
    }

A row of ``defaults`` decides for calls of its own op, dtype, head dim or channels, size, variant and features, with or
without gradients, and for no others. What a user measures is kept elsewhere, see ``calibration``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

CONFIGS = Path(__file__).parent / "configs"

TOKEN_BUCKETS = (64, 272, 2048)
HEAD_BUCKETS = (32, 128, 512)


class Size(NamedTuple):
    """A size that measurements tell from others: each the upper end of a bucket, 0 for what is larger than the last.

    Attributes:
        tokens: of an image, the longest one's if they are packed.
        heads: of all images together; of an op without heads, the images.
    """

    tokens: int
    heads: int


class Key(NamedTuple):
    """What a row decides for.

    Attributes:
        op: the op's name.
        device: ``"sm_90"``, ``"cpu_avx512"``, ...; of what a user measured, one GPU's own name.
        dtype: of the inputs, ``"bfloat16"``.
        width: head dim of an op that has heads, channels of one that takes whole tokens; 0 where there is neither.
        tokens, heads: as in ``Size``.
        gradients: whether a backward will follow.
        variant: what else tells calls of the op apart, see ``Workload``.
        features: what a call uses beyond the plain one, in the order of the op's vocabulary.
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


class Default(NamedTuple):
    """What a row says.

    Attributes:
        backend: what such a call gets if it names none: the fastest of those that were right, or what it got before
            where none won every race.
        date: when that was measured, ISO 8601.
    """

    backend: str
    date: str


Subject: TypeAlias = tuple[str, str, str, int]
"""Op, device, dtype and width, as of a ``Key``."""


class Table(NamedTuple):
    """Rows of one origin.

    Attributes:
        name: for a person.
        rows: what they decide for -> what they say.
        wrong: what they decide for -> the backends that were wrong there, each with what was wrong.
        disputed: what measurements disagree about -> how; nothing is decided there.
        sizes: the sizes that it has anything to say about, by what else it is about.
        of_one_gpu: whether the rows of GPUs are of one by its own name, and not of an architecture.
        ignored: why some or all of what it should hold does not count; empty if all does.
    """

    name: str
    rows: Mapping[Key, Default]
    wrong: Mapping[Key, Mapping[str, str]]
    disputed: Mapping[Key, str]
    sizes: Mapping[Subject, tuple[Size, ...]]
    of_one_gpu: bool = False
    ignored: str = ""

    @staticmethod
    def of(
        name: str,
        rows: Mapping[Key, Default],
        wrong: Mapping[Key, Mapping[str, str]] | None = None,
        disputed: Mapping[Key, str] | None = None,
        *,
        of_one_gpu: bool = False,
        ignored: str = "",
    ) -> Table:
        """The table of these rows."""
        wrong, disputed = wrong or {}, disputed or {}
        sizes: dict[Subject, dict[Size, None]] = {}
        for key in (*rows, *wrong, *disputed):
            subject = key.op, key.device, key.dtype, key.width
            sizes.setdefault(subject, {})[Size(key.tokens, key.heads)] = None
        return Table(name, rows, wrong, disputed, {s: tuple(its) for s, its in sizes.items()}, of_one_gpu, ignored)


def size_of(tokens: int, heads: int) -> Size:
    """The size of a call with so many tokens an image and heads, or images, in all."""
    return Size(token_bucket(tokens), _bucket(heads, HEAD_BUCKETS))


def token_bucket(tokens: int) -> int:
    """The bucket of a number of tokens."""
    return _bucket(tokens, TOKEN_BUCKETS)


def holds(size: Size, tokens: int, heads: int) -> bool:
    """Whether so many tokens and heads are of a size, but for a single token, which not every kernel takes.

    Asks of them nothing else, see ``preferences.workload``.
    """
    return tokens > 1 and _is_in(size.tokens, tokens, TOKEN_BUCKETS) and _is_in(size.heads, heads, HEAD_BUCKETS)


def _bucket(count: int, ends: Sequence[int]) -> int:
    for end in ends:
        if count <= end:
            return end
    return 0


def _is_in(bucket: int, count: int, ends: tuple[int, ...]) -> bool:
    if bucket == 0:
        return count > ends[-1]
    number = ends.index(bucket)
    return count <= bucket and (number == 0 or count > ends[number - 1])


def read(folder: Path, section: str) -> dict[str, list[dict[str, Any]]]:
    """The rows of a section by device; none if there is no such folder or no file has the section.

    Raises:
        ValueError: if a file is not JSON.
    """
    found = {}
    for file in sorted(folder.glob("*.json")):
        try:
            table = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"{file} is no table of measurements ({error}); mend it or move it away") from error
        if section in table:
            found[file.stem] = table[section]
    return found


def defaults(rows: Mapping[str, Iterable[Mapping[str, Any]]]) -> dict[Key, Default]:
    """The rows of the section ``defaults``, as ``read`` gives them, by what they decide for."""
    found = {}
    for of_device in rows.values():
        for row in of_device:
            fields = {**row, "features": tuple(row["features"])}
            found[Key(*(fields[name] for name in Key._fields))] = Default(*(row[name] for name in Default._fields))
    return found


def row_of(key: Key, default: Default) -> dict[str, Any]:
    """A row of the section ``defaults`` as a device's file holds it."""
    return {**key._asdict(), "features": list(key.features), **default._asdict()}


def adopt(folder: Path, rows: Mapping[Key, Default]) -> list[Path]:
    """Puts rows into the section ``defaults`` of their devices' files, as ``merge`` does; the files."""
    devices = dict.fromkeys(key.device for key in rows)
    return [
        merge(
            folder, device, "defaults", [row_of(k, row) for k, row in rows.items() if k.device == device], Key._fields
        )
        for device in devices
    ]


def merge(folder: Path, device: str, section: str, rows: Sequence[Mapping[str, Any]], by: Sequence[str]) -> Path:
    """Puts rows into a section of a device's file, in place of those that are alike; all others stay.

    Args:
        folder: of the files; made if missing.
        device: whose file.
        section: of the file.
        rows: flat, JSON as they are.
        by: the fields that tell whether two rows are alike.

    Returns:
        The file. A cut leaves either the old one or the new one.
    """
    path = folder / f"{device}.json"
    table = json.loads(path.read_text()) if path.exists() else {}

    def key(row: Mapping[str, Any]) -> str:
        return json.dumps([row[name] for name in by])

    merged = {key(row): row for row in (*table.get(section, ()), *rows)}
    table[section] = [merged[name] for name in sorted(merged)]
    folder.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(_text(table))
    os.replace(beside, path)
    return path


def _text(table: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """As JSON, a row a line."""
    sections = []
    for section in sorted(table):
        rows = ",\n".join(f"  {json.dumps(row)}" for row in table[section])
        sections.append(f" {json.dumps(section)}: [\n{rows}\n ]")
    return "{\n" + ",\n".join(sections) + "\n}\n"
