"""residual_layer_norm under the contract."""

from __future__ import annotations

import residual_norm_cases as cases
import torch
from hypothesis import strategies as st
from residual_norm_cases import Spec

from contract.op import Call, Op, Tensors
from vitreg_kernels.dispatch import Requirements
from vitreg_kernels.functional import residual_layer_norm
from vitreg_kernels.ops.residual_norm.backends import BACKENDS


class ResidualNorm(Op):
    BACKENDS = BACKENDS
    KINDS = cases.KINDS
    TRACED = Spec(drop_path=False)
    INPUTS = cases.DIFFERENTIABLE
    TOKENS = ("x", "branch")
    OUTPUTS = ("residual", "normalized")

    def make_call(self, spec: Spec) -> Call:
        return cases.make_call(spec)

    def outputs(self, backend: str | None, call: Call) -> Tensors:
        return residual_layer_norm(**call, backend=backend)._asdict()

    def resized(self, spec: Spec, batch: int, tokens: int) -> Spec:
        return spec._replace(batch=batch, tokens=tokens)

    def specs(self, serves: Requirements) -> st.SearchStrategy[Spec]:
        return cases.specs(serves.dtypes)

    def terms(self, call: Call, name: str) -> int:
        batch, tokens, channels = call["x"].shape
        return channels + (batch * tokens if name in ("grad_layer_scale", "grad_weight", "grad_bias") else 0)

    def under_autocast(self, backend: str, call: Call, dtype: torch.dtype) -> Tensors:
        """An fp32 residual stream stays fp32; what the next product reads is what it would have cast."""
        outputs = self.outputs(backend, call)
        return outputs | {"normalized": outputs["normalized"].to(dtype)}

    def aliases(self, call: Call) -> set[str]:
        return set() if "branch" in call else {"residual"}
