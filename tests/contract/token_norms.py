"""token_norms and token_norm_stats under the contract."""

from __future__ import annotations

import token_norms_cases as cases
import torch
from hypothesis import strategies as st
from token_norms_cases import Spec

from contract.op import Call, Op, Tensors
from vitreg_kernels.dispatch import Requirements
from vitreg_kernels.functional import token_norm_stats, token_norms
from vitreg_kernels.ops.token_norms.backends import BACKENDS


class TokenNorms(Op):
    BACKENDS = BACKENDS
    KINDS = (Spec(),)
    TRACED = Spec()
    INPUTS = ("x",)
    TOKENS = ("x",)
    OUTPUTS = ()

    def make_call(self, spec: Spec) -> Call:
        return {"x": cases.make_call(spec)["x"]}

    def outputs(self, backend: str | None, call: Call) -> Tensors:
        return {"token_norms": token_norms(**call, backend=backend)}

    def resized(self, spec: Spec, batch: int, tokens: int) -> Spec:
        return spec._replace(batch=batch, tokens=tokens)

    def specs(self, serves: Requirements) -> st.SearchStrategy[Spec]:
        return cases.specs(serves.dtypes).map(lambda spec: spec._replace(norms=False))

    def terms(self, call: Call, name: str) -> int:
        return call["x"].shape[2]


class TokenNormStats(TokenNorms):
    """Of norms that have been taken: bins of norms that differ by a rounding may be others."""

    KINDS = tuple(dict.fromkeys(spec._replace(norms=True) for spec in cases.KINDS))
    TRACED = Spec(norms=True)
    EXAMPLES = 30  # of each many calls, whose counts agree to the last one
    OUTPUTS_SHARE_MEMORY = True  # one distribution, of which the groups' are views

    def make_call(self, spec: Spec) -> Call:
        return cases.make_call(spec)

    def outputs(self, backend: str | None, call: Call) -> Tensors:
        groups = token_norm_stats(**call, backend=backend)._asdict()
        return {f"{group}.{name}": x for group, its in groups.items() for name, x in its._asdict().items()}

    def specs(self, serves: Requirements) -> st.SearchStrategy[Spec]:
        return cases.specs(serves.dtypes).map(lambda spec: spec._replace(norms=True))

    def terms(self, call: Call, name: str) -> int:
        return call["x"].numel()

    def statistic_dtype(self, name: str) -> torch.dtype:
        dtypes = {"extremes": torch.float32, "sums": torch.float64}
        return dtypes.get(name.partition(".")[2], torch.int64)
