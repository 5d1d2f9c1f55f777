"""What torch sees of a kernel: two operators with schemas and fakes, joined to autograd and function transforms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vitreg_kernels import dispatch
from vitreg_kernels.ops._shared import flops
from vitreg_kernels.ops._shared.autograd import differentiable, needs_node, op_or_implementation
from vitreg_kernels.ops._shared.transforms import Dims, Mapped, Rules, joined, parted, transformable, vjp

from . import reference
from .backends import BACKENDS

# The operators. The backend is a string, chosen before tracing, so torch.compile keeps it in its graph.
LIBRARY = torch.library.Library("minimal_op", "FRAGMENT")
LIBRARY.define("unit_tokens(Tensor x, str backend) -> Tensor")
LIBRARY.define("unit_tokens_backward(Tensor grad_unit, Tensor x, str backend) -> Tensor")


def _forward_kernel(x: Tensor, backend: str) -> Tensor:
    return dispatch.find(BACKENDS, backend).forward(x)


def _backward_kernel(grad_unit: Tensor, x: Tensor, backend: str) -> Tensor:
    grad_x = x.new_empty(x.shape)
    dispatch.find(BACKENDS, backend).backward(grad_unit, x, grad_x)
    return grad_x


@torch.library.register_fake("minimal_op::unit_tokens", lib=LIBRARY)
def _(x: Tensor, backend: str) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("minimal_op::unit_tokens_backward", lib=LIBRARY)
def _(grad_unit: Tensor, x: Tensor, backend: str) -> Tensor:
    return x.new_empty(x.shape)


for _name, _kernel in (("unit_tokens", _forward_kernel), ("unit_tokens_backward", _backward_kernel)):
    LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    flops.register(getattr(torch.ops.minimal_op, _name), flops.no_products)


# What vmap, forward mode and second derivatives need: a formula of each kernel, and how many calls become one.
def _forward_formula(x: Tensor, backend: str) -> tuple[Tensor]:
    return (reference.unit_tokens(x),)


def _backward_formula(grad_unit: Tensor, x: Tensor, backend: str) -> tuple[Tensor, ...]:
    _, pull_back = vjp(lambda x: (reference.unit_tokens(x),), [x])
    return pull_back(grad_unit)


def _fold(size: int, in_dims: Dims, arguments: tuple, kernel: Callable[..., tuple[Tensor, ...]]) -> Mapped:
    """The mapped dimension joins the batch."""
    *tensors, backend = arguments
    (found,) = kernel(*(joined(x, dim, size) for x, dim in zip(tensors, in_dims, strict=False)), backend)
    return (parted(found, size),), (0,)


# Autograd: one node, whose forward and backward are the operators.
_forward_op = op_or_implementation(torch.ops.minimal_op.unit_tokens, _forward_kernel)
_backward_op = op_or_implementation(torch.ops.minimal_op.unit_tokens_backward, _backward_kernel)
_gradient = transformable(
    "UnitTokensBackward", lambda *call: (_backward_op(*call),), Rules(_backward_formula, _fold, derivable=(0, 1))
)


def _forward(x: Tensor, backend: str) -> tuple[Tensor]:
    return (_forward_op(x, backend),)


def _save(ctx: Any, arguments: tuple[Tensor, str], output: tuple[Tensor]) -> None:
    x, ctx.backend = arguments
    ctx.save_for_backward(x)


def _backward(ctx: Any, grad_unit: Tensor) -> tuple[Tensor, None]:
    (x,) = ctx.saved_tensors
    (grad_x,) = _gradient(grad_unit, x, ctx.backend)
    return grad_x, None


_node = differentiable("UnitTokens", _forward, _save, _backward, Rules(_forward_formula, _fold, (0,)), tensors=1)


def unit_tokens(x: Tensor, backend: str) -> Tensor:
    """The op by a named backend; differentiable."""
    (unit,) = (_node if needs_node([x]) else _forward)(x, backend)
    return unit
