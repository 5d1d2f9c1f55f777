"""Kernels behind opaque ops, joined to autograd.

``assemble`` runs a backend that has a ``backward`` of its own. What autograd sees is one node whose forward and
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
from .types import AssembleInputs, Sizes, num_prefix, sizes_of


def assemble(inputs: AssembleInputs, backend: str) -> Tensor:
    """The op by a named backend; differentiable in all its tensors."""
    tensors = [t for t in inputs[:4] if t is not None]
    (tokens,) = (_assemble if needs_node(tensors) else _forward)(*inputs, backend)
    return tokens


def _forward_impl(*arguments: Any) -> Tensor:
    *call, backend = arguments
    return dispatch.find(backends.BACKENDS, backend).forward(AssembleInputs(*call))


def _backward_impl(grad_tokens: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *sizes, cls_token, register_tokens, pos_embed, backend = arguments
    sizes = Sizes(*sizes)
    gradients = schema.empty_gradients(grad_tokens, sizes, cls_token, register_tokens, pos_embed)
    dispatch.find(backends.BACKENDS, backend).backward(grad_tokens, sizes, gradients)
    return tuple(schema.without_elements(grad_tokens) if x is None else x for x in gradients)


_forward_op = op_or_implementation(torch.ops.vitreg.assemble_forward, _forward_impl)
_gradients = transformable(
    "AssembleTokensBackward",
    op_or_implementation(torch.ops.vitreg.assemble_backward, _backward_impl),
    transforms.BACKWARD,
)


def _forward(*arguments: Any) -> tuple[Tensor]:
    return (_forward_op(*arguments),)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    """No tensor: all that the gradients depend on is sizes."""
    *call, ctx.backend = inputs
    ctx.sizes = sizes_of(*call)
    ctx.parameter_dtypes = tuple(
        t.dtype if wanted else None for t, wanted in zip(call[1:4], ctx.needs_input_grad[1:4], strict=True)
    )


def _backward(ctx: Any, grad_tokens: Tensor) -> tuple[Tensor | None, ...]:
    of_patches, of_parameters = None, (None, None, None)
    if ctx.needs_input_grad[0]:
        # A view, as cat's own backward gives: autograd adds into no gradient whose memory another tensor holds, and
        # copies it where the patches are of another dtype.
        of_patches = grad_tokens[:, num_prefix(ctx.sizes) :]
    wanted = [dtype is not None for dtype in ctx.parameter_dtypes]
    if any(wanted):
        computed = _gradients(grad_tokens, *ctx.sizes, *ctx.parameter_dtypes, ctx.backend)
        of_parameters = (gradient if asked else None for gradient, asked in zip(computed, wanted, strict=True))
    return of_patches, *of_parameters, None, None


_assemble = differentiable("AssembleTokens", _forward, _save, _backward, transforms.FORWARD, tensors=4)

for _name, _impl in (("assemble_forward", _forward_impl), ("assemble_backward", _backward_impl)):
    schema.LIBRARY.impl(_name, _impl, "CompositeExplicitAutograd")
    flops.register(getattr(torch.ops.vitreg, _name), flops.no_products)
