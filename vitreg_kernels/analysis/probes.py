"""What a linear map of one token tells: of its image, of its position, of the pixels beneath it.

Darcet et al. (arXiv 2309.16588): outliers tell much of the image (tables 1 and 6) and little of their position and
pixels (figure 5b). Every score is of tokens of images that the map was not fitted to, the scaling and the choice of
regularisation included.

Two errors stand beside a score. ``error`` is the paper's: the standard deviation over repeated draws and splits of the
same images. ``standard_error`` says how far the score would move with other images; tokens of one image count as one
observation, for they are alike. It is of the fitted maps as they are: no estimate without bias of the variance of
cross-validation exists, for its training sets overlap (Bengio and Grandvalet, JMLR 5, 2004).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, KFold, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from .draws import Drawn, PatchTokens
from .findings import Probe

# From maps that hardly look at the tokens, to ones that fit whatever they can, of standardised features.
CLASSIFICATION_STRENGTHS = np.logspace(-4, 0, 5)
PIXEL_PENALTIES = np.logspace(6, -6, 7)
# Of the splits inside a training set that choose between them.
INNER_FOLDS = 3

KINDS = ("normal", "outlier")

Split = tuple[np.ndarray, np.ndarray]


def classify(drawn: Sequence[Drawn], labels: Sequence[str | None], *, folds: int = 5, seed: int = 0) -> list[Probe]:
    """Logistic regression from one token of a kind to the label of its image; accuracy, for each kind.

    Kinds are compared on the same images and the same splits, or they would differ by their images too: on those that
    have a token of every kind. A kind that too few images have is left out of that, and not measured. Each repeat takes
    the next draw and another split.

    Args:
        drawn: of each kind, with the same repeats, of the same images.
        labels: of those B images; None for one that has none, which is left out.
        folds: of the cross-validation, at least 3; a class of fewer images is left out.
        seed: of the splits.

    Returns:
        One of each kind, in order. Chance is guessing always the most frequent class.

    Raises:
        ValueError: if labels, images and repeats do not fit together, there are too few folds, or tokens are not
            finite.
    """
    _check_folds(folds)
    shapes = {(len(each.has), each.tokens.shape[0]) for each in drawn}
    if len(shapes) > 1 or any(images != len(labels) for images, _ in shapes):
        raise ValueError(
            f"kinds must be drawn equally often from the same {len(labels)} images that have labels, not (images, "
            f"repeats) {sorted(shapes)}"
        )
    names = np.array(["" if label is None else str(label) for label in labels], dtype=object)
    has = {each.kind: each.has.numpy() for each in drawn}
    kept = np.array([label is not None for label in labels], dtype=bool)
    measured = set()
    for kind in sorted(has, key=lambda kind: -has[kind].sum()):
        common = kept & has[kind]
        common &= np.isin(names, _large_classes(names[common], folds))
        if len(set(names[common])) >= 2:
            kept = common
            measured.add(kind)
    return [
        _classified(each, names, kept, folds, seed)
        if each.kind in measured
        else _not_measured(
            "classification",
            each.kind,
            "accuracy",
            f"too few images: needs 2 classes of at least {folds} labelled images with such a token, which "
            f"{int(has[each.kind].sum())} of {len(labels)} images have",
        )
        for each in drawn
    ]


def position(patches: PatchTokens, *, folds: int = 5, seed: int = 0) -> list[Probe]:
    """Logistic regression from a patch token to its position, one class each; top-1 and mean distance in patches.

    One map is fitted to all tokens and judged on normal ones and outliers apart, so that both are told by a map of
    the same training; for a map of outliers alone, give no others. Images never have tokens on both sides of a split.
    If grids differ, those of the most frequent grid are taken.

    Args:
        patches: of all images.
        folds: of the cross-validation over images, at least 3.
        seed: of the splits.

    Returns:
        Top-1 and mean distance of ``"normal"``, then of ``"outlier"``. Chance is the best constant guess that the
        training images offer: the position that most of their tokens of the kind have, and the one nearest to these on
        average. A map that learnt nothing guesses at random, which is farther: .52 against .38 of a square's side.

    Raises:
        ValueError: if there are too few folds, or tokens are not finite.
    """
    _check_folds(folds)
    images = patches.image.numpy()
    rows, columns = Counter(patches.grids).most_common(1)[0][0] if patches.grids else (0, 0)
    kept = np.array([grid == (rows, columns) for grid in patches.grids], dtype=bool)[images]
    images, target = images[kept], (patches.row * columns + patches.column).numpy()[kept]
    outlier = patches.outlier.numpy()[kept]
    tokens = _finite(patches.tokens, torch.float32)[kept]
    splits = list(_splits(images, folds, seed))
    if not splits or any(len(set(target[train])) < 2 for train, _ in splits):
        why = f"too few images: needs {folds} of one grid, and 2 positions in all training sets, got {len(set(images))}"
        return [_not_measured("position", kind, metric, why) for kind in KINDS for metric in ("top-1", "mean distance")]

    places = np.stack(np.divmod(np.arange(rows * columns), columns), axis=1)
    apart = np.linalg.norm(places[:, None] - places[None], axis=2)
    guess, likeliest, nearest = (np.empty_like(target) for _ in range(3))
    for train, test in splits:
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        guess[test] = probe.fit(tokens[train], target[train]).predict(tokens[test])
        for reference, judged in _by_kind(train, test, outlier):
            counts = np.bincount(target[reference], minlength=len(places))
            likeliest[judged], nearest[judged] = counts.argmax(), (counts @ apart).argmin()

    others = len(patches.grids) - Counter(patches.grids)[rows, columns]
    elsewhere = f"; {others} images of other grids are left out" if others else ""
    found = []
    for kind, of_kind in zip(KINDS, (~outlier, outlier), strict=True):
        count = int(of_kind.sum())
        for metric, reached, constant, which in (
            ("top-1", target == guess, target == likeliest, "the most frequent position"),
            ("mean distance", apart[target, guess], apart[target, nearest], "the best single position"),
        ):
            if not count:
                found.append(_not_measured("position", kind, metric, "no such patch"))
                continue
            score, standard_error = _mean(reached[of_kind], images[of_kind])
            chance, note = float(constant[of_kind].mean()), f"chance: always {which}{elsewhere}"
            found.append(Probe("position", kind, metric, score, None, chance, count, note, standard_error))
    return found


def pixels(patches: PatchTokens, *, folds: int = 5, seed: int = 0) -> list[Probe]:
    """Ridge regression from a patch token to the pixels beneath it; L2 error and R².

    One map is fitted to all tokens, judged and split as in ``position``; its penalty is chosen inside each training
    set, by images as well.

    Args:
        patches: of all images, of any grids; ``pixels`` give the unit of the error.
        folds: of the cross-validation over images, at least 3.
        seed: of the splits.

    Returns:
        L2 error, the mean over tokens of the L2 norm of what is wrong with the patch, and R², the share of the pixels'
        variance that is told; of ``"normal"``, then of ``"outlier"``. Chance is the mean patch of the kind in the
        training images, also of R², which is below 0 where the map is worse.

    Raises:
        ValueError: if there are too few folds, or tokens or pixels are not finite.
    """
    _check_folds(folds)
    images, outlier = patches.image.numpy(), patches.outlier.numpy()
    tokens, target = _finite(patches.tokens, torch.float64), _finite(patches.pixels, torch.float64)
    splits = list(_splits(images, folds, seed))
    if not splits:
        why = f"too few images: needs {folds}, got {len(set(images))}"
        return [_not_measured("pixels", kind, metric, why) for kind in KINDS for metric in ("L2 error", "R2")]

    wrong, spread = np.empty(len(target)), np.empty(len(target))
    for train, test in splits:
        inner = list(_splits(images[train], min(INNER_FOLDS, len(set(images[train]))), seed))
        probe = GridSearchCV(
            make_pipeline(StandardScaler(), Ridge()),
            {"ridge__alpha": PIXEL_PENALTIES},
            scoring="neg_mean_squared_error",
            cv=inner,
        )
        guess = probe.fit(tokens[train], target[train]).predict(tokens[test])
        wrong[test] = np.linalg.norm(target[test] - guess, axis=1)
        for reference, judged in _by_kind(train, test, outlier):
            spread[judged] = np.linalg.norm(target[judged] - target[reference].mean(0), axis=1)

    found, note = [], "chance: the mean patch of the kind"
    for kind, of_kind in zip(KINDS, (~outlier, outlier), strict=True):
        image, count = images[of_kind], int(of_kind.sum())
        if not count:
            found += [_not_measured("pixels", kind, metric, "no such patch") for metric in ("L2 error", "R2")]
            continue
        score, standard_error = _mean(wrong[of_kind], image)
        chance = float(spread[of_kind].mean())
        found.append(Probe("pixels", kind, "L2 error", score, None, chance, count, note, standard_error))
        if not np.ptp(target[of_kind], axis=0).any():
            found.append(_not_measured("pixels", kind, "R2", "the patches do not differ"))
            continue
        unexplained, standard_error = _ratio(wrong[of_kind] ** 2, spread[of_kind] ** 2, image)
        found.append(Probe("pixels", kind, "R2", 1 - unexplained, None, 0.0, count, note, standard_error))
    return found


def _classified(drawn: Drawn, names: np.ndarray, kept: np.ndarray, folds: int, seed: int) -> Probe:
    """The accuracy of one kind on the images kept, all of which have such a token."""
    target = np.unique(names[kept], return_inverse=True)[1]
    tokens = _finite(drawn.tokens, torch.float32)[:, kept[drawn.has.numpy()]]
    right = np.empty((len(tokens), len(target)))
    for repeat, draw in enumerate(tokens):
        for train, test in StratifiedKFold(folds, shuffle=True, random_state=seed + repeat).split(draw, target):
            probe = GridSearchCV(
                make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
                {"logisticregression__C": CLASSIFICATION_STRENGTHS},
                cv=StratifiedKFold(min(INNER_FOLDS, folds - 1), shuffle=True, random_state=seed + repeat),
            )
            right[repeat, test] = probe.fit(draw[train], target[train]).predict(draw[test]) == target[test]
    # One observation an image, whatever the repeats: they are of the same images.
    score, standard_error = _mean(right.mean(0), np.arange(len(target)))
    classes = np.bincount(target)
    note = f"chance: always the most frequent of {len(classes)} classes"
    if not kept.all():
        note += (
            f"; {int((~kept).sum())} of {len(kept)} images are left out: without a label, without a token of each kind "
            f"measured, or of a class of fewer than {folds}"
        )
    error = float(right.mean(1).std(ddof=1)) if len(right) > 1 else None
    chance = float(classes.max() / len(target))
    return Probe("classification", drawn.kind, "accuracy", score, error, chance, len(target), note, standard_error)


def _splits(images: np.ndarray, folds: int, seed: int) -> Iterator[Split]:
    """Training and test tokens, all those of an image on one side; none if there are fewer images than folds."""
    distinct = np.unique(images)
    if len(distinct) < folds:
        return
    for _, test in KFold(folds, shuffle=True, random_state=seed).split(distinct):
        held_out = np.isin(images, distinct[test])
        yield np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _mean(values: np.ndarray, images: np.ndarray) -> tuple[float, float | None]:
    return _ratio(values, np.ones(len(values)), images)


def _ratio(numerators: np.ndarray, denominators: np.ndarray, images: np.ndarray) -> tuple[float, float | None]:
    """Sum over sum, and the standard error of it over images: a ratio estimator of clusters, linearised.

    Cochran, Sampling Techniques (1977), section 6.5; of a mean of one token an image, the usual one.
    """
    count = np.unique(images, return_inverse=True)[1]
    above, below = np.bincount(count, numerators), np.bincount(count, denominators)
    ratio = float(above.sum() / below.sum())
    if len(above) < 2:
        return ratio, None
    residual = above - ratio * below
    return ratio, float(np.sqrt(len(above) / (len(above) - 1) * (residual**2).sum()) / below.sum())


def _large_classes(names: np.ndarray, folds: int) -> list[str]:
    return [name for name, images in Counter(names).items() if images >= folds]


def _by_kind(train: np.ndarray, test: np.ndarray, outlier: np.ndarray) -> Iterator[Split]:
    """Of a split, normal tokens and then outliers; all the training tokens where it has none of the kind."""
    for of_kind in (~outlier, outlier):
        reference = train[of_kind[train]]
        yield reference if len(reference) else train, test[of_kind[test]]


def _not_measured(task: str, kind: str, metric: str, why: str) -> Probe:
    return Probe(task, kind, metric, None, None, None, 0, f"not measured: {why}")


def _finite(values: Tensor, dtype: torch.dtype) -> np.ndarray:
    array = values.detach().to(dtype).numpy()
    bad = int((~np.isfinite(array)).sum())
    if bad:
        raise ValueError(
            f"{bad} of {array.size} values are NaN or infinite; a probe needs finite ones, so leave these images out"
        )
    return array


def _check_folds(folds: int) -> None:
    if folds < 3:
        raise ValueError(f"folds must be at least 3, so that a training set can be split once more, not {folds}")
