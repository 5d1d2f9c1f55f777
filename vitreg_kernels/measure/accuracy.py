"""The one accuracy rule, used by the tests, ``vitreg check`` and the benchmarks alike.

A result passes when its largest and its mean absolute error against the fp64 reference are each at most twice the error
of the eager formula in the inputs' own dtype, plus ``eps * sqrt(K)`` for K accumulated terms. ``eps`` is that of the
accumulator, fp32, and scales with the exact result. Where the eager formula overflows, the error of rounding the exact
result to the dtype stands for its error, which is never smaller.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Accuracy(NamedTuple):
    """Errors of one tensor against the exact one, in the tensor's own units.

    Attributes:
        max_error, mean_error: of the result.
        eager_max_error, eager_mean_error: of the same-dtype eager formula.
        max_bound, mean_bound: what the rule allows.
    """

    max_error: float
    mean_error: float
    eager_max_error: float
    eager_mean_error: float
    max_bound: float
    mean_bound: float

    @property
    def passed(self) -> bool:
        """Whether both errors are within their bounds; NaN never is."""
        return self.max_error <= self.max_bound and self.mean_error <= self.mean_bound

    @property
    def error_over_bound(self) -> float:
        """The larger of the two errors as a share of its bound: 1 is the limit, inf stands for NaN."""
        shares = [
            0.0 if error == 0.0 else error / bound if bound else math.inf
            for error, bound in ((self.max_error, self.max_bound), (self.mean_error, self.mean_bound))
        ]
        return math.inf if any(map(math.isnan, shares)) else max(shares)

    def __str__(self) -> str:
        return (
            f"max error {self.max_error:.3g} (bound {self.max_bound:.3g}, eager {self.eager_max_error:.3g}), "
            f"mean error {self.mean_error:.3g} (bound {self.mean_bound:.3g}, eager {self.eager_mean_error:.3g})"
        )


def compare(actual: Tensor, exact: Tensor, eager: Tensor, *, terms: int, scale_of: Tensor | None = None) -> Accuracy:
    """Hold ``actual`` against ``exact`` by the rule.

    Infinities must stand where the exact result has them; there they count as no error.

    Args:
        actual: the result under test, any floating dtype.
        exact: the fp64 reference's result, same shape.
        eager: the same-dtype eager formula's result, same shape.
        terms: K, the number of products summed into each element.
        scale_of: what the accumulator's rounding scales with, where terms far larger than the result cancel; the exact
            result itself by default.

    Raises:
        ValueError: if the shapes differ, or the result's dtype is not the eager formula's.
    """
    if not actual.shape == exact.shape == eager.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (actual, exact, eager))
        raise ValueError(f"the result, the exact and the eager tensor must have one shape, not {shapes}")
    if actual.dtype != eager.dtype:
        raise ValueError(f"the result must have the eager formula's dtype, {eager.dtype}, not {actual.dtype}")
    if exact.numel() == 0:
        return Accuracy(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    exact = exact.detach().double()
    max_error, mean_error = _errors(actual, exact)
    eager_max, eager_mean = _errors(eager, exact)
    # What is shown is the eager error itself, with its inf or NaN; what is judged by is finite.
    finite_max, finite_mean = eager_max, eager_mean
    if not math.isfinite(eager_max):
        finite_max, finite_mean = _errors(exact.to(eager.dtype), exact)
    if not math.isfinite(finite_max):
        finite_max = finite_mean = 0.0  # a result beyond the dtype's range allows nothing
    magnitude = (exact if scale_of is None else scale_of).detach().double().abs()
    magnitude = magnitude[magnitude.isfinite()]
    eps = torch.finfo(torch.float32 if actual.dtype != torch.float64 else torch.float64).eps * math.sqrt(terms)
    largest, mean = (magnitude.max().item(), magnitude.mean().item()) if magnitude.numel() else (0.0, 0.0)
    return Accuracy(
        max_error,
        mean_error,
        eager_max,
        eager_mean,
        2 * finite_max + eps * largest,
        2 * finite_mean + eps * mean,
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype hold the same bits, NaN included."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _errors(actual: Tensor, exact: Tensor) -> tuple[float, float]:
    actual = actual.detach().double()
    error = torch.where(actual == exact, 0.0, (actual - exact).abs())  # inf - inf is no error, NaN always is
    return error.max().item(), error.mean().item()
