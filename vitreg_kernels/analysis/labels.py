"""What the class of each image is: by the folder it lies in, or by a table."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

FOLDERS = "folders"
PATH_COLUMNS = ("path", "file", "filename", "image")
LABEL_COLUMNS = ("label", "class")


def read_labels(source: str | Path, paths: Sequence[str | Path], root: str | Path) -> list[str | None]:
    """The label of each image; None of one that has none.

    Args:
        source: ``"folders"``: the folder directly below ``root`` that an image lies in, at whatever depth. Or a CSV
            file in UTF-8, separated by commas, semicolons or tabs, with a row for each image: path and label, or any
            columns under a header that names ``path`` (or ``file``, ``filename``, ``image``) and ``label`` (or
            ``class``). A path is relative to ``root`` or absolute; a name alone, with or without its ending, will do
            where only one image has it. Rows of other images are passed over.
        paths: of the images, below ``root``.
        root: the folder of the images.

    Raises:
        FileNotFoundError: if there is no such CSV file.
        ValueError: if no image gets a label, or a row lacks one, means several images, or contradicts another row.
    """
    relative = [_below(Path(path), Path(root)) for path in paths]
    labels = _by_folder(relative) if source == FOLDERS else _by_table(Path(source), relative, Path(root))
    if paths and not any(label is not None for label in labels):
        wanted = "folders, one a class, below it" if source == FOLDERS else f"rows of {source} that name them"
        raise ValueError(f"none of {len(paths)} images in {root} has a label, such as {relative[0]}; needs {wanted}")
    return labels


def _by_folder(relative: Sequence[Path]) -> list[str | None]:
    return [path.parts[0] if len(path.parts) > 1 else None for path in relative]


def _by_table(table: Path, relative: Sequence[Path], root: Path) -> list[str | None]:
    by_name: dict[str, list[int]] = defaultdict(list)
    for index, path in enumerate(relative):
        for name in {path.as_posix(), path.name, path.stem, (root / path).absolute().as_posix()}:
            by_name[name].append(index)
    by_path = {path.as_posix(): index for index, path in enumerate(relative)}

    labels: list[str | None] = [None] * len(relative)
    for line, name, label in _rows(table):
        found = [by_path[name]] if name in by_path else by_name.get(name, [])
        if len(found) > 1:
            some = ", ".join(relative[index].as_posix() for index in found[:3])
            raise ValueError(
                f"{table}, line {line}: {name!r} means {len(found)} images ({some}); give their paths below {root}"
            )
        for index in found:
            if labels[index] not in (None, label):
                raise ValueError(
                    f"{table}, line {line}: {name!r} is {label!r}, but an earlier row says {labels[index]!r}; keep one"
                )
            labels[index] = label
    return labels


def _rows(table: Path) -> Iterator[tuple[int, str, str]]:
    """Line, path and label of each row; a header that is not known is a row that means no image."""
    if not table.is_file():
        raise FileNotFoundError(f"there is no file {table}; labels are {FOLDERS!r} or the path of a CSV file")
    try:
        text = table.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{table} is not a CSV file in UTF-8: {error.reason} at byte {error.start}") from None
    first = text.partition("\n")[0]
    reader = csv.reader(io.StringIO(text), delimiter=max(",;\t", key=first.count))
    columns = None
    for fields in reader:
        fields = [field.strip() for field in fields]
        if not any(fields):
            continue
        if columns is None:
            columns, is_header = _columns(fields)
            if is_header:
                continue
            if len(fields) != 2:
                raise ValueError(
                    f"{table} has {len(fields)} columns; name them in a first row, of which one is path and one is "
                    f"label, or give just these two"
                )
        path, label = columns
        if len(fields) <= max(columns) or not fields[label] or not fields[path]:
            raise ValueError(f"{table}, line {reader.line_num}: needs a path and a label, not {fields}")
        yield reader.line_num, fields[path].replace("\\", "/").removeprefix("./"), fields[label]


def _columns(first: Sequence[str]) -> tuple[tuple[int, int], bool]:
    """Where paths and labels are, and whether the first row said so."""
    names = [field.lower() for field in first]
    path = next((names.index(name) for name in PATH_COLUMNS if name in names), None)
    label = next((names.index(name) for name in LABEL_COLUMNS if name in names), None)
    return ((0, 1), False) if path is None or label is None else ((path, label), True)


def _below(path: Path, root: Path) -> Path:
    try:
        return path.relative_to(root)
    except ValueError:
        raise ValueError(f"{path} is not below {root}, the folder of the images") from None
