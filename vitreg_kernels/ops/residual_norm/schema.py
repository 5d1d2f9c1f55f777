"""The op's schemas and fakes (shapes, dtypes and strides without data). Imports torch only.

Both ops are opaque to torch.compile and take detached inputs; ``autograd.py`` joins them. Arity is fixed: what a call
does not have or want is a tensor without elements. The backend is a string, chosen before tracing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .types import NormGradients

LIBRARY = torch.library.Library("vitreg", "FRAGMENT")

LIBRARY.define(
    "residual_norm_forward(Tensor x, Tensor? branch, Tensor? layer_scale, Tensor? drop_path, Tensor weight, "
    "Tensor? bias, float eps, bool rms, ScalarType dtype, str backend) -> "
    "(Tensor residual, Tensor normalized, Tensor token_norms, Tensor mean, Tensor rstd)"
)
# Parameters come with their dtypes; the branch, which is not kept unless its values are needed, leaves its dtype only.
LIBRARY.define(
    "residual_norm_backward(Tensor? grad_residual, Tensor? grad_normalized, Tensor residual, Tensor? mean, "
    "Tensor rstd, Tensor? branch, Tensor? layer_scale, Tensor? drop_path, Tensor weight, Tensor? bias, "
    "ScalarType branch_dtype, str wanted, str backend) -> "
    "(Tensor grad_x, Tensor grad_branch, Tensor grad_layer_scale, Tensor grad_weight, Tensor grad_bias)"
)


def empty_gradients(
    residual: Tensor,
    branch_dtype: torch.dtype,
    layer_scale: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    wanted: str,
) -> NormGradients:
    """Uninitialised gradients; ``None`` for those not named in ``wanted``."""
    names = wanted.split()

    def like(x: Tensor) -> Tensor:
        return x.new_empty(x.shape)

    return NormGradients(
        like(residual) if "x" in names else None,
        residual.new_empty(residual.shape, dtype=branch_dtype) if "branch" in names else None,
        like(layer_scale) if "layer_scale" in names else None,
        like(weight) if "weight" in names else None,
        like(bias) if "bias" in names else None,
    )


def without_elements(x: Tensor) -> Tensor:
    """What stands in an output for nothing."""
    return x.new_empty(0)


@torch.library.register_fake("vitreg::residual_norm_forward", lib=LIBRARY)
def _(x, branch, layer_scale, drop_path, weight, bias, eps, rms, dtype, backend):  # noqa: ANN001, ANN202
    def statistic() -> Tensor:
        return x.new_empty(x.shape[:2], dtype=torch.float32)

    return (
        without_elements(x) if branch is None else x.new_empty(x.shape),
        x.new_empty(x.shape, dtype=dtype),
        statistic(),
        without_elements(x) if rms else statistic(),
        statistic(),
    )


@torch.library.register_fake("vitreg::residual_norm_backward", lib=LIBRARY)
def _(  # noqa: ANN202
    grad_residual, grad_normalized, residual, mean, rstd, branch, layer_scale, drop_path, weight, bias,  # noqa: ANN001
    branch_dtype, wanted, backend,  # noqa: ANN001
):  # fmt: skip
    gradients = empty_gradients(residual, branch_dtype, layer_scale, weight, bias, wanted)
    return tuple(without_elements(residual) if x is None else x for x in gradients)
