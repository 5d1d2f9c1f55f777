"""The op's schemas and fakes (shapes, dtypes and strides without data). Imports torch only.

Ops named ``qkv`` take a packed projection ``[B, N, 3, H, D]`` whole, outputs and their gradients as ``[B, N, C]``.
Every op here is opaque to torch.compile and takes detached inputs; ``autograd.py`` joins forward and backward.
Statistics come in the order in which ``outputs`` names them, with a space between: torch.jit.trace knows no lists of
strings. The backend is a string, chosen before tracing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .types import empty_output

LIBRARY = torch.library.Library("vitreg", "FRAGMENT")

_CALL = (
    "Tensor? key_mask, Tensor? rope_cos, Tensor? rope_sin, bool rope_interleaved, Tensor? cu_seqlens, "
    "SymInt max_seqlen, SymInt num_prefix_tokens, float scale"
)

LIBRARY.define(
    f"attention_forward(Tensor query, Tensor key, Tensor value, {_CALL}, str outputs, str backend) -> "
    "(Tensor output, Tensor[] statistics)"
)
LIBRARY.define(
    f"attention_forward_qkv(Tensor qkv, {_CALL}, str outputs, str backend) -> (Tensor output, Tensor[] statistics)"
)
LIBRARY.define(
    f"attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, {_CALL}, Tensor output, "
    "Tensor lse, str backend) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)"
)
LIBRARY.define(
    f"attention_backward_qkv(Tensor grad_output, Tensor qkv, {_CALL}, Tensor output, Tensor lse, str backend) -> Tensor"
)
LIBRARY.define(
    "attention_statistics(Tensor query, Tensor key, Tensor? attn_mask, Tensor? cu_seqlens, SymInt num_prefix_tokens, "
    "float scale, str outputs) -> Tensor[]"
)


def empty_statistics(query: Tensor, cu_seqlens: Tensor | None, num_prefix_tokens: int, outputs: str) -> list[Tensor]:
    """Uninitialised statistics, one for each that ``outputs`` names."""
    batch, heads, tokens, _ = query.shape
    images = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shapes = {
        "lse": (batch, heads, tokens),
        "prefix_attention": (batch, heads, num_prefix_tokens, tokens),
        "received_attention": (batch, heads, tokens),
        "max_logit": (images, heads),
        "token_norms": (batch, tokens),
    }
    dtype = torch.promote_types(query.dtype, torch.float32)
    return [query.new_empty(shapes[name], dtype=dtype) for name in outputs.split()]


@torch.library.register_fake("vitreg::attention_forward", lib=LIBRARY)
def _(query, key, value, *call_outputs_backend):  # noqa: ANN001, ANN002, ANN202
    *_, cu_seqlens, _max_seqlen, num_prefix_tokens, _scale, outputs, _backend = call_outputs_backend
    return empty_output(query), empty_statistics(query, cu_seqlens, num_prefix_tokens, outputs)


@torch.library.register_fake("vitreg::attention_forward_qkv", lib=LIBRARY)
def _(qkv, *call_outputs_backend):  # noqa: ANN001, ANN002, ANN202
    *_, cu_seqlens, _max_seqlen, num_prefix_tokens, _scale, outputs, _backend = call_outputs_backend
    batch, tokens, _, heads, head_dim = qkv.shape
    query = qkv.select(2, 0).transpose(1, 2)
    statistics = empty_statistics(query, cu_seqlens, num_prefix_tokens, outputs)
    return qkv.new_empty(batch, tokens, heads * head_dim), statistics


@torch.library.register_fake("vitreg::attention_backward", lib=LIBRARY)
def _(grad_output, query, key, value, *_):  # noqa: ANN001, ANN002, ANN202
    return empty_output(query), empty_output(key), empty_output(value)


@torch.library.register_fake("vitreg::attention_backward_qkv", lib=LIBRARY)
def _(grad_output, qkv, *_):  # noqa: ANN001, ANN002, ANN202
    return qkv.new_empty(qkv.shape)


@torch.library.register_fake("vitreg::attention_statistics", lib=LIBRARY)
def _(query, key, attn_mask, cu_seqlens, num_prefix_tokens, scale, outputs):  # noqa: ANN001, ANN202
    return empty_statistics(query, cu_seqlens, num_prefix_tokens, outputs)
