"""The page: one HTML file, readable offline, of everything that was found."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..findings import Findings, FoundBox, Image, Probe, Report
from . import figures, maps
from .colours import CYCLE, RATIO_TICKS, RING, palette_uri, photo_uri, ratio_place
from .maps import labelled
from .svg import inline

Pictures = Mapping[str, Mapping[str, np.ndarray]]

NONE = "\N{EN DASH}"  # where there is no number

# Scores of these metrics are shares of tokens or images, shown as percentages.
_SHARES = ("accuracy", "top-1")
_LOWER_IS_BETTER = ("mean distance", "L2 error")


def write_page(report: Report, pictures: Pictures, path: str | Path, *, files: Sequence[str] = ()) -> None:
    """Writes the report as one HTML file that reads nothing else: no network, no other file.

    Args:
        report: of at least one model.
        pictures: by model's name its maps, as in ``findings.Image``; such as opened ``.npz`` files. Models and maps
            may be absent, and are then not shown.
        path: of the file.
        files: names of files that lie beside it, such as the report as JSON, which it links to.

    Raises:
        ValueError: if the report has no models, or two of one name.
    """
    Path(path).write_text(render(report, pictures, files=files), encoding="utf-8")


def render(report: Report, pictures: Pictures, *, files: Sequence[str] = ()) -> str:
    """The page as text; arguments and errors as of ``write_page``."""
    names = [found.name for found in report.findings]
    if not names:
        raise ValueError("there is nothing to show: the report has no models")
    if len(set(names)) < len(names):
        raise ValueError(f"the models of a page need different names, got {', '.join(names)}")
    environment = Environment(
        loader=PackageLoader(__package__),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": _percent,
        "number": _number,
        "score": _score,
        "labelled": labelled,
        "json": lambda value: json.dumps(value, ensure_ascii=False),
        "quote": quote,
        "sentence": _sentence,
    }
    environment.globals |= {"short": maps.short}
    script = _asset("page.js")
    return environment.get_template("page.html").render(
        report=report,
        models=report.findings,
        style=_asset("page.css"),
        script=script,
        # Browsers run this script and no other, and load nothing: whatever a file's name says.
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        figures=_figures(report.findings),
        gallery=_gallery(report.findings, pictures),
        frequency={found.name: maps.frequency_strip(found) for found in report.findings if found.frequency},
        scale=palette_uri(np.arange(RING, dtype=np.uint8)[None]),
        ticks=[(label, 100 * float(ratio_place(ratio))) for ratio, label in RATIO_TICKS.items()],
        warnings=_warnings(report.findings),
        probes=_probes(report.findings),
        sinks={found.name: _sinks(found) for found in report.findings if found.sinks},
        files=files,
    )


def _asset(name: str) -> Markup:
    """Our own style or script, which is put in as it stands."""
    return Markup((Path(__file__).parent / "templates" / name).read_text(encoding="utf-8"))


class Drawing(NamedTuple):
    """A figure on the page: the model, or None of all; and the figure as SVG."""

    model: Findings | None
    svg: Markup


def _figures(models: Sequence[Findings]) -> dict[str, list[Drawing]]:
    """By section, what is drawn in it."""
    norm_limits, histogram_limits = figures.norm_limits(models), figures.histogram_limits(models)

    def each(section: str, shown: Sequence[Findings], draw: Any, alt: str) -> list[Drawing]:
        return [
            Drawing(found, inline(draw(found), f"{section}{i}", f"{alt}: {labelled(found)}. {found.verdict}"))
            for i, found in enumerate(shown)
        ]

    with_norms = [found for found in models if found.norms]
    return {
        "norms": each("norms", with_norms, lambda x: figures.norms_by_layer(x, norm_limits), "Token norms by block"),
        "models": [Drawing(None, inline(figures.norms_by_model(models), "models", "Patch norms of every model"))]
        if len(with_norms) > 1
        else [],
        "histogram": each(
            "histogram",
            [x for x in models if x.histogram],
            lambda x: figures.histogram(x, histogram_limits),
            "Histogram of token norms",
        ),
        "similarity": each(
            "similarity",
            [x for x in models if x.similarity],
            figures.neighbour_cosines,
            "Densities of neighbours' cosines",
        ),
        "cls": each(
            "cls",
            [x for x in models if x.cls_similarity],
            figures.cls_cosines,
            "Densities of cosines with CLS",
        ),
        "history": each("history", [x for x in models if x.history], figures.history, "Norms while training"),
    }


class Outline(NamedTuple):
    """A box drawn on a photograph: left, top, width, height in its pixels."""

    colour: str
    dashed: bool
    rect: tuple[int, int, int, int]


class Tile(NamedTuple):
    """One picture in a model's row: its place among the columns, and a strip of maps or boxes on the photograph."""

    column: int
    heading: str
    alt: str
    strip: maps.Strip | None = None
    beside: maps.Strip | None = None
    outlines: Sequence[Outline] = ()
    missing: str = ""


class Row(NamedTuple):
    """What one model sees in one photograph."""

    model: Findings
    photo: str
    tiles: list[Tile]


class Shown(NamedTuple):
    """One photograph: the id of its pixels, what it is called, and a row a model."""

    path: str
    photo: str
    rows: list[Row]


class Gallery(NamedTuple):
    """All pictures.

    Attributes:
        photos: by id, the data URI, width and height of a photograph.
        images: what is shown of each.
        methods: by name of a method that finds boxes, its colour.
        truths: whether any image has annotated boxes.
        layers, heads: how many there are to choose from.
    """

    photos: dict[str, tuple[str, int, int]]
    images: list[Shown]
    methods: dict[str, str]
    truths: bool
    layers: int
    heads: int


def _gallery(models: Sequence[Findings], pictures: Pictures) -> Gallery:
    """Pictures by photograph, with models as rows. A photograph that several models saw alike is held once."""
    photos: dict[bytes, tuple[str, tuple[str, int, int]]] = {}
    methods: dict[str, str] = {}
    for found in models:
        for box in (box for image in found.shown for box in image.shown):
            methods.setdefault(box.method, CYCLE[(len(methods) + 1) % len(CYCLE)])
    tokens = list(dict.fromkeys(token for found in models for token in found.prefix))
    headings = ["norms", *(f"{maps.short(token)} attention" for token in tokens), "PCA", "boxes"]
    rows: dict[str, list[Row]] = {}
    for found in models:
        drawn = pictures.get(found.name, {})
        for i, image in enumerate(found.shown):
            if f"{i}/photo" not in drawn:
                continue
            pixels = np.ascontiguousarray(drawn[f"{i}/photo"])
            key = str(pixels.shape).encode() + pixels.tobytes()
            if key not in photos:
                photos[key] = f"photo{len(photos)}", (photo_uri(pixels), pixels.shape[1], pixels.shape[0])
            tiles = _tiles(found, drawn, i, image, headings, methods)
            rows.setdefault(image.path, []).append(Row(found, photos[key][0], tiles))
    used = {tile.column for of_image in rows.values() for row in of_image for tile in row.tiles}
    kept = {column: place for place, column in enumerate(sorted(used), start=1)}
    images = [
        Shown(
            path,
            of_image[0].photo,
            [x._replace(tiles=[t._replace(column=kept[t.column]) for t in x.tiles]) for x in of_image],
        )
        for path, of_image in rows.items()
    ]
    strips = [tile.strip for image in images for row in image.rows for tile in row.tiles if tile.strip]
    count = {name: max((x.tiles for x in strips if x.follows == name), default=1) for name in ("layer", "head")}
    truths = any(image.truths for found in models for image in found.shown)
    return Gallery(dict(photos.values()), images, methods, truths, count["layer"], count["head"])


def _tiles(
    found: Findings,
    drawn: Mapping[str, np.ndarray],
    index: int,
    image: Image,
    headings: list[str],
    methods: dict[str, str],
) -> list[Tile]:
    what = f"{image.path}, {labelled(found)}"
    tiles = []
    if (strip := maps.norm_strip(found, drawn, index)) is not None:
        beside = maps.prefix_strip(found, drawn, index)
        tiles.append(Tile(0, "norms", f"Norm map of {what}", strip, beside))
    for i, token in enumerate(found.prefix):
        if (strip := maps.attention_strip(found, drawn, index, i)) is not None:
            heading = f"{maps.short(token)} attention"
            tiles.append(Tile(headings.index(heading), heading, f"{heading} of {what}", strip))
    if (strip := maps.pca_strip(drawn, index)) is not None:
        tiles.append(Tile(len(headings) - 2, "PCA", f"Principal components of {what}", strip))
    if image.shown or image.truths:
        outlines = [_outline(methods[x.method], False, x.box) for x in image.shown if x.box is not None]
        outlines += [_outline("#fff", True, box) for box in image.truths]
        missing = ", ".join(f"{box.method}: no box" for box in image.shown if box.box is None)
        tiles.append(Tile(len(headings) - 1, "boxes", _alt_of_boxes(image, what), outlines=outlines, missing=missing))
    return tiles


def _outline(colour: str, dashed: bool, box: tuple[int, int, int, int]) -> Outline:
    left, top, right, bottom = box
    return Outline(colour, dashed, (left, top, right - left, bottom - top))


def _alt_of_boxes(image: Image, what: str) -> str:
    def words(box: FoundBox) -> str:
        return f"{box.method} {'none' if box.box is None else ' '.join(map(str, box.box))}"

    return f"Boxes found on {what}: {'; '.join(map(words, image.shown))}"


class ProbeTable(NamedTuple):
    """One task and metric: a row a kind of token, a column a model."""

    task: str
    metric: str
    better: str
    tokens: list[str]
    models: list[Findings]
    cells: dict[tuple[str, str], Probe]


def _probes(models: Sequence[Findings]) -> list[ProbeTable]:
    every = [(found, probe) for found in models for probe in found.probes]
    tables = []
    for task, metric in dict.fromkeys((probe.task, probe.metric) for _, probe in every):
        here = [(found, probe) for found, probe in every if (probe.task, probe.metric) == (task, metric)]
        cells = {(probe.tokens, found.name): probe for found, probe in here}
        tokens = list(dict.fromkeys(probe.tokens for _, probe in here))
        shown = [found for found in models if any(name == found.name for _, name in cells)]
        better = "lower is better" if metric in _LOWER_IS_BETTER else "higher is better"
        tables.append(ProbeTable(task, metric, better, tokens, shown, cells))
    return tables


class SinkRow(NamedTuple):
    """One kind of token, and in how many heads of each block it is a sink, in words."""

    tokens: str
    cells: list[str]


def _sinks(found: Findings) -> list[SinkRow]:
    names = {"outlier": "outliers", "normal": "other patches"}
    cells: dict[str, list[str]] = {}
    for row in found.sinks:
        low, high = (f"{x:.2g}" for x in (row.at_least, row.at_most))
        cells.setdefault(row.tokens, []).append(low if low == high else f"{low}\N{EN DASH}{high}")
    return [SinkRow(names.get(tokens, maps.short(tokens)), of_tokens) for tokens, of_tokens in cells.items()]


def _warnings(models: Sequence[Findings]) -> dict[tuple[str, str], list[Findings]]:
    """By a method that finds boxes and what its warning says, the models that it says that of."""
    warned: dict[tuple[str, str], list[Findings]] = {}
    for found in models:
        for row in (row for row in found.discovery if row.warning):
            warned.setdefault((row.method, row.warning), []).append(found)
    return warned


def _sentence(found: Findings) -> str:
    """The verdict without its word, which stands above it in large letters."""
    return found.verdict.removeprefix(f"{found.word}: ")


def _number(x: float | None) -> str:
    return NONE if x is None else maps.number(x)


def _percent(share: float | None) -> str:
    # Significant digits, not decimals: one outlier in a million is not 0.00%.
    return NONE if share is None else f"{100 * share:.3g}%"


def _score(value: float | None, metric: str) -> str:
    if value is None:
        return NONE
    return f"{100 * value:.1f}%" if metric in _SHARES else f"{value:.3g}"
