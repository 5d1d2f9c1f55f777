"""Calls of residual_layer_norm to test with, and the oracle they are held against. Shared by all its suites.

A call is drawn as plain numbers (a ``Spec``), which is what a failing test prints, and made into tensors from its seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from vitreg_kernels.dispatch import Request
from vitreg_kernels.functional import residual_layer_norm
from vitreg_kernels.measure.accuracy import Accuracy, compare
from vitreg_kernels.measure.cases.residual_norm import terms
from vitreg_kernels.ops.residual_norm.backends import BACKENDS

USABLE = [b for b in BACKENDS if not b.reasons_against(Request("residual_norm", "cpu", 0, torch.float32, channels=64))]

DIFFERENTIABLE = ("x", "branch", "layer_scale", "weight", "bias")
OUTPUTS = ("residual", "normalized", "token_norms")
LAYOUTS = ("contiguous", "sliced", "permuted", "strided_channels", "expanded")

Call = dict[str, Any]


class Spec(NamedTuple):
    """One call.

    Attributes:
        batch, tokens, channels: of x.
        dtype: of all tensors.
        layout: how x and the branch lie in memory, see ``_laid_out``.
        branch, layer_scale, drop_path, bias: whether the call has one.
        rms: RMSNorm.
        mean, spread: of the elements of x, token after token.
        seed: of the numbers.
    """

    batch: int = 2
    tokens: int = 9
    channels: int = 48
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    branch: bool = True
    layer_scale: bool = True
    drop_path: bool = True
    bias: bool = True
    rms: bool = False
    mean: float = 0.0
    spread: float = 1.0
    eps: float = 1e-6
    seed: int = 0

    def __str__(self) -> str:
        changed = (f"{name}={x}" for name, x in self._asdict().items() if x != self._field_defaults[name])
        return ",".join(changed) or "full"


PLAIN = Spec(branch=False, layer_scale=False, drop_path=False)
# A call of every kind once.
KINDS = [
    Spec(),
    PLAIN,
    Spec(rms=True, bias=False),
    PLAIN._replace(rms=True, bias=False),
    Spec(bias=False, drop_path=False),
    Spec(layer_scale=False),
    Spec(layer_scale=False, drop_path=False),
]


def make_call(spec: Spec) -> Call:
    """The arguments of ``residual_layer_norm``, all but the backend."""
    generator = torch.Generator().manual_seed(spec.seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def tokens(mean: float) -> Tensor:
        values = randn(spec.batch, spec.tokens, spec.channels) * spec.spread + mean
        return _laid_out(values.to(spec.dtype), spec.layout)

    call = {"x": tokens(spec.mean), "weight": (1 + 0.5 * randn(spec.channels)).to(spec.dtype)}
    if spec.branch:
        call["branch"] = tokens(0.0)
    for name in ("bias", "layer_scale"):
        if getattr(spec, name):
            call[name] = randn(spec.channels).to(spec.dtype)
    if spec.drop_path:
        kept = torch.rand(spec.batch, generator=generator) > 0.3
        call["drop_path"] = (kept / 0.7).to(spec.dtype)
    return {**call, "eps": spec.eps, "rms": spec.rms}


def _laid_out(x: Tensor, layout: str) -> Tensor:
    """The tokens in other strides; numbers differ from layout to layout only where they must."""
    if layout == "sliced":  # rows of a wider tensor, at an odd offset
        wide = x.new_zeros(x.shape[0], x.shape[1] + 2, x.shape[2] + 3)
        wide[:, 1:-1, 1:-2] = x
        return wide[:, 1:-1, 1:-2]
    if layout == "permuted":  # dense, as a convolution's [B, C, N] is
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "strided_channels":
        return x.repeat_interleave(2, -1)[..., ::2]
    if layout == "expanded":  # one image, stride 0
        return x[:1].expand(x.shape)
    return x


def make_upstream(spec: Spec) -> dict[str, Tensor]:
    """Gradients of the residual and the normalized tokens."""
    generator = torch.Generator().manual_seed(spec.seed + 1)
    shape = (spec.batch, spec.tokens, spec.channels)
    return {name: torch.randn(shape, generator=generator).to(spec.dtype) for name in OUTPUTS[:2]}


def run(backend: str, call: Call, upstream: dict[str, Tensor], wanted: Sequence[str] = DIFFERENTIABLE) -> Call:
    """Outputs and gradients by name; ``upstream`` names the outputs that a gradient arrives at."""
    leaves = {name: call[name].detach().requires_grad_() for name in wanted if call.get(name) is not None}
    result = residual_layer_norm(**{**call, **leaves}, backend=backend)
    tensors = {name: x.detach() for name, x in result._asdict().items()}
    upstream = {name: g for name, g in upstream.items() if getattr(result, name).requires_grad}
    outputs = [getattr(result, name) for name in upstream]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), list(upstream.values()), allow_unused=True)
    return tensors | {f"grad_{name}": g for name, g in zip(leaves, gradients, strict=True) if g is not None}


def in_double(call: Call) -> Call:
    return {name: x.double() if isinstance(x, Tensor) else x for name, x in call.items()}


class Oracle:
    """What a call ought to give, and how near each tensor has to come."""

    def __init__(self, call: Call, upstream: dict[str, Tensor]) -> None:
        self.call, self.upstream = call, upstream
        self.eager = run("reference", call, upstream)
        self.exact = run("reference", in_double(call), in_double(upstream))

    def compare(self, tensors: Call) -> dict[str, Accuracy]:
        return compare_all(tensors, self.exact, self.eager, self.call["x"].shape)


def compare_all(tensors: Call, exact: Call, eager: Call, shape: tuple[int, int, int]) -> dict[str, Accuracy]:
    assert tensors.keys() == exact.keys()
    return {name: compare(x, exact[name], eager[name], terms=terms(shape, name)) for name, x in tensors.items()}


def assert_parity(spec: Spec, backend: str, *, draws: int = 1) -> None:
    """Outputs and gradients of a backend keep the accuracy rule.

    A small tensor may owe its eager error to luck. ``draws`` calls, alike but for their random numbers, are then judged
    as one by their largest and mean errors.
    """
    similar = [spec._replace(seed=spec.seed + 2 * i) for i in range(draws)]
    oracles = [Oracle(make_call(one), make_upstream(one)) for one in similar]
    results = _pooled([run(backend, y.call, y.upstream) for y in oracles])
    exact, eager = _pooled([y.exact for y in oracles]), _pooled([y.eager for y in oracles])
    errors = compare_all(results, exact, eager, (spec.batch, spec.tokens, spec.channels))
    assert_passed(errors, f"{backend} on {spec}")


def assert_passed(errors: dict[str, Accuracy], what: str) -> None:
    broken = [f"{name}: {accuracy}" for name, accuracy in errors.items() if not accuracy.passed]
    assert not broken, "\n".join((what, *broken))


def _pooled(results: list[Call]) -> Call:
    return {name: torch.cat([result[name].flatten() for result in results]) for name in results[0]}


@st.composite
def specs(draw: st.DrawFn, dtypes: Sequence[torch.dtype]) -> Spec:
    """Any call of some size: the eager error of a handful of numbers is luck."""
    branch, rms = draw(st.booleans()), draw(st.booleans())
    return Spec(
        batch=draw(st.integers(1, 3)),
        tokens=draw(st.integers(6, 40)),
        channels=draw(st.one_of(st.sampled_from((8, 16, 64, 96)), st.integers(8, 140))),
        dtype=draw(st.sampled_from(dtypes)),
        layout=draw(st.sampled_from(LAYOUTS)),
        branch=branch,
        layer_scale=branch and draw(st.booleans()),
        drop_path=branch and draw(st.booleans()),
        bias=not rms and draw(st.booleans()),
        rms=rms,
        mean=draw(st.sampled_from((0.0, 0.0, -3.0))),
        eps=draw(st.sampled_from((1e-6, 1e-5, 0.1))),
        seed=draw(st.integers(0, 2**16)),
    )
