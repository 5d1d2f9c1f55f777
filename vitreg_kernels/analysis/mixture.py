"""One population of norms or two, and the boundary between them: a mixture of two Gaussians over their logarithms."""

from __future__ import annotations

import math

import numpy as np
from sklearn.mixture import GaussianMixture

_FEWEST = 10
_APART = 3.0
_DEEPEST_VALLEY = 0.25


def boundary(norms: np.ndarray) -> float:
    """The norm in the middle of the gap between the two populations; infinity unless there are clearly two.

    Two Gaussians fit any distribution better than one does, a skewed or a flat one too, so a better fit decides
    nothing. There are two populations if the centre of the upper is at least 3 times that of the lower, the upper
    has fewer members, and between the centres the density falls to a quarter of the smaller peak or less. (Of a flat
    distribution it falls to .44.)

    Args:
        norms: ``[T]``, finite; zeros have no logarithm and no say.
    """
    logs = np.log(norms[norms > 0.0])
    if logs.size < _FEWEST or not logs.var() > 0.0:
        return math.inf
    # Begun at the median and the largest norm rather than by k-means, which halves the one population before it finds
    # a second of a few in thousands.
    mixture = GaussianMixture(
        2,
        weights_init=[0.5, 0.5],
        means_init=[[np.median(logs)], [logs.max()]],
        precisions_init=np.full((2, 1, 1), 1.0 / logs.var()),
        max_iter=1000,
        random_state=0,
    ).fit(logs[:, None])
    lower, upper = np.argsort(mixture.means_[:, 0])
    between = np.linspace(mixture.means_[lower, 0], mixture.means_[upper, 0], 1001)[:, None]
    density = np.exp(mixture.score_samples(between))
    apart = between[-1, 0] - between[0, 0] >= math.log(_APART)
    valley = density.min() <= _DEEPEST_VALLEY * min(density[0], density[-1])
    if not (apart and valley and mixture.weights_[upper] < mixture.weights_[lower]):
        return math.inf
    crossing = between[np.argmax(mixture.predict(between) == upper), 0]
    below, above = logs[logs <= crossing], logs[logs > crossing]
    return float(np.exp((below.max() + above.min()) / 2.0)) if above.size else math.inf
