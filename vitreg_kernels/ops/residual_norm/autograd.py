"""Kernels behind opaque ops, joined to autograd.

``normalize`` runs a backend that has a ``backward`` of its own. What autograd sees is one node whose forward and
backward are the torch.library ops of ``schema.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..._runtime import dispatch
from ..._runtime.autograd import forward_of, refuse_unseen_derivatives
from . import schema
from .backends import BACKENDS
from .types import NormGradInputs, NormInputs, ResidualNorm

# Inputs of the forward by position; the gradients come back in the same places.
_X, _BRANCH, _LAYER_SCALE, _WEIGHT, _BIAS = 0, 1, 2, 4, 5
_PLACES = {"x": _X, "branch": _BRANCH, "layer_scale": _LAYER_SCALE, "weight": _WEIGHT, "bias": _BIAS}
_NUM_INPUTS = 10


def normalize(inputs: NormInputs, backend: str) -> ResidualNorm:
    """The op by a named backend; differentiable in x, branch, layer_scale, weight and bias."""
    tensors = [t for t in (*inputs[: _BIAS + 1],) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        residual, normalized, token_norms, *_ = _ResidualNorm.apply(*inputs, backend)
    else:
        refuse_unseen_derivatives(tensors, backend, instead="composite")
        residual, normalized, token_norms, *_ = torch.ops.vitreg.residual_norm_forward(*inputs, backend)
    return ResidualNorm(inputs.x if inputs.branch is None else residual, normalized, token_norms)


class _ResidualNorm(torch.autograd.Function):
    forward = forward_of(torch.ops.vitreg.residual_norm_forward)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, branch, layer_scale, drop_path, weight, bias, _, rms, _, ctx.backend = inputs
        residual, _, *statistics = output
        mean, rstd = statistics[1:]
        # Without a branch the residual is x, which has a gradient of its own; the output here has no elements.
        ctx.has_branch = branch is not None
        ctx.mark_non_differentiable(*statistics, *([residual] if branch is None else []))
        ctx.set_materialize_grads(False)
        ctx.branch_dtype = x.dtype if branch is None else branch.dtype
        ctx.save_for_backward(
            x if branch is None else residual,
            None if rms else mean,
            rstd,
            branch if ctx.needs_input_grad[_LAYER_SCALE] else None,
            layer_scale,
            drop_path,
            weight,
            bias,
        )

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_residual: Tensor | None, grad_normalized: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        gradients: list[Tensor | None] = [None] * _NUM_INPUTS
        if not ctx.has_branch:
            grad_residual = None  # torch.compile gives zeros to what is not differentiable
        if grad_residual is None and grad_normalized is None:
            return tuple(gradients)
        residual, mean, rstd, branch, layer_scale, drop_path, weight, bias = ctx.saved_tensors
        wanted = [name for name, place in _PLACES.items() if ctx.needs_input_grad[place]]
        if grad_normalized is None:
            wanted = [name for name in wanted if name not in ("weight", "bias")]
        # A branch that is simply added has the gradient of x: written once, handed on twice.
        shared = layer_scale is None and drop_path is None and ctx.branch_dtype == residual.dtype
        if shared and "x" in wanted and "branch" in wanted:
            wanted.remove("branch")
        computed = torch.ops.vitreg.residual_norm_backward(
            grad_residual,
            grad_normalized,
            residual,
            mean,
            rstd,
            branch,
            layer_scale,
            drop_path,
            weight,
            bias,
            ctx.branch_dtype,
            wanted,
            ctx.backend,
        )
        for (name, place), gradient in zip(_PLACES.items(), computed, strict=True):
            gradients[place] = gradient if name in wanted else None
        if ctx.needs_input_grad[_BRANCH] and gradients[_BRANCH] is None:
            gradients[_BRANCH] = gradients[_X]
        return tuple(gradients)


def _forward_impl(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *call, backend = rest
    outputs = dispatch.find(BACKENDS, backend).forward(NormInputs(x, *call))
    return tuple(schema.without_elements(x) if t is None else t for t in outputs)


def _backward_impl(*arguments: Any) -> tuple[Tensor, ...]:
    *tensors, bias, branch_dtype, wanted, backend = arguments
    inputs = NormGradInputs(*tensors)
    gradients = schema.empty_gradients(inputs.residual, branch_dtype, inputs.layer_scale, inputs.weight, bias, wanted)
    dispatch.find(BACKENDS, backend).backward(inputs, gradients)
    return tuple(schema.without_elements(inputs.residual) if x is None else x for x in gradients)


for _name, _impl in (("residual_norm_forward", _forward_impl), ("residual_norm_backward", _backward_impl)):
    schema.LIBRARY.impl(_name, _impl, "CompositeExplicitAutograd")
