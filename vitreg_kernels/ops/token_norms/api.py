"""The public functions: validate, select a backend, run it."""

from __future__ import annotations

from torch import Tensor

from ... import dispatch
from ...layout import TokenLayout
from . import backends, features, registration
from .types import GROUPS, NormDistribution, TokenNormStats
from .validation import check_into, check_layout, validated_norms, validated_tokens


def token_norms(x: Tensor, *, backend: str | None = None) -> Tensor:
    """The L2 norm of each token: ten times the others' for the artifacts of Darcet et al. (arXiv 2309.16588).

    Accumulated in fp32, under autocast too. Carries no gradient. A token that is NaN or infinite spoils no other.

    Args:
        x: ``[B, N, C]``; fp32, fp16, bf16 or fp64, any strides. Rows of C numbers side by side are read in place by
            every backend; others may be copied.
        backend: a backend's name, which then runs or raises; ``None`` takes the default for such a call.

    Returns:
        ``[B, N]`` fp32 (fp64 for fp64).

    Raises:
        TypeError, ValueError: for arguments that do not fit together; nothing has run then.
        UnsupportedError: if the named backend, or every backend, cannot serve the call.
    """
    x = validated_tokens(x)
    chosen = dispatch.select(backends.BACKENDS, features.norms_request(x), backend)
    return registration.token_norms(x, chosen.name) if chosen.opaque else chosen.forward(x)


def token_norm_stats(x: Tensor, layout: TokenLayout, *, backend: str | None = None) -> TokenNormStats:
    """How the norms of the tokens are distributed among CLS tokens, registers and patches, each apart.

    Counted on the device, in fp32, without waiting for it; the same counts by every backend for the same norms. NaN and
    infinite norms are counted apart and spoil nothing.

    Args:
        x: tokens ``[B, N, C]``, or their norms ``[B, N]`` where they have been taken already, as
            ``residual_layer_norm`` gives them; fp32, fp16, bf16 or fp64, any strides.
        layout: which tokens are which.
        backend: a backend's name, which then runs or raises; ``None`` takes the default for such a call.

    Raises:
        TypeError, ValueError: for arguments that do not fit together; nothing has run then.
        UnsupportedError: if the named backend, or every backend, cannot serve the call.
    """
    if isinstance(x, Tensor) and x.ndim == 2:
        norms = validated_norms(x, layout)
    else:
        check_layout(validated_tokens(x), layout)
        norms = token_norms(x, backend=backend)
    counted = NormDistribution.zeros_for((len(GROUPS),), norms)
    accumulate(norms, layout, counted, backend=backend)
    return TokenNormStats.of_stacked(counted)


def accumulate(
    norms: Tensor,
    layout: TokenLayout,
    into: NormDistribution,
    *,
    skip_in_backward: bool = False,
    backend: str | None = None,
) -> None:
    """Count norms into the distributions of their groups, in place: ``token_norm_stats`` batch after batch.

    Args:
        norms: ``[B, N]``; fp32, fp16, bf16 or fp64, any strides.
        layout: which tokens are which.
        into: of leading shape ``[3]`` for CLS, registers and patches, on the norms' device, any strides: views of
            ``[L, 3, ...]`` tensors for a model of L layers.
        skip_in_backward: do nothing where this runs as part of a backward pass, where activation checkpointing runs a
            forward again whose tokens have been counted.
        backend: a backend's name, which then runs or raises; ``None`` takes the default for such a call.

    Raises:
        TypeError, ValueError: for arguments that do not fit together; nothing has been counted then.
        UnsupportedError: if the named backend, or every backend, cannot serve the call.
    """
    norms = validated_norms(norms, layout)
    check_into(into, norms)
    chosen = dispatch.select(backends.BACKENDS, features.statistics_request(norms), backend)
    registration.accumulate(norms, layout.num_cls_tokens, layout.num_registers, *into, skip_in_backward, chosen.name)
