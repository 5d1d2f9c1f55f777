"""Calls of token_norms and token_norm_stats to test with, and what they are held against. Shared by all their suites.

A call is drawn as plain numbers (a ``Spec``), which is what a failing test prints, and made into tensors from its seed.
Counts are held against numpy's, which takes norms apart with frexp where the library reads their bits or looks them up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from residual_norm_cases import LAYOUTS, _laid_out, assert_passed
from torch import Tensor

from vitreg_kernels import NormDistribution, TokenLayout
from vitreg_kernels.dispatch import Request
from vitreg_kernels.functional import token_norm_stats, token_norms
from vitreg_kernels.measure.accuracy import compare
from vitreg_kernels.ops.token_norms.backends import BACKENDS
from vitreg_kernels.ops.token_norms.bins import bin_edges

USABLE = [b for b in BACKENDS if not b.reasons_against(Request("token_norms", "cpu", 0, torch.float32, channels=64))]

DISTRIBUTION = NormDistribution._fields

Call = dict[str, Any]


class Spec(NamedTuple):
    """One call.

    Attributes:
        batch, tokens, channels: of x.
        dtype: of x.
        layout: how x lies in memory, see ``residual_norm_cases``.
        num_cls_tokens, num_registers: of the token layout.
        norms: x is norms ``[B, N]`` rather than tokens.
        spread: of the elements of x.
        seed: of the numbers.
    """

    batch: int = 2
    tokens: int = 21
    channels: int = 48
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    num_cls_tokens: int = 1
    num_registers: int = 4
    norms: bool = False
    spread: float = 1.0
    seed: int = 0

    def __str__(self) -> str:
        changed = (f"{name}={x}" for name, x in self._asdict().items() if x != self._field_defaults[name])
        return ",".join(changed) or "plain"


# A call of every kind once.
KINDS = [
    Spec(),
    Spec(norms=True),
    Spec(num_registers=0),
    Spec(num_cls_tokens=0, num_registers=0),
    Spec(num_cls_tokens=2, num_registers=19),
]

# Norms where bins begin, just before, in the open-ended bins, of no sign, and that are no numbers.
EDGES = bin_edges("cpu")[1:-1]
ODD_NORMS = torch.cat(
    (
        EDGES,
        torch.nextafter(EDGES, torch.zeros(1)),
        torch.tensor([0.0, -0.0, 1e-45, 1e-38, 1e-6, 2.0**-12, 2.0**20, 1e9, 3.4e38]),
        torch.tensor([math.inf, -math.inf, math.nan, -math.nan]),
    )
)


def make_call(spec: Spec) -> Call:
    """The arguments of ``token_norm_stats``, all but the backend."""
    generator = torch.Generator().manual_seed(spec.seed)
    x = torch.randn(spec.batch, spec.tokens, spec.channels, generator=generator) * spec.spread
    # Tokens of other norms than their neighbours', so that they cannot be taken for one another.
    x *= 2.0 ** torch.empty(spec.batch, spec.tokens, 1).uniform_(-2.0, 2.0, generator=generator)
    if spec.norms:
        x = x.norm(dim=-1, keepdim=True)
    x = _laid_out(x.to(spec.dtype), spec.layout)
    layout = TokenLayout(num_cls_tokens=spec.num_cls_tokens, num_registers=spec.num_registers)
    return {"x": x[..., 0] if spec.norms else x, "layout": layout}


def run(backend: str, call: Call) -> dict[str, Tensor]:
    """The norms, unless the call has them, and the distributions of the groups, stacked, by name."""
    stats = token_norm_stats(**call, backend=backend)
    results = {name: torch.stack([getattr(group, name) for group in stats]) for name in DISTRIBUTION}
    return results if call["x"].ndim == 2 else {"token_norms": token_norms(call["x"], backend=backend), **results}


def counted(norms: Tensor, layout: TokenLayout) -> dict[str, Tensor]:
    """The distributions ``[3, ...]`` of fp32 norms ``[B, N]``, by numpy and exact sums."""
    groups = [_counted(group.numpy().ravel()) for group in layout.split(norms)]
    return {name: torch.stack([group[name] for group in groups]) for name in DISTRIBUTION}


def _counted(norms: np.ndarray) -> dict[str, Tensor]:
    finite = norms[np.isfinite(norms)]
    mantissa, exponent = np.frexp(finite.astype(np.float64))  # of [0.5, 1)
    number = np.floor((2 * mantissa - 1) * 64).astype(int) + 64 * (exponent - 1 + 12)
    number = np.where(finite <= 0, 0, number).clip(0, 2047)
    sums = math.fsum(finite.astype(np.float64)), math.fsum(finite.astype(np.float64) ** 2)
    return {
        "histogram": torch.from_numpy(np.bincount(number, minlength=2048)),
        "sums": torch.tensor(sums, dtype=torch.float64),
        "extremes": torch.tensor([finite.min(initial=np.inf), finite.max(initial=-np.inf)], dtype=torch.float32),
        "nonfinite": torch.tensor([np.isnan(norms).sum(), np.isinf(norms).sum()]),
    }


def assert_same_counts(actual: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    """Counts and extremes to the last bit, sums to the last few of fp64."""
    for name in DISTRIBUTION:
        assert actual[name].dtype == expected[name].dtype, f"{name}, {what}"
        if name == "sums":
            torch.testing.assert_close(actual[name], expected[name], rtol=1e-13, atol=0.0, msg=f"{name}, {what}")
        else:
            assert torch.equal(actual[name], expected[name]), f"{name}, {what}"


def assert_parity(spec: Spec, backend: str, *, draws: int = 1) -> None:
    """The norms keep the accuracy rule, and their counts are numpy's.

    ``draws`` calls, alike but for their random numbers, are judged as one: a few eager errors may be luck.
    """
    actual, exact, eager = [], [], []
    for i in range(draws):
        call = make_call(spec._replace(seed=spec.seed + i))
        results, x, layout = run(backend, call), call["x"], call["layout"]
        norms = x.float() if spec.norms else results["token_norms"].float()
        assert_same_counts(results, counted(norms, layout), f"{backend} on {spec}")
        if not spec.norms:
            actual.append(results["token_norms"])
            exact.append(token_norms(x.double(), backend="reference"))
            eager.append(token_norms(x, backend="reference"))
    if actual:
        accuracy = compare(torch.cat(actual), torch.cat(exact), torch.cat(eager), terms=spec.channels)
        assert_passed({"token_norms": accuracy}, f"{backend} on {spec}")


@st.composite
def specs(draw: st.DrawFn, dtypes: Sequence[torch.dtype]) -> Spec:
    """Any call of some size: the eager error of a handful of numbers is luck."""
    tokens = draw(st.integers(6, 40))
    prefix = draw(st.integers(0, tokens))
    cls = draw(st.integers(0, min(prefix, 2)))
    return Spec(
        batch=draw(st.integers(1, 3)),
        tokens=tokens,
        channels=draw(st.one_of(st.sampled_from((8, 16, 64, 96)), st.integers(8, 140))),
        dtype=draw(st.sampled_from(dtypes)),
        layout=draw(st.sampled_from(LAYOUTS)),
        num_cls_tokens=cls,
        num_registers=prefix - cls,
        norms=draw(st.booleans()),
        spread=draw(st.sampled_from((1.0, 1.0, 1e-3, 100.0))),
        seed=draw(st.integers(0, 2**16)),
    )
