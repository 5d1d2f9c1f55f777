"""Arguments of a call -> ``AssembleInputs``, or one sentence: what was given, what was expected, what to do.

Reads shapes and dtypes only.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .._shared.arguments import DTYPES, described
from .types import AssembleInputs, Sizes, num_prefix, num_tokens, sizes_of


def validated(
    patches: Tensor, cls_token: Tensor | None, register_tokens: Tensor | None, pos_embed: Tensor | None
) -> AssembleInputs:
    """The call as every backend takes it.

    Raises:
        TypeError, ValueError: for arguments that do not fit together.
    """
    if not isinstance(patches, Tensor) or patches.ndim != 3:
        hint = "; take .flatten(2).transpose(1, 2) of a convolution's result" if _is_an_image(patches) else ""
        raise ValueError(f"patches must be a [batch, patches, channels] tensor, got {described(patches)}{hint}")
    if patches.dtype not in DTYPES:
        raise TypeError(f"patches must be fp32, fp16, bf16 or fp64, got {described(patches)}")
    if not (patches.shape[1] and patches.shape[2]):
        raise ValueError(f"there must be at least one patch and channel, got patches {described(patches)}")
    given = {"cls_token": cls_token, "register_tokens": register_tokens, "pos_embed": pos_embed}
    given = {name: tensor for name, tensor in given.items() if tensor is not None}
    for name, tensor in given.items():
        _check(name, tensor, patches)
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in given.values()), patches.dtype)
    inputs = AssembleInputs(patches, cls_token, register_tokens, pos_embed, dtype)
    if pos_embed is not None:
        _check_rows(pos_embed, sizes_of(*inputs))
    return inputs


def _is_an_image(x: object) -> bool:
    return isinstance(x, Tensor) and x.ndim == 4


def _check(name: str, tensor: Tensor, patches: Tensor) -> None:
    channels = patches.shape[2]
    fits = isinstance(tensor, Tensor) and tensor.ndim == 3 and tensor.shape[0] == 1 and tensor.shape[2] == channels
    if not fits or tensor.device != patches.device:
        each = "row" if name == "pos_embed" else "token"
        raise ValueError(
            f"{name} must be [1, {each}s, {channels}] on {patches.device}, one for all images with the patches' "
            f"channels, got {described(tensor)}"
        )
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be fp32, fp16, bf16 or fp64, got {described(tensor)}")


def _check_rows(pos_embed: Tensor, sizes: Sizes) -> None:
    """In this order: timm without rows for its prefix, DINOv2 and Hugging Face, timm with them."""
    if sizes.prefix_rows not in (0, sizes.cls_tokens, num_prefix(sizes)):
        raise ValueError(
            f"pos_embed must have {sizes.patches} rows (patches), {sizes.cls_tokens + sizes.patches} (CLS tokens and "
            f"patches) or {num_tokens(sizes)} (CLS tokens, registers and patches), got {described(pos_embed)}; "
            "interpolate it to the grid of the patches first"
        )
