"""What runs behind the ops of ``schema.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._runtime import dispatch
from ...layout import TokenLayout
from . import schema
from .backends import BACKENDS
from .types import NormDistribution


def _token_norms_impl(x: Tensor, backend: str) -> Tensor:
    return dispatch.find(BACKENDS, backend).forward(x)


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
    dispatch.find(BACKENDS, backend).accumulate(norms, layout, into)


for _name, _impl in (("token_norms", _token_norms_impl), ("accumulate_token_norms", _accumulate_impl)):
    schema.LIBRARY.impl(_name, _impl, "CompositeExplicitAutograd")
