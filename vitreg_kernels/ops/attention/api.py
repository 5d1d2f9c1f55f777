"""The public functions: validate, cast as autocast asks, select a backend, run it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, TypedDict, overload

import torch
from torch import Tensor

from ... import dispatch
from ...dispatch import Backend
from ...errors import UnsupportedError
from .._shared.arguments import described, refuse_nested
from .._shared.distributed import is_distributed
from . import autograd, backends, features, sharding
from .types import AttentionInputs, AttentionOutputs, Rope, unpack_qkv
from .validation import autocast, validated

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _Rest(TypedDict, total=False):
    """What the overloads below have in common; the functions themselves have the defaults."""

    num_prefix_tokens: int
    attn_mask: Tensor | None
    dropout_p: float
    scale: float | None
    rope: Rope | None
    cu_seqlens: Tensor | None
    max_seqlen: int | None
    backend: str | None


# A type checker knows what comes back where it sees whether outputs is an empty tuple.
@overload
def register_attention(
    query: Tensor, key: Tensor, value: Tensor, *, outputs: tuple[()] = (), **rest: Unpack[_Rest]
) -> Tensor: ...
@overload
def register_attention(
    query: Tensor, key: Tensor, value: Tensor, *, outputs: tuple[str, Unpack[tuple[str, ...]]], **rest: Unpack[_Rest]
) -> tuple[Tensor, AttentionOutputs]: ...
@overload
def register_attention(
    query: Tensor, key: Tensor, value: Tensor, *, outputs: Sequence[str], **rest: Unpack[_Rest]
) -> Tensor | tuple[Tensor, AttentionOutputs]: ...


def register_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_prefix_tokens: int = 0,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    rope: Rope | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    outputs: Sequence[str] = (),
    backend: str | None = None,
) -> Tensor | tuple[Tensor, AttentionOutputs]:
    """Self-attention over ``[CLS | registers | patches]``, with the statistics asked for.

    ``softmax(query @ key^T * scale + mask) @ value`` (Vaswani et al., arXiv 1706.03762, eq. 1) with
    ``torch.nn.functional.scaled_dot_product_attention``'s argument names. Accumulates in fp32; never holds N x N except
    in the ``reference`` backend. Differentiable in query, key and value (and in an additive mask where the backend
    supports it). Second and forward-mode derivatives are those of the formula, N x N; the fused kernels of ``sdpa``,
    ``flash_attn`` and ``xformers`` have no second one under ``create_graph=True``. For torch.func and tracers see
    docs/function_transforms.md. Under autocast fp32 inputs are cast to the autocast dtype.

    DTensors split by batch or by heads stay so; the output and the statistics are DTensors too. What is split otherwise
    or unevenly is gathered first. Mask, rope and ``cu_seqlens`` may be plain tensors then, the same on every device. On
    the meta device there are shapes alone.

    Args:
        query, key, value: ``[B, H, N, D]``, one shape, dtype (fp32, fp16, bf16 or fp64) and device; any strides, so
            views of a packed qkv are read in place. With ``cu_seqlens``, B is 1 and N the sum of all images' tokens.
        num_prefix_tokens: P, the CLS and register tokens that lead every image. Read by ``rope`` and
            ``"prefix_attention"``.
        attn_mask: bool (True takes part) or of the query's dtype (added to the logits), broadcastable to
            ``[B, H, N, N]``; a key-padding mask is bool ``[B, 1, 1, N]``. A query all of whose keys are masked gives
            zeros. A key that is masked (False or -inf) for every query is as good as absent, even where its key or
            value is NaN or infinite: it changes no output, statistic or gradient, and its own gradients are zero.
        dropout_p: probability of dropping an attention weight, in [0, 1). Applies whenever it is not 0.
        scale: factor on the logits; 1 / sqrt(D) by default.
        rope: rotation of the patch tokens of query and key.
        cu_seqlens: int32 ``[S + 1]`` on the query's device: the first token of each packed image, and the end. Its
            values are checked where that takes no device synchronisation, or where ``max_seqlen`` is left out.
            Elsewhere they must be right: a kernel reads and writes where they say.
        max_seqlen: longest packed image, or more; without it ``cu_seqlens`` is read on the host, which waits for a GPU.
            (Backends other than ``triton`` read it there anyway.)
        outputs: any of ``"lse"``, ``"prefix_attention"``, ``"received_attention"``, ``"max_logit"``,
            ``"token_norms"``; see ``AttentionOutputs``.
        backend: a backend's name, which then runs or raises; ``None`` takes the default for such a call.

    Returns:
        ``[B, H, N, D]``, a view of contiguous ``[B, N, H, D]`` memory; with ``outputs``, that and an
        ``AttentionOutputs``.

    Raises:
        TypeError, ValueError: for arguments that do not fit together; nothing has run then.
        UnsupportedError: if the named backend, or every backend, cannot serve the call.
    """
    inputs = validated(
        query,
        key,
        value,
        num_prefix_tokens=num_prefix_tokens,
        attn_mask=attn_mask,
        dropout_p=dropout_p,
        scale=scale,
        rope=rope,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        outputs=outputs,
    )
    output, statistics = _run(inputs, None, backend)
    return (output, statistics) if inputs.outputs else output


@overload
def register_attention_qkv(qkv: Tensor, *, outputs: tuple[()] = (), **rest: Unpack[_Rest]) -> Tensor: ...
@overload
def register_attention_qkv(
    qkv: Tensor, *, outputs: tuple[str, Unpack[tuple[str, ...]]], **rest: Unpack[_Rest]
) -> tuple[Tensor, AttentionOutputs]: ...
@overload
def register_attention_qkv(
    qkv: Tensor, *, outputs: Sequence[str], **rest: Unpack[_Rest]
) -> Tensor | tuple[Tensor, AttentionOutputs]: ...
def register_attention_qkv(
    qkv: Tensor,
    *,
    num_prefix_tokens: int = 0,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    rope: Rope | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    outputs: Sequence[str] = (),
    backend: str | None = None,
) -> Tensor | tuple[Tensor, AttentionOutputs]:
    """``register_attention`` of a packed projection, read in place; its gradient comes back packed.

    Args:
        qkv: ``[B, N, 3, H, D]``, any strides: what ``linear(x).unflatten(-1, (3, H, D))`` gives.
        num_prefix_tokens, attn_mask, dropout_p, scale, rope, cu_seqlens, max_seqlen, outputs, backend: as in
            ``register_attention``.

    Returns:
        ``[B, N, C]`` with C = H * D; with ``outputs``, that and an ``AttentionOutputs``.

    Raises:
        TypeError, ValueError, UnsupportedError: as ``register_attention``.
    """
    if not isinstance(qkv, Tensor) or qkv.is_nested or qkv.ndim != 5 or qkv.shape[2] != 3:
        refuse_nested("qkv", qkv)
        raise ValueError(f"qkv must be a [B, N, 3, H, D] tensor, got {described(qkv)}")
    (qkv,) = autocast(qkv)
    query = qkv.detach().select(2, 0).transpose(1, 2)  # key and value are alike in all that is checked
    inputs = validated(
        query,
        query,
        query,
        num_prefix_tokens=num_prefix_tokens,
        attn_mask=attn_mask,
        dropout_p=dropout_p,
        scale=scale,
        rope=rope,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        outputs=outputs,
    )
    output, statistics = _run(inputs, qkv, backend)
    return (output, statistics) if inputs.outputs else output


def _run(inputs: AttentionInputs, qkv: Tensor | None, name: str | None) -> tuple[Tensor, AttentionOutputs]:
    """By the backend named, or the default.

    A default that a measurement made may find only when it runs that it does not serve the very tensors: cuDNN finds no
    plan for them, say. Whoever named no backend then gets the next; whoever did is told.
    """
    if is_distributed(inputs.query):
        return sharding.run(partial(_run, name=name), inputs, qkv)
    request = features.request_of(inputs, qkv)
    chosen = dispatch.select(backends.BACKENDS, request, name)
    try:
        return _attend(inputs, qkv, chosen)
    except UnsupportedError as refusal:
        if name is not None:
            raise
        if not torch.compiler.is_compiling():
            with contextlib.suppress(Warning):  # where warnings are made errors
                warnings.warn(f"the default gives way to the next: {refusal}", stacklevel=3)
    return _attend(inputs, qkv, dispatch.instead_of(chosen, backends.BACKENDS, request))


def _attend(inputs: AttentionInputs, qkv: Tensor | None, backend: Backend) -> tuple[Tensor, AttentionOutputs]:
    """``[B, H, N, D]``, or ``[B, N, C]`` of a packed projection."""
    if qkv is None:
        return autograd.attend(inputs, backend.name) if backend.opaque else backend.forward(inputs)
    if backend.opaque:
        return autograd.attend_qkv(qkv, inputs, backend.name)
    query, key, value = unpack_qkv(qkv)
    output, statistics = backend.forward(inputs._replace(query=query, key=key, value=value))
    return output.transpose(1, 2).flatten(2), statistics


def explain(
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    *,
    num_prefix_tokens: int = 0,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    rope: Rope | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    outputs: Sequence[str] = (),
    backend: str | None = None,
) -> dispatch.Explanation:
    """Which backend ``register_attention`` would take for these arguments, and why not each of the others.

    Runs nothing. Key and value default to the query; printing the result gives a line a backend.

    Raises:
        TypeError, ValueError: for arguments that do not fit together.
    """
    inputs = validated(
        query,
        query if key is None else key,
        query if value is None else value,
        num_prefix_tokens=num_prefix_tokens,
        attn_mask=attn_mask,
        dropout_p=dropout_p,
        scale=scale,
        rope=rope,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        outputs=outputs,
    )
    return dispatch.explain(backends.BACKENDS, features.request_of(inputs), backend)
