"""Annotated boxes: of VOC, of COCO, of a small JSON file of one's own; and which image on disk each belongs to."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn, TypeAlias
from xml.etree import ElementTree

from .images import SUFFIXES

# Left, top, right, bottom in pixels, the last two exclusive.
AnnotatedBox: TypeAlias = tuple[float, float, float, float]

# Boxes that this project drew by hand on the photographs that come inside scikit-image and scikit-learn.
PHOTOGRAPHS = Path(__file__).with_name("photographs.json")

# What is left off a name to compare it with another: not every dot begins one. Annotations may be of files that were
# converted since.
_IMAGE_SUFFIXES = SUFFIXES | {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}


def read_annotations(path: str | Path) -> dict[str, list[AnnotatedBox]]:
    """The annotated boxes of each image, by the name that the annotations give it; see ``match``.

    ``path`` is one of

    - a folder of VOC's XML files, those in folders below it included, named by their path in it without ``.xml``.
      VOC counts pixels from 1 and includes the last one, so 1 is taken from xmin and ymin. Difficult and truncated
      objects are kept.
    - a JSON file of COCO's kind, named by ``file_name``. Crowds are left out.
    - a JSON file ``{"boxes": {"name": [{"box": [left, top, right, bottom]}, ...], ...}}``, right and bottom
      exclusive. Whatever else is in it, such as names of the objects, is for readers.

    An image without objects has an empty list.

    Raises:
        FileNotFoundError: if there is nothing at ``path``.
        ValueError: if it is none of the three, or broken: the message says in which file and where.
    """
    path = Path(path)
    if path.is_dir():
        return _read_voc(path)
    text = path.read_bytes()
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is neither a folder of VOC's XML files nor JSON: {error}") from error
    if isinstance(content, dict) and isinstance(content.get("boxes"), dict):
        return _own_boxes(content["boxes"], path)
    if isinstance(content, dict) and {"images", "annotations"} <= content.keys():
        return _coco_boxes(content, path)
    raise ValueError(
        f'{path} has neither "images" and "annotations", as COCO has, nor "boxes", as {{"boxes": {{"name": [{{"box": '
        "[left, top, right, bottom]}]}}"
    )


def match(annotations: dict[str, list[AnnotatedBox]], paths: Sequence[str | Path]) -> list[list[AnnotatedBox] | None]:
    """The annotated boxes of each image file; None of one that is not annotated.

    Names are compared without folders and without the suffix of an image. If several annotations have the name, that
    one is taken whose suffix and folders agree furthest with the file's.

    Raises:
        ValueError: if an annotation could belong to several files or a file to several annotations, or no file has one.
    """
    named = defaultdict(list)
    for name in annotations:
        named[_bare(name)].append(name)
    taken: dict[str, str | Path] = {}
    matched: list[list[AnnotatedBox] | None] = []
    for path in paths:
        candidates = named.get(_bare(path))
        if candidates is None:
            matched.append(None)
            continue
        name = _closest(candidates, path)
        if name in taken:
            raise ValueError(
                f"the annotation {name!r} could be that of {str(taken[name])!r} and of {str(path)!r}: name annotations "
                "with their folders, or analyse the folders one by one"
            )
        taken[name] = path
        matched.append(annotations[name])
    if paths and not taken:
        raise ValueError(
            f"none of {len(paths)} images is annotated: the first is called {_bare(paths[0])!r}, and the first of "
            f"{len(annotations)} annotations {_bare(next(iter(annotations), ''))!r}"
        )
    return matched


def _bare(name: str | Path) -> str:
    pure = PurePosixPath(Path(name).as_posix())
    return pure.stem if pure.suffix.lower() in _IMAGE_SUFFIXES else pure.name


def _closest(candidates: list[str], path: str | Path) -> str:
    """The one whose last parts are most like the path's."""
    ranked = sorted(((_agreement(name, path), name) for name in candidates), reverse=True)
    if len(ranked) > 1 and ranked[0][0] == ranked[1][0]:
        raise ValueError(f"the image {str(path)!r} could be annotated by {ranked[0][1]!r} and by {ranked[1][1]!r}")
    return ranked[0][1]


def _agreement(name: str, path: str | Path) -> tuple[int, bool]:
    """How many folders, from the last on, are the same; and whether the suffix is."""
    one, other = PurePosixPath(name), PurePosixPath(Path(path).as_posix())
    folders = 0
    for mine, yours in zip(reversed(one.parent.parts), reversed(other.parent.parts), strict=False):
        if mine != yours:
            break
        folders += 1
    return folders, one.suffix == other.suffix


def _own_boxes(boxes: dict[str, Any], path: Path) -> dict[str, list[AnnotatedBox]]:
    found = {}
    for name, objects in boxes.items():
        where = f"{path}, image {name!r}"
        if not isinstance(objects, list) or not all(isinstance(thing, dict) and "box" in thing for thing in objects):
            raise ValueError(f'{where}: expected a list of objects {{"box": [left, top, right, bottom]}}')
        found[name] = [_box(thing["box"], where) for thing in objects]
    return found


def _coco_boxes(content: dict[str, Any], path: Path) -> dict[str, list[AnnotatedBox]]:
    try:
        names = {image["id"]: str(image["file_name"]) for image in content["images"]}
        objects = [
            (names.get(thing["image_id"]), thing["image_id"], thing["bbox"])
            for thing in content["annotations"]
            if not thing.get("iscrowd")
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: every image needs id and file_name, every annotation image_id and bbox, and one has not "
            f"({type(error).__name__}: {error})"
        ) from error
    found: dict[str, list[AnnotatedBox]] = {name: [] for name in names.values()}
    if len(found) < len(content["images"]):
        raise ValueError(f"{path}: an id or a file name is that of several images")
    for name, image, corner_and_size in objects:
        if name is None:
            raise ValueError(f"{path}: an annotation is of image {image!r}, which is not among its images")
        where = f"{path}, image {name!r}"
        left, top, width, height = _four(corner_and_size, where)
        found[name].append(_box([left, top, left + width, top + height], where))
    return found


def _read_voc(folder: Path) -> dict[str, list[AnnotatedBox]]:
    files = sorted(folder.rglob("*.xml"))
    if not files:
        raise ValueError(f"{folder} has no XML file: expected a folder of VOC's annotations")
    return {file.relative_to(folder).with_suffix("").as_posix(): _voc_boxes(file) for file in files}


def _voc_boxes(file: Path) -> list[AnnotatedBox]:
    try:
        with file.open("rb") as opened:
            root = ElementTree.parse(opened, ElementTree.XMLParser(target=_Builder())).getroot()
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        raise ValueError(f"{file} is no XML that is read here: {error}") from error
    if root.tag != "annotation":
        raise ValueError(f"{file} is not VOC's: it holds <{root.tag}>, not <annotation>")
    found = []
    for thing in root.iterfind("object"):
        sides = [thing.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
        try:
            left, top, right, bottom = (float(side) for side in sides)
        except (TypeError, ValueError):
            raise ValueError(f"{file}: an object needs a bndbox of xmin, ymin, xmax, ymax, not {sides}") from None
        found.append(_box([left - 1, top - 1, right, bottom], str(file)))
    return found


class _Builder(ElementTree.TreeBuilder):
    """Reads no document type: entities are declared there, which can grow without limit or name other files."""

    def doctype(self, name: str, public: str | None, system: str | None) -> NoReturn:
        raise ValueError("it declares a document type, which VOC's files do not")


def _box(sides: Any, where: str) -> AnnotatedBox:
    """Also an empty one, of which COCO has some: nothing that is found agrees with it."""
    left, top, right, bottom = _four(sides, where)
    if right < left or bottom < top:
        raise ValueError(
            f"{where}: a box is left, top, right, bottom, and {[left, top, right, bottom]} ends before it begins"
        )
    return left, top, right, bottom


def _four(numbers: Any, where: str) -> Iterable[float]:
    if (
        not isinstance(numbers, list)
        or len(numbers) != 4
        or not all(isinstance(n, int | float) and not isinstance(n, bool) and math.isfinite(n) for n in numbers)
    ):
        raise ValueError(f"{where}: a box must be four finite numbers, not {numbers!r}")
    return numbers
