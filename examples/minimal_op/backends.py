"""Every way to compute the op, in the order of preference where nothing was measured.

``forward(x)`` gives the unit tokens. That of an opaque backend is no torch code: it runs behind the operators of
``op.py`` and has a ``backward(grad_unit, x, grad_x)`` beside it, which fills ``grad_x``. That of any other is
differentiated by autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitreg_kernels._triton import mode
from vitreg_kernels._triton.launch import Launch
from vitreg_kernels._triton.replay import run_launches
from vitreg_kernels.dispatch import Backend
from vitreg_kernels.ops._shared import requirements

from . import reference


def _composite(x: Tensor) -> Tensor:
    """torch's own vector_norm, which squares and adds in one pass. Of half precision the copy in fp32 comes first: the
    two parts of the gradient of x then meet in fp32, and are rounded once.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square()
    return (wide * (square + reference.EPS).rsqrt()).to(x.dtype).contiguous()


def _triton(x: Tensor) -> Tensor:
    unit = x.new_empty(x.shape)
    run_launches(_forward_launches, x, unit)
    return unit


def _triton_backward(grad_unit: Tensor, x: Tensor, grad_x: Tensor) -> None:
    run_launches(_backward_launches, grad_unit, x, grad_x)


def launches(x: Tensor) -> list[Launch]:
    """Every kernel of a forward and a backward, none of them run: to compile for a GPU that is not there."""
    return [*_forward_launches(x, x.new_empty(x.shape)), *_backward_launches(x, x, x.new_empty(x.shape))]


# Functions of this module, so that ``import minimal_op`` does not import triton.
def _forward_launches(x: Tensor, unit: Tensor) -> list[Launch]:
    from .kernels import forward_launch

    return [forward_launch(x, unit)]


def _backward_launches(grad_unit: Tensor, x: Tensor, grad_x: Tensor) -> list[Launch]:
    from .kernels import backward_launch

    return [backward_launch(grad_unit, x, grad_x)]


TRITON = Backend(
    name="triton",
    requirements=requirements.on_triton((), channels=(1, 4096)),
    forward=_triton,
    backward=_triton_backward,
    opaque=True,
    default=requirements.TRITON_DEFAULT,
    faults=mode.faults,
)
COMPOSITE = Backend(name="composite", requirements=requirements.anywhere(()), forward=_composite)
REFERENCE = Backend(name="reference", requirements=requirements.anywhere(()), forward=reference.unit_tokens)

BACKENDS = (TRITON, COMPOSITE, REFERENCE)
