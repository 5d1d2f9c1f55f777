"""What comes out of a call: counts and sums of token norms, and what follows from them. Everything here is plain data.

Symbols used throughout the op: B batch, N tokens, C channels of a token. ``...`` are leading dimensions, such as one
for the layers of a model; everything here works on all of them at once, on the device, and waits for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .bins import NUM_BINS, bin_edges

GROUPS = ("cls", "registers", "patches")


class NormDistribution(NamedTuple):
    """How the norms of some tokens are distributed. Counts every token once; NaN and infinite ones apart.

    Attributes:
        histogram: ``[..., 2048]`` int64, finite norms by bin (``bins.bin_edges``).
        sums: ``[..., 2]`` fp64, of the finite norms and of their squares.
        extremes: ``[..., 2]`` fp32, smallest and largest finite norm; inf and -inf while there is none.
        nonfinite: ``[..., 2]`` int64, how many norms were NaN and how many infinite.
    """

    histogram: Tensor
    sums: Tensor
    extremes: Tensor
    nonfinite: Tensor

    @staticmethod
    def zeros(shape: Sequence[int], device: torch.device | str) -> NormDistribution:
        """Distributions of no tokens, with ``shape`` for their leading dimensions."""
        return _zeros(shape, partial(torch.zeros, device=device))

    @staticmethod
    def zeros_for(shape: Sequence[int], norms: Tensor) -> NormDistribution:
        """The same where some norms are; each call's own where ``torch.vmap`` maps them."""
        return _zeros(shape, norms.new_zeros)

    @property
    def count(self) -> Tensor:
        """``[...]`` int64, tokens of finite norm: those that everything but ``num_nan`` and ``num_inf`` is about."""
        return self.histogram.sum(-1)

    @property
    def num_nan(self) -> Tensor:
        """``[...]`` int64, tokens whose norm is NaN."""
        return self.nonfinite[..., 0]

    @property
    def num_inf(self) -> Tensor:
        """``[...]`` int64, tokens whose norm is infinite."""
        return self.nonfinite[..., 1]

    @property
    def mean(self) -> Tensor:
        """``[...]`` fp64; NaN where there are no tokens."""
        return self.sums[..., 0] / self.count

    @property
    def std(self) -> Tensor:
        """``[...]`` fp64, of the tokens as the whole population; NaN where there are none."""
        return (self.sums[..., 1] / self.count - self.mean.square()).clamp(min=0.0).sqrt()

    @property
    def min(self) -> Tensor:
        """``[...]`` fp32; NaN where there are no tokens."""
        return self._unless_empty(self.extremes[..., 0])

    @property
    def max(self) -> Tensor:
        """``[...]`` fp32; NaN where there are no tokens."""
        return self._unless_empty(self.extremes[..., 1])

    @property
    def median(self) -> Tensor:
        """``[...]`` fp32, the 50th percentile."""
        return self.percentile(50.0)

    def percentile(self, q: float) -> Tensor:
        """``[...]`` fp32, the smallest norm that at least q percent of the tokens do not exceed, to within half a bin.

        Within the extremes, and so right for the open-ended bins where all tokens of one are alike. NaN where there
        are no tokens.

        Raises:
            ValueError: if q is not from 0 to 100.
        """
        if not 0.0 <= q <= 100.0:
            raise ValueError(f"a percentile must be from 0 to 100, got {q!r}")
        return self._unless_empty(_quantile(self._middles(), self.histogram, q / 100.0))

    @property
    def median_deviation(self) -> Tensor:
        """``[...]`` fp32, the median of the norms' distances from their median (MAD, unscaled), to within a bin."""
        distances, order = (self._middles() - self.median[..., None]).abs().sort(dim=-1)
        return self._unless_empty(_quantile(distances, self.histogram.gather(-1, order), 0.5))

    def count_from(self, threshold: Tensor | float) -> Tensor:
        """``[...]`` int64, tokens whose norm is at least the first bin edge that is not below the threshold.

        Args:
            threshold: ``[...]``, or one number for all.
        """
        first = _edge_from(threshold, self.histogram)
        numbers = torch.arange(NUM_BINS, device=self.histogram.device)
        return torch.where(numbers >= first[..., None], self.histogram, 0).sum(-1)

    def merged(self, other: NormDistribution) -> NormDistribution:
        """The distribution of both's tokens, as new tensors."""
        lowest = torch.minimum(self.extremes[..., 0], other.extremes[..., 0])
        highest = torch.maximum(self.extremes[..., 1], other.extremes[..., 1])
        return NormDistribution(
            self.histogram + other.histogram,
            self.sums + other.sums,
            torch.stack((lowest, highest), dim=-1),
            self.nonfinite + other.nonfinite,
        )

    def _unless_empty(self, x: Tensor) -> Tensor:
        return torch.where(self.count > 0, x, math.nan)

    def _middles(self) -> Tensor:
        """``[..., 2048]`` fp32, what stands for the tokens of a bin: its middle, moved between the extremes."""
        edges = bin_edges(self.histogram.device)
        middles = ((edges[:-1] + edges[1:]) / 2).expand(self.histogram.shape)
        return middles.minimum(self.extremes[..., 1:]).maximum(self.extremes[..., :1])


def _zeros(shape: Sequence[int], zeros: Callable[..., Tensor]) -> NormDistribution:
    extremes = zeros((*shape, 2), dtype=torch.float32)
    extremes[..., 0], extremes[..., 1] = math.inf, -math.inf
    return NormDistribution(
        zeros((*shape, NUM_BINS), dtype=torch.int64),
        zeros((*shape, 2), dtype=torch.float64),
        extremes,
        zeros((*shape, 2), dtype=torch.int64),
    )


class Outliers(NamedTuple):
    """Tokens of unusually large norm.

    Attributes:
        threshold: ``[...]`` fp32, the bin edge from which on a norm counts as an outlier's; NaN where it is relative to
            patches and there are none, infinite beyond the last bin's beginning.
        cls, registers, patches: ``[...]`` int64, tokens of the group whose norm is finite and at least the threshold.
    """

    threshold: Tensor
    cls: Tensor
    registers: Tensor
    patches: Tensor


class TokenNormStats(NamedTuple):
    """Distributions of token norms by group.

    Attributes:
        cls, registers, patches: of the group's tokens, all leading dimensions alike.
    """

    cls: NormDistribution
    registers: NormDistribution
    patches: NormDistribution

    @staticmethod
    def of_stacked(stacked: NormDistribution) -> TokenNormStats:
        """Views of distributions whose last leading dimension is the group: ``[..., 3]``."""
        return TokenNormStats(*(NormDistribution(*(x[..., group, :] for x in stacked)) for group in range(len(GROUPS))))

    def outliers(
        self,
        *,
        norm: float | None = None,
        median: float | None = None,
        mad: float | None = None,
        percentile: float | None = None,
    ) -> Outliers:
        """How many tokens of each group have a norm from a threshold on, which is given in one of four ways.

        The threshold is rounded up to a bin edge, where counting is exact. Relative thresholds are those of each layer
        by itself, since typical norms grow many times over from first to last.

        Args:
            norm: a norm, such as the 150 that Darcet et al. (arXiv 2309.16588) take for DINOv2-g.
            median: a multiple of the patches' median. 3.0 if nothing is given.
            mad: how many median absolute deviations of the patches beyond their median.
            percentile: a percentile of the patches.

        Raises:
            ValueError: if more than one is given, or not as a finite number of at least 0.
        """
        given = {"norm": norm, "median": median, "mad": mad, "percentile": percentile}
        given = {name: value for name, value in given.items() if value is not None} or {"median": 3.0}
        if len(given) > 1:
            raise ValueError(f"outliers have one threshold, got {' and '.join(f'{k}={v}' for k, v in given.items())}")
        ((kind, value),) = given.items()
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < math.inf:
            raise ValueError(f"{kind} must be a finite number of at least 0, got {value!r}")
        threshold = self._threshold(kind, value)
        # Not by [], which for a single index asks the device for its value.
        edge = bin_edges(threshold.device).take(_edge_from(threshold, self.patches.histogram))
        edge = torch.where(threshold.isnan(), math.nan, edge)
        return Outliers(edge, *(group.count_from(edge) for group in self))

    def _threshold(self, kind: str, value: float) -> Tensor:
        """``[...]`` fp64, not yet rounded."""
        patches = self.patches
        if kind == "norm":
            return torch.full_like(patches.sums[..., 0], value)
        if kind == "percentile":
            return patches.percentile(value).double()
        if kind == "median":
            return patches.median.double() * value
        return patches.median.double() + patches.median_deviation.double() * value


def _quantile(values: Tensor, counts: Tensor, share: float) -> Tensor:
    """``[...]``, the first of ascending values ``[..., 2048]`` up to which there is this share of the tokens."""
    up_to = counts.cumsum(-1)
    wanted = (up_to[..., -1:].double() * share).ceil().clamp(min=1.0)
    index = (up_to < wanted).sum(-1, keepdim=True).clamp(max=values.shape[-1] - 1)
    return values.gather(-1, index)[..., 0]


def _edge_from(threshold: Tensor | float, histogram: Tensor) -> Tensor:
    """``[...]``, the index of the first bin edge that is not below the threshold; that of infinity for NaN."""
    # In fp64, so that a threshold that fp32 would round down to an edge is not taken for the edge.
    edges = bin_edges(histogram.device).double()
    if not isinstance(threshold, Tensor):
        threshold = torch.full((), threshold, dtype=torch.float64, device=histogram.device)
    threshold = threshold.double().expand(histogram.shape[:-1]).contiguous()
    return torch.searchsorted(edges, threshold).clamp(max=NUM_BINS)
