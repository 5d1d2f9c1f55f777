"""The public function: validate, ask autocast, select a backend, run it."""

from __future__ import annotations

from torch import Tensor

from ... import dispatch
from . import autograd, backends, features
from .types import ResidualNorm
from .validation import validated


def residual_layer_norm(
    x: Tensor,
    branch: Tensor | None = None,
    *,
    layer_scale: Tensor | None = None,
    drop_path: Tensor | None = None,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    rms: bool = False,
    backend: str | None = None,
) -> ResidualNorm:
    """What stands between two branches of a pre-norm block: add, normalize, and measure each token.

    ``residual = x + drop_path * layer_scale * branch``, its LayerNorm (Ba et al., arXiv 1607.06450) or RMSNorm (Zhang
    and Sennrich, arXiv 1910.07467) over the channels, and the L2 norm of each of its tokens. Statistics are fp32 and of
    the residual as it is returned, rounded to its dtype. Differentiable in everything but ``drop_path``; the token
    norms carry no gradient. A token that is NaN or infinite spoils no other token.

    x may be in another dtype than the branch and the parameters, but fp64 goes with fp64 only. Autocast leaves the
    residual in x's dtype; the normalized tokens, which a matrix product reads next, come in autocast's.

    Args:
        x: ``[B, N, C]``, the residual stream; fp32, fp16, bf16 or fp64, any strides. Rows of C numbers side by side are
            read in place by every backend; others may be copied.
        branch: ``[B, N, C]``, what attention or the MLP gave, likewise.
        layer_scale: ``[C]``, LayerScale's factor on the branch.
        drop_path: ``[B]``, stochastic depth's factor on each sample's branch: 0 where it is dropped, 1 / (1 - p) where
            it is kept.
        weight, bias: ``[C]``, scale and shift of the normalized tokens; RMSNorm has no bias.
        eps: added to the variance (the mean square for RMSNorm).
        rms: RMSNorm instead of LayerNorm.
        backend: a backend's name, which then runs or raises; ``None`` takes the default for such a call.

    Returns:
        ``ResidualNorm(residual, normalized, token_norms)``, contiguous; without a branch the residual is x itself.

    Raises:
        TypeError, ValueError: for arguments that do not fit together; nothing has run then.
        UnsupportedError: if the named backend, or every backend, cannot serve the call.
    """
    inputs = validated(
        x, branch, layer_scale=layer_scale, drop_path=drop_path, weight=weight, bias=bias, eps=eps, rms=rms
    )
    chosen = dispatch.select(backends.BACKENDS, features.request_of(inputs), backend)
    return autograd.normalize(inputs, chosen.name) if chosen.opaque else chosen.forward(inputs)
