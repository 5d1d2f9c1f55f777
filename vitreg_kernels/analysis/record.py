"""Everything that the analyses need of a model, from one pass over the images."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import functional
from ..integrations.libraries import LIBRARIES
from ..integrations.patching.api import patched
from ..integrations.patching.capture import Captured, attention_layers, capture
from ..integrations.residual_stream import ResidualStream, residual_stream, unwrapped
from ..layout import TokenLayout

FEATURES = ("tokens", "query", "key", "value")


class Recording(NamedTuple):
    """What a model showed of images of one grid. On the CPU, fp32 (fp64 of a model in fp64), and never N x N.

    Attributes:
        norms: ``[L, B, N]``, L2 norms of the tokens behind each block. The last block's are before the final norm,
            behind which all tokens have about the same.
        embeddings: ``[B, M, C]``, the patches as the patch embedding gives them, without positions.
        features: ``[B, N, C]`` by layer, counted from 0, and kind: the ``"tokens"`` behind the block, or ``"query"``,
            ``"key"`` or ``"value"`` of its attention, a token's heads side by side. They are those that ``capture``
            gives: queries and keys before the rotation, but rotated in transformers' DINOv3, which does so itself.
        attention: ``[B, H, P, N]`` by layer, the probabilities of the CLS and register queries.
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


class Patches(NamedTuple):
    """The valid patches of all images, one after another: T of them.

    Attributes:
        norms: ``[L, T]``, as in ``Recording``.
        image: ``[T]`` int64, which image a patch is of, counted over all recordings.
        row, column: ``[T]`` int64, its place in that image's grid.
        grids: rows and columns of each image.
    """

    norms: Tensor
    image: Tensor
    row: Tensor
    column: Tensor
    grids: list[tuple[int, int]]


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
    """Run a model on images and keep what is asked for; the model stays what it is.

    Attention, queries, keys and values are taken while this library's kernels compute them. Where any is asked for, a
    model of another library is patched for the time of the call, unless it is already. A compiled model runs eagerly.

    Args:
        model: a ``RegisterViT``, or a Vision Transformer that ``integrations.residual_stream`` knows, alone or within
            another model, in evaluation mode.
        pixels: ``[B, channels, height, width]``, as the model takes them, on its device. A model of transformers that
            resamples positions only when it is told to is told to.
        features: layers, each with one of ``FEATURES``.
        attention, received: layers. These are the blocks, counted from the first or, negative, from the last.
        layout: the order of the tokens, if it is not the model's own.
        valid: ``[B, M]`` bool, the patches that show the image; ``None`` if all do.

    Raises:
        ValueError: if the model is not known or trains; the pixels, ``valid`` or a feature are not as above; the grid
            cannot be told, or the tokens are not the layout's prefix and the grid's patches; or attention is asked of a
            model without a prefix, or of modules that this library does not compute.
        IndexError: if there is no such layer.
    """
    stream = _stream_of(model)
    layout = stream.layout if layout is None else layout
    if pixels.dim() != 4:
        raise ValueError(f"pixels must be [B, channels, height, width], not of shape {tuple(pixels.shape)}")
    depth = len(stream.blocks)
    features = [(_counted(layer, depth), kind) for layer, kind in features]
    if unknown := sorted({kind for _, kind in features} - set(FEATURES)):
        raise ValueError(f"unknown features {', '.join(unknown)}: expected of {', '.join(FEATURES)}")
    taken = [(layer, kind) for layer, kind in features if kind != "tokens"]
    taken += [(_counted(layer, depth), "prefix_attention") for layer in attention]
    taken += [(_counted(layer, depth), "received_attention") for layer in received]

    layers = enumerate(module for _, module in stream.layers[-depth:])  # a RegisterViT has one more, before its blocks
    blocks = [(layer, stream.blocks[layer][1]) for layer, kind in features if kind == "tokens"]
    with ExitStack() as stack:
        norms = stack.enter_context(_given(layers, _norms))
        tokens = stack.enter_context(_given(blocks, _kept))
        patches = stack.enter_context(_embedded(stream.patch_embed))
        captured = stack.enter_context(_captured(model, stream.blocks, layout.num_prefix_tokens, taken))
        _run(model, pixels)
        outputs = captured()
    if len(norms) < depth or not patches:
        raise ValueError(f"{type(unwrapped(model)).__name__} ran {len(norms)} of its {depth} blocks for these pixels")
    grid, embeddings = patches["grid"], patches["embeddings"]
    maps = {layer: x for (layer, output), x in outputs.items() if output == "prefix_attention"}
    norms = [norms[i] for i in range(depth)]
    _check_tokens(layout, grid, norms, maps, len(pixels))
    return Recording(
        norms=torch.stack(norms),
        embeddings=embeddings,
        features={
            (layer, kind): tokens[layer] if kind == "tokens" else outputs[layer, kind].transpose(1, 2).flatten(2)
            for layer, kind in features
        },
        attention=maps,
        received={layer: x for (layer, output), x in outputs.items() if output == "received_attention"},
        grid=grid,
        layout=layout,
        valid=_valid(valid, embeddings.shape[:2]),
    )


def concatenated(recordings: Sequence[Recording]) -> Recording:
    """The images of several recordings, one after another.

    Raises:
        ValueError: if there is none, or they are not of one grid, one layout and the same layers and features.
    """
    if not recordings:
        raise ValueError("there is no recording to concatenate")
    if len({_common(recording) for recording in recordings}) > 1:
        raise ValueError("recordings to concatenate must be of one grid, layout, and the same layers and features")
    first = recordings[0]

    def by_key(name: str) -> dict[Any, Tensor]:
        return {key: torch.cat([getattr(r, name)[key] for r in recordings]) for key in getattr(first, name)}

    return first._replace(
        norms=torch.cat([r.norms for r in recordings], dim=1),
        embeddings=torch.cat([r.embeddings for r in recordings]),
        features=by_key("features"),
        attention=by_key("attention"),
        received=by_key("received"),
        valid=torch.cat([r.valid for r in recordings]),
    )


def patches_of(recordings: Sequence[Recording]) -> Patches:
    """The valid patches of all images, row by row; grids and layouts may differ.

    Raises:
        ValueError: if there is no recording, or they are not of as many layers.
    """
    if len({len(recording.norms) for recording in recordings}) != 1:
        raise ValueError("patches_of takes at least one recording, and all of as many layers")
    norms, images, rows, columns = [], [], [], []
    grids: list[tuple[int, int]] = []
    for recording in recordings:
        image, patch = recording.valid.nonzero().unbind(1)  # in the order in which a mask picks
        norms.append(recording.norms[:, :, recording.layout.patches][:, recording.valid])
        images.append(image + len(grids))
        rows.append(patch // recording.grid[1])
        columns.append(patch % recording.grid[1])
        grids += [recording.grid] * len(recording.valid)
    return Patches(torch.cat(norms, dim=1), torch.cat(images), torch.cat(rows), torch.cat(columns), grids)


def _stream_of(model: nn.Module) -> ResidualStream:
    stream = residual_stream(model)
    name = type(unwrapped(model)).__name__
    if stream is None:
        raise ValueError(
            f"{name} is and has no Vision Transformer known here: give a RegisterViT or one of "
            f"{', '.join(library.name for library in LIBRARIES)} in which all tokens attend to all, not to windows"
        )
    if any(module.training for module in unwrapped(model).modules()):
        raise ValueError(f"{name} is in training mode, where dropout changes what is recorded: call model.eval()")
    return stream


def _counted(layer: int, depth: int) -> int:
    """A layer counted from the first."""
    if not -depth <= layer < depth:
        raise IndexError(f"there is no layer {layer}: the model has {depth} blocks")
    return layer % depth


def _run(model: nn.Module, pixels: Tensor) -> None:
    # Models of transformers that have a text beside the images need both, but for this.
    call = getattr(model, "get_image_features", model)
    takes = inspect.signature(unwrapped(model).forward if call is model else call).parameters
    options = {name: True for name in ("interpolate_pos_encoding",) if name in takes}
    with torch.compiler.set_stance("force_eager"):  # a graph compiled before would know nothing of hooks
        call(pixels, **options)


@contextmanager
def _given(
    modules: Iterable[tuple[Hashable, nn.Module]], keep: Callable[[Tensor], Any]
) -> Iterator[dict[Hashable, Any]]:
    """What modules give as long as they are hooked, by the keys that they come with, and of it what ``keep`` gives."""
    found: dict[Hashable, Any] = {}

    def hook(key: Hashable, module: nn.Module, args: Any, output: Any) -> None:
        found[key] = keep(output[0] if isinstance(output, tuple | list) else output)

    handles = [module.register_forward_hook(partial(hook, key)) for key, module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _norms(x: Tensor) -> Tensor:
    """Of a stream ``[B, N, C]``, or as they are."""
    return _kept(x if x.dim() == 2 else functional.token_norms(x))


def _kept(x: Tensor) -> Tensor:
    """A copy on the CPU: a model may write to what passes, and a view would keep more than itself."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.to("cpu", dtype, copy=True, memory_format=torch.contiguous_format)


@contextmanager
def _embedded(patch_embed: nn.Module) -> Iterator[dict[str, Any]]:
    """The ``"embeddings"`` ``[B, M, C]`` and the ``"grid"`` of the patches, which the last convolution has."""
    found: dict[str, Any] = {}
    convolutions = [("last", part) for part in patch_embed.modules() if isinstance(part, nn.Conv2d)]

    def keep(x: Tensor) -> None:
        if "last" not in maps:
            raise ValueError(
                f"{type(patch_embed).__name__} has no convolution, which would tell the grid of the patches"
            )
        rows, columns = grid = tuple(maps["last"].shape[2:])
        if x.dim() == 4 and x is not maps["last"] and x.shape[1:3] == grid:
            x = x.flatten(1, 2)
        elif x.dim() == 4:
            x = x.flatten(2).transpose(1, 2)
        if x.shape[1] != rows * columns:
            raise ValueError(f"{type(patch_embed).__name__} gives {x.shape[1]} patches of a map of {rows} x {columns}")
        found.update(grid=grid, embeddings=_kept(x))

    # The hooks of what may be one and the same convolution run in this order.
    with _given(convolutions, lambda x: x) as maps, _given([("patches", patch_embed)], keep):
        yield found


@contextmanager
def _captured(
    model: nn.Module, blocks: Sequence[tuple[str, nn.Module]], prefix: int, taken: Sequence[tuple[int, str]]
) -> Iterator[Callable[[], dict[tuple[int, str], Tensor]]]:
    """What gives, after a call, copies of what ``capture`` took, by layer and name of the output."""
    with ExitStack() as stack:
        attends = _attention_of(model, blocks)
        if not all(layer in attends for layer, _ in taken):
            report = stack.enter_context(patched(model, num_prefix_tokens=prefix))
            attends = _attention_of(model, blocks)
            if missing := [blocks[layer][0] for layer, _ in taken if layer not in attends]:
                raise ValueError(f"the attention of {missing[0]} is not computed by this library:\n{report}")
        found = {}
        for output in dict.fromkeys(output for _, output in taken):
            layers = [attends[layer] for layer, of in taken if of == output]
            found[output] = stack.enter_context(capture(model, output, layers=layers))
        yield lambda: {(layer, output): _taken(found[output], attends[layer]) for layer, output in taken}


def _attention_of(model: nn.Module, blocks: Sequence[tuple[str, nn.Module]]) -> dict[int, str]:
    """The name of each block's attention, of those that can be captured."""
    names = list(attention_layers(model))
    within = {i: [name for name in names if name.startswith(f"{block}.")] for i, (block, _) in enumerate(blocks)}
    return {i: found[0] for i, found in within.items() if len(found) == 1}


def _taken(maps: Captured, name: str) -> Tensor:
    if name not in maps:
        raise ValueError(f"{name} computed this call itself, for a hook or an option that this library does not serve")
    return _kept(maps[name])


def _check_tokens(
    layout: TokenLayout, grid: tuple[int, int], norms: list[Tensor], attention: dict[int, Tensor], images: int
) -> None:
    """Raises ValueError if a block saw others than the layout's prefix and the grid's patches of every image."""
    rows, columns = grid
    tokens = layout.num_prefix_tokens + rows * columns
    expected = f"{layout.num_cls_tokens} CLS and {layout.num_registers} register tokens and {rows} x {columns} patches"
    for i, each in enumerate(norms):
        if each.shape != (images, tokens):
            raise ValueError(
                f"block {i} gives {each.shape[1]} tokens of {each.shape[0]} images, and not the {tokens} of {images} "
                f"that {expected} make: give the layout= that the model's tokens have"
            )
    for i, each in attention.items():
        if each.shape[2] != layout.num_prefix_tokens:
            raise ValueError(
                f"block {i} gives the attention of {each.shape[2]} tokens, and not of the {layout.num_prefix_tokens} "
                f"that lead {expected}: the model is patched, or made, for another prefix"
            )
    if layout.grid not in (None, grid) or layout.num_patches not in (None, rows * columns):
        raise ValueError(f"the model gives {expected}, and the layout is of other patches: {layout}")


def _valid(valid: Tensor | None, size: torch.Size) -> Tensor:
    if valid is None:
        return torch.ones(size, dtype=torch.bool)
    if valid.shape != size or valid.dtype != torch.bool:
        raise ValueError(f"valid must be bool {list(size)}, not {valid.dtype} {list(valid.shape)}")
    return valid.to("cpu", copy=True)


def _common(recording: Recording) -> tuple[Any, ...]:
    """What recordings have in common that can be one."""
    keys = (frozenset(part) for part in (recording.features, recording.attention, recording.received))
    return (recording.grid, recording.layout, len(recording.norms), *keys)
