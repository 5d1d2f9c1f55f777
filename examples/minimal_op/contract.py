"""How the tests of all ops (``tests/contract``) call this one: an op of the package has this file there."""

from __future__ import annotations

from typing import NamedTuple

import torch
from contract.op import Call, Op, Tensors
from hypothesis import strategies as st

from vitreg_kernels.dispatch import Requirements

from .api import unit_tokens
from .backends import BACKENDS


class Spec(NamedTuple):
    """One call, as plain numbers, which a failing test prints."""

    batch: int = 2
    tokens: int = 21
    channels: int = 48
    spread: float = 1.0
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def __str__(self) -> str:
        changed = (f"{name}={x}" for name, x in self._asdict().items() if x != self._field_defaults[name])
        return ",".join(changed) or "plain"


class UnitTokens(Op):
    BACKENDS = BACKENDS
    KINDS = (Spec(), Spec(spread=500.0))
    TRACED = Spec()
    INPUTS = ("x",)
    TOKENS = ("x",)
    OUTPUTS = ("unit",)
    NAMESPACE = "minimal_op"

    def make_call(self, spec: Spec) -> Call:
        generator = torch.Generator().manual_seed(spec.seed)
        x = spec.spread * torch.randn(spec.batch, spec.tokens, spec.channels, generator=generator)
        return {"x": x.to(spec.dtype)}

    def outputs(self, backend: str | None, call: Call) -> Tensors:
        return {"unit": unit_tokens(**call, backend=backend)}

    def resized(self, spec: Spec, batch: int, tokens: int) -> Spec:
        return spec._replace(batch=batch, tokens=tokens)

    def specs(self, serves: Requirements) -> st.SearchStrategy[Spec]:
        return st.builds(
            Spec,
            batch=st.integers(1, 3),
            tokens=st.integers(6, 40),
            channels=st.integers(8, 140),
            spread=st.sampled_from((1e-2, 1.0, 500.0)),
            dtype=st.sampled_from(serves.dtypes),
            seed=st.integers(0, 2**16),
        )

    def terms(self, call: Call, name: str) -> int:
        return call["x"].shape[2]
