"""The op's schemas and fakes (shapes, dtypes and strides without data). Imports torch only.

Both ops are opaque to torch.compile and take detached inputs; ``autograd.py`` joins them. Arity is fixed: a gradient
that nobody wants is a tensor without elements. The backend is a string, chosen before tracing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .types import AssembleGradients, AssembleInputs, Sizes, num_tokens, sizes_of

LIBRARY = torch.library.Library("vitreg", "FRAGMENT")

LIBRARY.define(
    "assemble_forward(Tensor patches, Tensor? cls_token, Tensor? register_tokens, Tensor? pos_embed, "
    "ScalarType dtype, str backend) -> Tensor"
)
# The gradient of the patches is part of the upstream one and needs no kernel; that of a parameter, none of its values:
# it is told its dtype, or None where nobody wants it. Sizes as in types.Sizes.
LIBRARY.define(
    "assemble_backward(Tensor grad_tokens, SymInt num_cls_tokens, SymInt num_registers, SymInt num_patches, "
    "SymInt? prefix_rows, ScalarType? cls_token, ScalarType? register_tokens, ScalarType? pos_embed, str backend) -> "
    "(Tensor grad_cls_token, Tensor grad_register_tokens, Tensor grad_pos_embed)"
)


def empty_tokens(inputs: AssembleInputs) -> Tensor:
    """The uninitialised result."""
    batch, _, channels = inputs.patches.shape
    return inputs.patches.new_empty((batch, num_tokens(sizes_of(*inputs)), channels), dtype=inputs.dtype)


def empty_gradients(
    grad_tokens: Tensor,
    sizes: Sizes,
    cls_token: torch.dtype | None,
    register_tokens: torch.dtype | None,
    pos_embed: torch.dtype | None,
) -> AssembleGradients:
    """Uninitialised gradients of the dtypes given; ``None`` for those without."""

    def empty(rows: int, dtype: torch.dtype) -> Tensor:
        return grad_tokens.new_empty((1, rows, grad_tokens.shape[2]), dtype=dtype)

    return AssembleGradients(
        None if cls_token is None else empty(sizes.cls_tokens, cls_token),
        None if register_tokens is None else empty(sizes.registers, register_tokens),
        None if pos_embed is None else empty(sizes.prefix_rows + sizes.patches, pos_embed),
    )


def without_elements(x: Tensor) -> Tensor:
    """What stands in an output for nothing."""
    return x.new_empty(0)


@torch.library.register_fake("vitreg::assemble_forward", lib=LIBRARY)
def _(patches, cls_token, register_tokens, pos_embed, dtype, backend):  # noqa: ANN001, ANN202
    return empty_tokens(AssembleInputs(patches, cls_token, register_tokens, pos_embed, dtype))


@torch.library.register_fake("vitreg::assemble_backward", lib=LIBRARY)
def _(  # noqa: ANN202
    grad_tokens, num_cls_tokens, num_registers, num_patches, prefix_rows, cls_token, register_tokens, pos_embed,  # noqa: ANN001
    backend,  # noqa: ANN001
):  # fmt: skip
    sizes = Sizes(num_cls_tokens, num_registers, num_patches, prefix_rows)
    gradients = empty_gradients(grad_tokens, sizes, cls_token, register_tokens, pos_embed)
    return tuple(without_elements(grad_tokens) if x is None else x for x in gradients)
