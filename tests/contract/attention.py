"""register_attention and register_attention_qkv under the contract."""

from __future__ import annotations

from typing import Any

import cases
import torch
from cases import Spec
from hypothesis import strategies as st
from torch import Tensor

from contract.op import Call, Op, Tensors, mapped
from vitreg_kernels.dispatch import Backend, Requirements
from vitreg_kernels.functional import register_attention, register_attention_qkv
from vitreg_kernels.ops.attention.backends import BACKENDS

_KINDS = [
    Spec(rope="halves", mask="key_padding", seed=1),
    Spec(heads=1, outputs=()),
    Spec(heads=1, rope="pairs", rope_batch=True, prefix=0, outputs=("received_attention", "token_norms")),
    Spec(batch=1, heads=1, lengths=(9, 12)),
]


class Attention(Op):
    BACKENDS = tuple(backend for backend in BACKENDS if backend.name not in cases.TORCHS_KERNELS)
    KINDS = _KINDS
    TRACED = Spec(outputs=())
    INPUTS = ("query", "key", "value")
    TOKENS = ("query", "key", "value")
    OUTPUTS = ("output",)
    EXAMPLES = 50  # and as many packed

    def make_call(self, spec: Spec) -> Call:
        views = dict(zip(self.INPUTS, cases.views(cases.make_qkv(spec)), strict=True))
        return {**views, **cases.make_options(spec)}

    def outputs(self, backend: str | None, call: Call) -> Tensors:
        return _by_name(register_attention(**call, backend=backend))

    def resized(self, spec: Spec, batch: int, tokens: int) -> Spec:
        return spec._replace(batch=batch, tokens=tokens, heads=1)

    def specs(self, serves: Requirements) -> st.SearchStrategy[Spec]:
        return cases.specs(serves, degenerate=False)

    def terms(self, call: Call, name: str) -> int:
        tokens, head_dim = call["query"].shape[2:]
        return tokens + head_dim

    def scale_of(self, exact: Tensors, name: str) -> Tensor | None:
        """Gradients are made of one rounded dS = P * (dP - delta), so their errors scale with the largest."""
        gradients = [x for other, x in exact.items() if other.startswith("grad_")]
        return max(gradients, key=lambda x: x.abs().max()) if name.startswith("grad_") else None

    def traced(self, backend: Backend, spec: Spec) -> bool:
        return backend.opaque or not spec.lengths  # the others read cu_seqlens on the host

    def under_autocast(self, backend: str, call: Call, dtype: torch.dtype) -> Tensors:
        """Those of inputs cast by hand; the rotation stays as exact as it was."""
        return self.outputs(backend, call | mapped({name: call[name] for name in self.INPUTS}, lambda x: x.to(dtype)))


class PackedAttention(Attention):
    KINDS = (Spec(outputs=("lse",)), _KINDS[-1])  # what else a call may have does not hang on how it is packed
    INPUTS = ("qkv",)
    TOKENS = ("qkv",)
    TRACED_AS_ANOTHER = True

    def make_call(self, spec: Spec) -> Call:
        return {"qkv": cases.make_qkv(spec), **cases.make_options(spec)}

    def outputs(self, backend: str | None, call: Call) -> Tensors:
        call = dict(call)
        return _by_name(register_attention_qkv(call.pop("qkv"), **call, backend=backend))

    def terms(self, call: Call, name: str) -> int:
        return call["qkv"].shape[1] + call["qkv"].shape[4]


def _by_name(result: Any) -> Tensors:
    if isinstance(result, Tensor):
        return {"output": result}
    output, statistics = result
    return {"output": output, **{name: x for name, x in statistics._asdict().items() if x is not None}}
