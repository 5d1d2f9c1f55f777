"""Calls of assemble_tokens to test with, and the oracle they are held against. Shared by all its suites.

A call is drawn as plain numbers (a ``Spec``), which is what a failing test prints, and made into tensors from its seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from residual_norm_cases import LAYOUTS, _laid_out, in_double
from torch import Tensor

from vitreg_kernels.dispatch import Request
from vitreg_kernels.functional import assemble_tokens
from vitreg_kernels.measure.accuracy import Accuracy, compare
from vitreg_kernels.measure.cases.assemble import terms
from vitreg_kernels.ops.assemble.backends import BACKENDS

USABLE = [b for b in BACKENDS if not b.reasons_against(Request("assemble", "cpu", 0, torch.float32))]

DIFFERENTIABLE = ("patches", "cls_token", "register_tokens", "pos_embed")
OUTPUTS = ("tokens",)
POSITIONS = (None, "patches", "cls", "prefix")

Call = dict[str, Any]


class Spec(NamedTuple):
    """One call.

    Attributes:
        batch, patches, channels: of the patches.
        cls_tokens, registers: how many there are; with none, the call has no such argument.
        position: which tokens have a row of the position embedding besides the patches: none, the CLS tokens, or all;
            ``None`` for a call without one.
        dtype: of all tensors.
        layout: how the patches lie in memory, see ``residual_norm_cases``.
        seed: of the numbers.
    """

    batch: int = 2
    patches: int = 9
    channels: int = 48
    cls_tokens: int = 1
    registers: int = 4
    position: str | None = "prefix"
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    seed: int = 0

    def __str__(self) -> str:
        changed = (f"{name}={x}" for name, x in self._asdict().items() if x != self._field_defaults[name])
        return ",".join(changed) or "full"

    @property
    def prefix(self) -> int:
        return self.cls_tokens + self.registers

    @property
    def prefix_rows(self) -> int:
        return {None: 0, "patches": 0, "cls": self.cls_tokens, "prefix": self.prefix}[self.position]


# A call of every kind once.
KINDS = [
    Spec(),
    Spec(position="cls"),
    Spec(position="patches"),
    Spec(position=None),
    Spec(registers=0),
    Spec(cls_tokens=0),
    Spec(cls_tokens=0, registers=0),
    Spec(cls_tokens=2, position="cls"),
    Spec(cls_tokens=0, registers=0, position=None),
]


def make_call(spec: Spec) -> Call:
    """The arguments of ``assemble_tokens``, all but the backend."""
    generator = torch.Generator().manual_seed(spec.seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(spec.dtype)

    call = {"patches": _laid_out(randn(spec.batch, spec.patches, spec.channels), spec.layout)}
    if spec.cls_tokens:
        call["cls_token"] = randn(1, spec.cls_tokens, spec.channels)
    if spec.registers:
        call["register_tokens"] = randn(1, spec.registers, spec.channels)
    if spec.position is not None:
        call["pos_embed"] = randn(1, spec.prefix_rows + spec.patches, spec.channels)
    return call


def make_upstream(spec: Spec) -> dict[str, Tensor]:
    """The gradient of the tokens."""
    generator = torch.Generator().manual_seed(spec.seed + 1)
    shape = (spec.batch, spec.prefix + spec.patches, spec.channels)
    return {"tokens": torch.randn(shape, generator=generator).to(spec.dtype)}


def run(backend: str, call: Call, upstream: dict[str, Tensor], wanted: Sequence[str] = DIFFERENTIABLE) -> Call:
    """The tokens and gradients by name."""
    leaves = {name: call[name].detach().requires_grad_() for name in wanted if call.get(name) is not None}
    tokens = assemble_tokens(**{**call, **leaves}, backend=backend)
    gradients = torch.autograd.grad(tokens, list(leaves.values()), upstream["tokens"])
    return {"tokens": tokens.detach()} | {f"grad_{name}": g for name, g in zip(leaves, gradients, strict=True)}


class Oracle:
    """What a call ought to give, and how near each tensor has to come."""

    def __init__(self, call: Call, upstream: dict[str, Tensor]) -> None:
        self.call, self.upstream = call, upstream
        self.eager = run("reference", call, upstream)
        self.exact = run("reference", in_double(call), in_double(upstream))

    def compare(self, tensors: Call) -> dict[str, Accuracy]:
        return compare_all(tensors, self.exact, self.eager, self.call["patches"].shape[0])


def compare_all(tensors: Call, exact: Call, eager: Call, batch: int) -> dict[str, Accuracy]:
    assert tensors.keys() == exact.keys()
    return {name: compare(x, exact[name], eager[name], terms=terms(batch, name)) for name, x in tensors.items()}


@st.composite
def specs(draw: st.DrawFn, dtypes: Sequence[torch.dtype]) -> Spec:
    """Any call of some size: the eager error of a handful of numbers is luck."""
    return Spec(
        batch=draw(st.integers(1, 4)),
        patches=draw(st.integers(6, 40)),
        channels=draw(st.one_of(st.sampled_from((8, 16, 64, 96)), st.integers(8, 140))),
        cls_tokens=draw(st.sampled_from((0, 1, 1, 2))),
        registers=draw(st.sampled_from((0, 1, 4, 4, 16, 35))),
        position=draw(st.sampled_from(POSITIONS)),
        dtype=draw(st.sampled_from(dtypes)),
        layout=draw(st.sampled_from(LAYOUTS)),
        seed=draw(st.integers(0, 2**16)),
    )
