"""What runs behind the ops of ``schema.py``, and how they are called."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import dispatch
from ...layout import TokenLayout
from .._shared import flops, levels
from .._shared.autograd import op_or_implementation
from .._shared.transforms import transformable
from . import backends, schema, transforms
from .types import NormDistribution


def _token_norms_impl(x: Tensor, backend: str) -> Tensor:
    return dispatch.find(backends.BACKENDS, backend).forward(x)


def _accumulate_impl(
    norms: Tensor,
    num_cls_tokens: int,
    num_registers: int,
    histogram: Tensor,
    sums: Tensor,
    extremes: Tensor,
    nonfinite: Tensor,
    skip_in_backward: bool,
    backend: str,
) -> None:
    # Asked now and not in the public function, which torch.compile runs once for all calls.
    in_backward = torch._C._current_graph_task_id() != -1
    if norms.numel() == 0 or (skip_in_backward and in_backward):
        return
    layout = TokenLayout(num_cls_tokens=num_cls_tokens, num_registers=num_registers)
    into = NormDistribution(histogram, sums, extremes, nonfinite)
    dispatch.find(backends.BACKENDS, backend).accumulate(norms, layout, into)


_token_norms_op = op_or_implementation(torch.ops.vitreg.token_norms, _token_norms_impl)
_token_norms = transformable("TokenNorms", lambda *arguments: (_token_norms_op(*arguments),), transforms.FORWARD)
accumulate = op_or_implementation(torch.ops.vitreg.accumulate_token_norms, _accumulate_impl)


def token_norms(x: Tensor, backend: str) -> Tensor:
    """``[B, N]`` of ``[B, N, C]``, by a named backend."""
    return _token_norms(x, backend)[0] if levels.are_active() else _token_norms_op(x, backend)


for _name, _impl in (("token_norms", _token_norms_impl), ("accumulate_token_norms", _accumulate_impl)):
    schema.LIBRARY.impl(_name, _impl, "CompositeExplicitAutograd")
    flops.register(getattr(torch.ops.vitreg, _name), flops.no_products)
