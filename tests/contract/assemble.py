"""assemble_tokens under the contract."""

from __future__ import annotations

import assemble_cases as cases
from assemble_cases import Spec
from hypothesis import strategies as st

from contract.op import Call, Op, Tensors
from vitreg_kernels.dispatch import Requirements
from vitreg_kernels.functional import assemble_tokens
from vitreg_kernels.ops.assemble.backends import BACKENDS


class Assemble(Op):
    BACKENDS = BACKENDS
    KINDS = cases.KINDS
    TRACED = Spec(position=None)
    INPUTS = cases.DIFFERENTIABLE
    TOKENS = ("patches",)
    OUTPUTS = ("tokens",)

    def make_call(self, spec: Spec) -> Call:
        return cases.make_call(spec)

    def outputs(self, backend: str | None, call: Call) -> Tensors:
        return {"tokens": assemble_tokens(**call, backend=backend)}

    def resized(self, spec: Spec, batch: int, tokens: int) -> Spec:
        return spec._replace(batch=batch, patches=tokens)

    def specs(self, serves: Requirements) -> st.SearchStrategy[Spec]:
        return cases.specs(serves.dtypes)

    def terms(self, call: Call, name: str) -> int:
        return call["patches"].shape[0] if name in ("grad_cls_token", "grad_register_tokens", "grad_pos_embed") else 1
