"""Which patches have outlier norms, where in the image they are, and whether they make a model one with artifacts."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .record import Patches

Kind = Literal["absolute", "median", "mad", "sigma", "percentile", "mixture"]

_FORMS: dict[Kind, str] = {
    "absolute": "{}",
    "median": "{}xmedian",
    "mad": "{}mad",
    "sigma": "{}sigma",
    "percentile": "p{}",
    "mixture": "mixture",
}
_NUMBER = r"(\d+\.?\d*(?:e[+-]?\d+)?)"

_FEWEST = 10  # patches, below which neither a median nor a share says anything
_LAST_BLOCK_FACTOR = 2.0


@dataclass(frozen=True)
class Rule:
    """From which norm on a patch is an outlier. A threshold is that of one layer, since typical norms grow with depth.

    Attributes:
        kind: ``"absolute"``, a norm, such as the 150 that Darcet et al. (arXiv 2309.16588) chose by eye for DINOv2-g;
            ``"median"``, a multiple of the median; ``"mad"``, median absolute deviations (unscaled) beyond the
            median; ``"sigma"``, standard deviations beyond the mean (Jiang et al., arXiv 2506.08010, A.4);
            ``"percentile"``, which finds the same share in any model (as arXiv 2603.25803 does);
            ``"mixture"``, between two populations of norms, if there are two (``mixture.boundary``).
        value: the number; None of ``"mixture"``, which has none.

    Raises:
        ValueError: if the kind is none of these, or its number is out of range.
    """

    kind: Kind
    value: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"a rule's kind must be one of {', '.join(get_args(Kind))}, not {self.kind!r}")
        if self.kind == "mixture":
            if self.value is not None:
                raise ValueError(f"the rule 'mixture' has no number, got {self.value!r}")
            return
        # At the median itself half of all patches would be outliers.
        above, below = {"median": (1.0, math.inf), "percentile": (0.0, 100.0)}.get(self.kind, (0.0, math.inf))
        if self.value is None or not above < self.value < below:
            raise ValueError(
                f"the number of a rule of kind {self.kind!r} must be above {above:g} and below {below:g}, "
                f"not {self.value!r}"
            )

    @classmethod
    def parse(cls, text: str) -> Rule:
        """``"150"``, ``"3xmedian"``, ``"5mad"``, ``"3sigma"``, ``"p98"`` or ``"mixture"``; ``str`` of it gives it back.

        Raises:
            ValueError: if it is none of these, or its number is out of range.
        """
        for kind, form in _FORMS.items():
            if found := re.fullmatch(form.format(_NUMBER), text.strip()):
                return cls(kind, *map(float, found.groups()))
        raise ValueError(f"a rule for outliers is one of 150, 3xmedian, 5mad, 3sigma, p98, mixture, not {text!r}")

    def __str__(self) -> str:
        return _FORMS[self.kind].format(f"{self.value:.15g}" if self.value is not None else "")

    def threshold(self, norms: Tensor) -> float:
        """The norm above which a patch is an outlier among these.

        Args:
            norms: ``[T]``, of one layer; those that are not finite have no say.

        Returns:
            Infinity if nothing can be an outlier: there is no finite norm, or there is only one population.
        """
        finite = norms[norms.isfinite()].double().numpy()
        if not finite.size:
            return math.inf
        if self.kind == "absolute":
            return self.value
        if self.kind == "sigma":
            return float(finite.mean() + self.value * finite.std())
        if self.kind == "percentile":
            return float(np.percentile(finite, self.value))
        if self.kind == "mixture":
            from .mixture import boundary

            return boundary(finite)
        median = np.median(finite)
        if self.kind == "median":
            return float(self.value * median)
        return float(median + self.value * np.median(np.abs(finite - median)))


DEFAULT_RULE = Rule("median", 3.0)


def thresholds(patches: Patches, rule: Rule) -> Tensor:
    """``[L]`` fp64, the threshold of each layer over all images."""
    return torch.tensor([rule.threshold(norms) for norms in patches.norms], dtype=torch.float64)


def outliers(patches: Patches, rule: Rule, *, per: Literal["dataset", "image"] = "dataset") -> Tensor:
    """``[L, T]`` bool, which patches lie above their layer's threshold. Infinite norms do, NaN ones do not.

    Args:
        patches: of all images.
        rule: what the threshold is.
        per: whether it is that of all images, or each image's own, which also finds what is large for its image alone
            and, by a percentile, as much in every image.

    Raises:
        ValueError: if ``per`` is neither.
    """
    if per == "dataset":
        return patches.norms > thresholds(patches, rule)[:, None]
    if per != "image":
        raise ValueError(f"per must be 'dataset' or 'image', not {per!r}")
    found = torch.zeros_like(patches.norms, dtype=torch.bool)
    for own in _by_image(patches):
        found[:, own] = outliers(_those(patches, own), rule)
    return found


class Verdict(NamedTuple):
    """Whether a model has artifacts on these images.

    Attributes:
        word: ``"clean"``, ``"artifacts"`` or ``"unclear"``.
        sentence: the word, the numbers and the rule.
        share: of the patches that are outliers, by layer.
        largest_ratio: largest norm / median, by layer, of the finite ones; NaN of a layer without any.
        first_layer: the block, from 0, behind which those outliers begin that the verdict is about; None if there are
            none.
        images_with_outliers: images that have some of those.
        images: all.
    """

    word: Literal["clean", "artifacts", "unclear"]
    sentence: str
    share: tuple[float, ...]
    largest_ratio: tuple[float, ...]
    first_layer: int | None
    images_with_outliers: int
    images: int


def verdict(patches: Patches, rule: Rule = DEFAULT_RULE) -> Verdict:
    """Decide between ``"clean"``, ``"artifacts"`` and ``"unclear"``.

    A patch counts if it is an outlier among the patches of all images and among those of its own: an image whose norms
    are all larger, as noise among plain images has them behind the first blocks, has no artifact.

    The model has artifacts if some patch that counts *stays* an outlier behind a quarter of the blocks in a row, and
    two at least, or is one by more than twice the threshold behind the last block. A residual stream keeps a massive
    activation until some block takes it away; in the published models that is much of the depth (DINOv2-g: 15 to 40 of
    40 blocks, arXiv 2309.16588, fig. 4). What is above a threshold behind one early block, where norms are small and
    follow the contrast of the pixels, is no such thing, but is not passed over either: then it is unclear. One patch of
    one image is enough for artifacts, and the sentence tells how many there are.

    It is clean if no patch counts. It is unclear as well if norms are not finite, if there are fewer than ten patches,
    and by a percentile, which calls the same share of any model outliers.

    Args:
        patches: of all images.
        rule: what an outlier is.
    """
    norms, images = patches.norms, len(patches.grids)
    layers, count = norms.shape
    mask = outliers(patches, rule)
    share = tuple(mask.double().mean(1).tolist()) if count else (0.0,) * layers
    ratios = tuple(_largest_ratio(of_layer) for of_layer in norms)

    def found(word: Literal["clean", "artifacts", "unclear"], sentence: str, counted: Tensor | None = None) -> Verdict:
        some = counted is not None and bool(counted.any())
        first = int(counted.any(1).nonzero()[0]) if some else None
        return Verdict(
            word, f"{word}: {sentence}", share, ratios, first, _images(patches, counted) if some else 0, images
        )

    if reason := _undecidable(patches, rule):
        return found("unclear", reason)
    largest = max(range(layers), key=ratios.__getitem__)
    norm = f" {norms[largest].max().item():.3g}," if rule.kind == "absolute" else ""
    measured = f"largest patch norm{norm} {ratios[largest]:.3g} x the median behind block {largest} (rule {rule})"
    every = "1 block" if layers == 1 else f"all {layers} blocks"
    counted = mask & _outliers_of_own_image(patches, rule, mask)
    if not counted.any():
        within = ", no patch an outlier within its own image" if mask.any() else ""
        return found("clean", f"{measured}{within}, {every}, {_count(images, 'image')}")

    staying, needed = _staying(counted, norms, thresholds(patches, rule))
    if not staying.any():
        blocks = ", ".join(map(str, counted.any(1).nonzero()[:, 0].tolist()))
        return found(
            "unclear",
            f"{measured}, but no patch stays above it behind {needed} blocks in a row: {_where(patches, counted)}, "
            f"behind {'block' if counted.any(1).sum() == 1 else 'blocks'} {blocks} of {layers}",
            counted,
        )
    first = int(staying.any(1).nonzero()[0])
    last = "" if largest == layers - 1 else f", {ratios[-1]:.3g} x behind the last"
    return found(
        "artifacts", f"{measured}{last}; {_where(patches, staying)}, first behind block {first} of {layers}", staying
    )


def frequency(mask: Tensor, patches: Patches, shape: tuple[int, int] | None = None) -> Tensor:
    """At each position of the grid the share of images that have an outlier there (Darcet et al., fig. 10).

    Grids of other shapes are scaled onto the common one: a cell has an outlier if a patch that it overlaps is one.

    Args:
        mask: ``[T]`` bool, the outliers of one layer.
        patches: of all images.
        shape: rows and columns of the result; by default the grid that most images have.

    Returns:
        ``[rows, columns]`` fp32, among the images that have a valid patch there; 0 where none has.
    """
    shape = shape or Counter(patches.grids).most_common(1)[0][0]
    with_outlier, shown = torch.zeros(shape), torch.zeros(shape)
    for own, grid in zip(_by_image(patches), patches.grids, strict=True):
        maps = torch.zeros(2, *grid)
        at = patches.row[own], patches.column[own]
        maps[0][at], maps[1][at] = mask[own].float(), 1.0
        outlier, valid = F.adaptive_max_pool2d(maps, shape)
        with_outlier += outlier
        shown += valid
    return with_outlier / shown.clamp(min=1.0)


def _undecidable(patches: Patches, rule: Rule) -> str | None:
    """Why these norms and this rule say nothing about the model; None if they do."""
    norms, count = patches.norms, patches.norms.shape[1]
    finite = norms.isfinite()
    if not finite.all():
        block = int((~finite).any(1).nonzero()[0])
        nan, inf = int(norms[block].isnan().sum()), int(norms[block].isinf().sum())
        return (
            f"behind block {block} {nan + inf} of {count} patch norms are not finite ({nan} NaN, {inf} infinite): the "
            "model or its input overflows, and the norms behind it tell nothing"
        )
    if count < _FEWEST:
        images = _count(len(patches.grids), "image")
        return f"{_count(count, 'patch', 'patches')} in {images}: at least {_FEWEST} are needed"
    if rule.kind == "percentile":
        return (
            f"the rule {rule} finds {100 - rule.value:.3g}% outliers in any model, with artifacts or without; take "
            f"another, such as {DEFAULT_RULE}"
        )
    return None


def _by_image(patches: Patches) -> tuple[Tensor, ...]:
    """Of each image the indices of its patches; none of one without valid patches."""
    counts = patches.image.bincount(minlength=len(patches.grids))
    return patches.image.argsort(stable=True).split(counts.tolist())


def _those(patches: Patches, which: Tensor) -> Patches:
    rest = (patches.image[which], patches.row[which], patches.column[which])
    return Patches(patches.norms[:, which], *rest, patches.grids)


def _largest_ratio(norms: Tensor) -> float:
    finite = norms[norms.isfinite()].double().numpy()
    if not finite.size:
        return math.nan
    largest, median = finite.max(), np.median(finite)
    if median == 0.0:
        return 1.0 if largest == 0.0 else math.inf
    return float(largest / median)


def _outliers_of_own_image(patches: Patches, rule: Rule, mask: Tensor) -> Tensor:
    """``[L, T]`` bool, those of images that have any in the mask: the others need no second look."""
    own = torch.isin(patches.image, patches.image[mask.any(0)])
    found = torch.zeros_like(mask)
    found[:, own] = outliers(_those(patches, own), rule, per="image")
    return found


def _staying(counted: Tensor, norms: Tensor, limits: Tensor) -> tuple[Tensor, int]:
    """The outliers ``[L, T]`` that make artifacts, see ``verdict``; and how many blocks in a row are a stay."""
    layers = len(counted)
    needed = max(2, math.ceil(layers / 4))
    staying = torch.zeros_like(counted)
    staying[-1] = counted[-1] & (norms[-1] > _LAST_BLOCK_FACTOR * limits[-1])
    if layers >= needed:
        starts = counted.unfold(0, needed, 1).all(-1)
        for i in range(needed):
            staying[i : i + len(starts)] |= starts
    for layer in reversed(range(layers - 1)):  # what is large behind the last block may have begun before
        staying[layer] |= staying[layer + 1] & counted[layer]
    return staying, needed


def _images(patches: Patches, counted: Tensor) -> int:
    return patches.image[counted.any(0)].unique().numel()


def _where(patches: Patches, counted: Tensor) -> str:
    share = counted.any(0).double().mean().item()
    return f"{100 * share:.3g}% of patches, in {_images(patches, counted)} of {_count(len(patches.grids), 'image')}"


def _count(number: int, one: str, more: str | None = None) -> str:
    return f"{number} {one}" if number == 1 else f"{number} {more or f'{one}s'}"
