"""Assembling ``[CLS | registers | patches]`` with each library's position embedding; with gradients."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...functional import assemble_tokens
from ...ops.assemble.features import request_of
from ...ops.assemble.types import num_tokens, sizes_of
from ...ops.assemble.validation import validated
from ..oracle import Call, Tensors, outputs_and_gradients, with_defaults
from .tensors import SHAPE, Shape, permuted, size, uniform

INPUTS = ("patches", "cls_token", "register_tokens", "pos_embed")


def call(
    patches: Tensor, *, name: str = "", backward: bool = True, grad_tokens: Tensor | None = None, **parameters: Tensor
) -> Call:
    """A call of ``assemble_tokens``.

    Args:
        patches: ``[B, M, C]``.
        name: what it exercises.
        backward: whether gradients count too.
        grad_tokens: the upstream gradient, ``[B, N, C]``; random by default.
        parameters: further arguments of ``assemble_tokens``.
    """
    inputs = validated(**with_defaults(assemble_tokens, patches=patches, **parameters))
    batch, _, channels = patches.shape
    if backward and grad_tokens is None:
        shape = (batch, num_tokens(sizes_of(*inputs)), channels)
        grad_tokens = uniform(torch.Generator(patches.device).manual_seed(0), inputs.dtype, *shape)
    return Call(
        name=name,
        request=request_of(inputs),
        function=_assemble,
        arguments={"patches": patches, "grad_tokens": grad_tokens, **parameters},
        terms=partial(terms, batch),
    )


def terms(batch: int, tensor: str) -> int:
    """K of the accuracy rule: gradients of the parameters are summed over the batch."""
    return batch if tensor in ("grad_cls_token", "grad_register_tokens", "grad_pos_embed") else 1


def calls(dtype: torch.dtype, device: torch.device) -> Iterator[Call]:
    """ViT-S at 224 px, with a position embedding of each extent."""
    yield from kinds(SHAPE, dtype, device)


def kinds(shape: Shape, dtype: torch.dtype, device: torch.device) -> Iterator[Call]:
    """Each kind of call, with tokens ``[B, N, C]``: CLS, four registers, and patches as a convolution gives them."""
    batch, tokens, channels = shape
    patches = tokens - 5
    numbers = partial(uniform, torch.Generator(device).manual_seed(2), dtype)
    for position, rows in {"all tokens": tokens, "CLS and patches": 1 + patches, "patches": patches}.items():
        yield call(
            permuted(numbers(batch, patches, channels)),
            name=f"{size(shape)}, positions of {position}",
            cls_token=numbers(1, 1, channels),
            register_tokens=numbers(1, 4, channels),
            pos_embed=numbers(1, rows, channels),
        )


def _assemble(backend: str, grad_tokens: Tensor | None, **inputs: Any) -> Tensors:
    def assemble(**inputs: Tensor) -> Tensors:
        return {"tokens": assemble_tokens(**inputs, backend=backend)}

    return outputs_and_gradients(assemble, inputs, {} if grad_tokens is None else {"tokens": grad_tokens})
