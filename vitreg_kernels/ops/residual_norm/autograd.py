"""Kernels behind opaque ops, joined to autograd.

``normalize`` runs a backend that has a ``backward`` of its own. What autograd sees is one node whose forward and
backward are the torch.library ops of ``schema.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import dispatch
from .._shared import flops
from .._shared.autograd import differentiable, needs_node, op_or_implementation
from .._shared.transforms import transformable
from . import backends, schema, transforms
from .types import NormGradInputs, NormInputs, ResidualNorm

# Inputs of the forward by position; the gradients come back in the same places.
_PLACES = {name: NormInputs._fields.index(name) for name in ("x", "branch", "layer_scale", "weight", "bias")}
_X, _BRANCH, _LAYER_SCALE = _PLACES["x"], _PLACES["branch"], _PLACES["layer_scale"]
_NUM_INPUTS = len(NormInputs._fields) + 1  # and the backend


def normalize(inputs: NormInputs, backend: str) -> ResidualNorm:
    """The op by a named backend; differentiable in x, branch, layer_scale, weight and bias."""
    tensors = [t for t in inputs if isinstance(t, Tensor)]
    if needs_node(tensors):
        residual, normalized, token_norms, *_ = _residual_norm(*inputs, backend)
    else:
        residual, normalized, token_norms, *_ = _forward(*inputs, backend)
    return ResidualNorm(inputs.x if inputs.branch is None else residual, normalized, token_norms)


def _forward_impl(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *call, backend = rest
    outputs = dispatch.find(backends.BACKENDS, backend).forward(NormInputs(x, *call))
    return tuple(schema.without_elements(x) if t is None else t for t in outputs)


def _backward_impl(*arguments: Any) -> tuple[Tensor, ...]:
    *tensors, bias, branch_dtype, wanted, backend = arguments
    inputs = NormGradInputs(*tensors)
    gradients = schema.empty_gradients(inputs.residual, branch_dtype, inputs.layer_scale, inputs.weight, bias, wanted)
    dispatch.find(backends.BACKENDS, backend).backward(inputs, gradients)
    return tuple(schema.without_elements(inputs.residual) if x is None else x for x in gradients)


_forward = op_or_implementation(torch.ops.vitreg.residual_norm_forward, _forward_impl)
_gradients = transformable(
    "ResidualNormBackward",
    op_or_implementation(torch.ops.vitreg.residual_norm_backward, _backward_impl),
    transforms.BACKWARD,
)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
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


def _backward(
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
    computed = _gradients(
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
        " ".join(wanted),
        ctx.backend,
    )
    for (name, place), gradient in zip(_PLACES.items(), computed, strict=True):
        gradients[place] = gradient if name in wanted else None
    if ctx.needs_input_grad[_BRANCH] and gradients[_BRANCH] is None:
        gradients[_BRANCH] = gradients[_X]
    return tuple(gradients)


_residual_norm = differentiable(
    "ResidualNorm", _forward, _save, _backward, transforms.FORWARD, tensors=_PLACES["bias"] + 1
)

for _name, _impl in (("residual_norm_forward", _forward_impl), ("residual_norm_backward", _backward_impl)):
    schema.LIBRARY.impl(_name, _impl, "CompositeExplicitAutograd")
    flops.register(getattr(torch.ops.vitreg, _name), flops.no_products)
