"""A backend of ``assemble_tokens`` that copies each part of the sequence to its place, with a backward of its own.

In the package it would be the file ``vitreg_kernels/ops/assemble/backends/copies.py``, and one entry of ``BACKENDS``
beside it. Whatever computes the tokens, a kernel or a library, stands where the copies are made here.
"""

from __future__ import annotations

from torch import Tensor

from vitreg_kernels.dispatch import Backend
from vitreg_kernels.ops._shared import requirements
from vitreg_kernels.ops.assemble import backends, features, schema
from vitreg_kernels.ops.assemble.types import AssembleGradients, AssembleInputs, Sizes, num_prefix, sizes_of


def forward(inputs: AssembleInputs) -> Tensor:
    """The tokens, ``[B, N, C]``."""
    sizes = sizes_of(*inputs)
    tokens = schema.empty_tokens(inputs)
    before, prefix = sizes.cls_tokens, num_prefix(sizes)
    tokens[:, prefix:] = inputs.patches
    if inputs.cls_token is not None:
        tokens[:, :before] = inputs.cls_token
    if inputs.register_tokens is not None:
        tokens[:, before:prefix] = inputs.register_tokens
    if inputs.pos_embed is not None:
        tokens[:, : sizes.prefix_rows] += inputs.pos_embed[:, : sizes.prefix_rows]
        tokens[:, prefix:] += inputs.pos_embed[:, sizes.prefix_rows :]
    return tokens


def backward(grad_tokens: Tensor, sizes: Sizes, gradients: AssembleGradients) -> None:
    """Fill the gradients of the parameters that are not ``None``: sums over the batch, which torch makes in fp32."""
    before, prefix = sizes.cls_tokens, num_prefix(sizes)
    summed = grad_tokens.sum(0, keepdim=True)
    if gradients.cls_token is not None:
        gradients.cls_token.copy_(summed[:, :before])
    if gradients.register_tokens is not None:
        gradients.register_tokens.copy_(summed[:, before:prefix])
    if gradients.pos_embed is not None:
        gradients.pos_embed[:, : sizes.prefix_rows] = summed[:, : sizes.prefix_rows]
        gradients.pos_embed[:, sizes.prefix_rows :] = summed[:, prefix:]


# Opaque, as every kernel is: torch sees the op's operators and not what happens in them, so the backend brings its
# backward. This one could leave out the last two lines, since autograd would differentiate the copies as well.
BACKEND = Backend(
    name="copies",
    requirements=requirements.anywhere(features.ALL),
    forward=forward,
    backward=backward,
    opaque=True,
)


def register() -> None:
    """Add it to this process, behind all others: a call gets it that names it, ``backend="copies"``.

    There is no plug-in interface: the op's tuple is replaced by a longer one, and everything reads the tuple anew.
    """
    if BACKEND not in backends.BACKENDS:
        backends.BACKENDS = (*backends.BACKENDS, BACKEND)
