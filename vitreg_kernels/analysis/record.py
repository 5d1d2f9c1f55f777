"""Everything the analyses need of a model, from one pass over some images."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import functional
from ..integrations.patching.api import patched
from ..integrations.patching.capture import attention_layers, capture
from ..integrations.residual_stream import ResidualStream, residual_stream, unwrapped
from ..layout import TokenLayout

FEATURES = ("tokens", "query", "key", "value")


class Recording(NamedTuple):
    """What one pass over images of one grid showed. On the CPU, fp32 (fp64 of a model in fp64), and never N x N.

    Attributes:
        norms: ``[L, B, N]``, L2 norms of the tokens that leave each block. The last block's are those before the final
            norm, behind which they are all alike.
        embeddings: ``[B, M, C]``, the patches as the patch embedding gives them, without positions.
        features: ``[B, N, C]`` by layer, counted from 0, and kind, one of ``FEATURES``: ``"tokens"`` that leave the
            block, or its attention's ``"query"``, ``"key"`` or ``"value"``, all heads of a token side by side. Query
            and key are as ``capture`` shows them: rotated already in transformers' DINOv3, whose model does it itself,
            and not yet in timm's, DINOv3's own and ``RegisterViT``.
        attention: ``[B, H, P, N]`` by layer, probabilities of the CLS and register queries.
        received: ``[B, H, N]`` by layer, the attention that each key receives, averaged over queries.
        grid: rows and columns of the patches.
        layout: the order of the tokens.
        valid: ``[B, M]`` bool, the patches that show the image and not padding.
    """

    norms: Tensor
    embeddings: Tensor
    features: dict[tuple[int, str], Tensor]
    attention: dict[int, Tensor]
    received: dict[int, Tensor]
    grid: tuple[int, int]
    layout: TokenLayout
    valid: Tensor


@torch.no_grad()
def record(
    model: nn.Module,
    pixels: Tensor,
    *,
    features: Iterable[tuple[int, str]] = (),
    attention: Iterable[int] = (),
    received: Iterable[int] = (),
    layout: TokenLayout | None = None,
    valid: Tensor | None = None,
) -> Recording:
    """Run a model once and keep what was asked for; the model stays as it is.

    Attention, queries, keys and values are taken while this library's kernels compute them: a model of another library
    is patched for the time of the call where any is asked for, unless it is already. A compiled model runs eagerly.

    Args:
        model: a ``RegisterViT``, or a Vision Transformer that ``integrations.residual_stream`` knows, alone or within
            another model, in evaluation mode.
        pixels: ``[B, channels, height, width]`` as the model takes them, on its device. transformers' models resample
            their positions where the size is another than theirs.
        features: pairs of a layer and a kind, one of ``FEATURES``.
        attention, received: layers. Layers are blocks counted from the first or, negative, from the last.
        layout: instead of the model's own order of tokens.
        valid: ``[B, M]`` bool, the patches that show the image; ``None`` if all do.

    Raises:
        ValueError: if the model is not known or is in training mode; pixels, ``valid`` or a kind is not as above; the
            patches are in no grid that its convolution tells, or the tokens are not the layout's prefix and that grid;
            or attention is asked of a model without prefix, or of modules that this library does not compute.
        IndexError: if there is no such layer.
    """
    stream = _stream_of(model)
    layout = stream.layout if layout is None else layout
    wanted = _wanted(len(stream.blocks), features, attention, received)
    if pixels.dim() != 4:
        raise ValueError(f"pixels must be [B, channels, height, width], not of shape {tuple(pixels.shape)}")
    tokens = {layer for layer, kind in wanted if kind == "tokens"}
    taken = [(layer, output) for layer, output in wanted if output != "tokens"]
    with _Seen(stream, tokens) as seen, _captured(model, stream, layout, taken) as captured:
        _call(model, pixels)
        found = {key: _kept(tensor) for key, tensor in captured().items()}
    norms, embeddings, grid = seen.norms(), *seen.embeddings()
    _check(stream, layout, grid, norms, embeddings, found, len(pixels))
    return Recording(
        norms=norms,
        embeddings=embeddings,
        features={
            (layer, kind): seen.tokens[layer] if kind == "tokens" else found[layer, kind].transpose(1, 2).flatten(2)
            for layer, kind in wanted
            if kind in FEATURES
        },
        attention={layer: x for (layer, output), x in found.items() if output == "prefix_attention"},
        received={layer: x for (layer, output), x in found.items() if output == "received_attention"},
        grid=grid,
        layout=layout,
        valid=_valid(valid, embeddings, grid),
    )
