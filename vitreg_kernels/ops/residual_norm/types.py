"""What goes into a call and what comes out of it. Everything here is plain data.

Symbols used throughout the op: B batch, N tokens, C channels of a token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ResidualNorm(NamedTuple):
    """The result of ``residual_layer_norm``.

    Attributes:
        residual: ``[B, N, C]`` in x's dtype, the residual stream after the branch; x itself where there is no branch.
        normalized: ``[B, N, C]``, the residual's LayerNorm or RMSNorm, in x's dtype or autocast's.
        token_norms: ``[B, N]`` fp32 (fp64 for fp64), L2 norm of each token of the residual; carries no gradient.
    """

    residual: Tensor
    normalized: Tensor
    token_norms: Tensor


DROP_PATH_IS_CONSTANT = "drop_path carries no gradient; detach it, or multiply the branch by it before the call"


class NormInputs(NamedTuple):
    """A validated call. Every backend takes exactly this.

    Attributes:
        x: ``[B, N, C]``, any strides.
        branch: ``[B, N, C]``, any strides, or ``None``.
        layer_scale: ``[C]``, factor on the branch, or ``None``.
        drop_path: ``[B]``, factor on each sample's branch, or ``None``.
        weight: ``[C]``.
        bias: ``[C]`` or ``None``.
        eps: added to the variance.
        rms: RMSNorm instead of LayerNorm.
        dtype: of the normalized result.
    """

    x: Tensor
    branch: Tensor | None
    layer_scale: Tensor | None
    drop_path: Tensor | None
    weight: Tensor
    bias: Tensor | None
    eps: float
    rms: bool
    dtype: torch.dtype


class NormOutputs(NamedTuple):
    """What the forward of an opaque backend gives: the result, and what its backward needs besides.

    Attributes:
        residual: ``None`` without a branch.
        normalized, token_norms: as in ``ResidualNorm``.
        mean: ``[B, N]`` fp32, of each token of the residual; ``None`` for RMSNorm.
        rstd: ``[B, N]`` fp32, the factor that makes a token's variance (or mean square) 1.
    """

    residual: Tensor | None
    normalized: Tensor
    token_norms: Tensor
    mean: Tensor | None
    rstd: Tensor


class NormGradInputs(NamedTuple):
    """What the backward of an opaque backend takes.

    Attributes:
        grad_residual, grad_normalized: upstream gradients ``[B, N, C]``, any strides; ``None`` where none arrived,
            which is never true of both.
        residual: as the forward gave it, or x.
        mean, rstd: as the forward gave them.
        branch, layer_scale, drop_path, weight: of the call; no branch where no gradient needs it.
    """

    grad_residual: Tensor | None
    grad_normalized: Tensor | None
    residual: Tensor
    mean: Tensor | None
    rstd: Tensor
    branch: Tensor | None
    layer_scale: Tensor | None
    drop_path: Tensor | None
    weight: Tensor


class NormGradients(NamedTuple):
    """Gradients by input, contiguous, in the input's dtype; ``None`` for what nobody wants.

    Attributes:
        x, branch: ``[B, N, C]``.
        layer_scale, weight, bias: ``[C]``.
    """

    x: Tensor | None
    branch: Tensor | None
    layer_scale: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
