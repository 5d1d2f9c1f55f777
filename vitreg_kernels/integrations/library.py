"""What this package knows of one model library, and what each file needs to say it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..layout import TokenLayout
from .kind import Kind
from .modules import first_of


class ResidualStream(NamedTuple):
    """Where a Vision Transformer's tokens pass on their way from the pixels to the features.

    Attributes:
        layers: name and module of each place, first to last. What the module gives is the stream: ``[B, N, C]`` tokens,
            a tuple that begins with them, or a list of such tensors, one for each size of crop. A ``RegisterViT`` never
            has the stream between two blocks in memory; its modules give the norms of the tokens, ``[B, N]``.
        layout: the order of the tokens.
        blocks: name and module of each block, which is called with the stream before it and gives that after it.
        patch_embed: what the pixels are given to, and what gives the patches without positions: ``[B, M, C]``, or a
            map of the grid with C in the second or the last place.
        neurons: of each block the last linear layer of its MLP, which is called with the neurons ``[B, N, hidden]``
            after their activation, of a gated MLP after their gate; ``None`` of a block whose MLP is not known.
        norm: the final norm, which is called with the stream: of DINOv3 models that untie the norms with its parts, one
            after another, and in CLIP's vision model, and open_clip's towers that pool before it, with what is pooled.
            Where the norm stands behind the pooling in timm, the Identity in its place.
    """

    layers: list[tuple[str, nn.Module]]
    layout: TokenLayout
    blocks: list[tuple[str, nn.Module]]
    patch_embed: nn.Module
    neurons: list[nn.Module | None]
    norm: nn.Module

    @classmethod
    def of_blocks(
        cls,
        layout: TokenLayout,
        blocks: list[tuple[str, nn.Module]],
        *,
        patch_embed: nn.Module,
        norm: nn.Module,
        neurons: tuple[str, ...] = ("mlp.fc2", "mlp.w3"),
    ) -> ResidualStream:
        """The stream of a model whose blocks give it.

        Args:
            layout, blocks, patch_embed, norm: as the attributes.
            neurons: where in a block the last linear layer of its MLP may be, the first that is there.
        """
        last = [first_of(block, *neurons) for _, block in blocks]
        return cls(blocks, layout, blocks, patch_embed, last, norm)


class Converted(NamedTuple):
    """A state dict under ``RegisterViT``'s names, and what it says of the configuration: fields of ``ViTConfig``.

    Attributes:
        weights: by ``RegisterViT``'s names.
        told: fields that the shapes tell.
        fixed: fields that no shape tells and the library's code gives no choice about.
        assumed: fields that no shape tells, as the published models have them. ``mlp`` and ``position`` may be among
            them and in ``told`` too: a width tells that an MLP has a gate, and not which activation that gate has.
        square: whether the library takes any position rows for those of a square grid.
        left_out: what ``RegisterViT`` has no place for and its features have no part of, by name.
        blocks_assumed: whether models have the same names whose blocks are not pre-norm, or turn queries and keys.
    """

    weights: dict[str, Tensor]
    told: dict[str, Any]
    fixed: dict[str, Any]
    assumed: dict[str, Any]
    square: bool
    left_out: list[str]
    blocks_assumed: bool


class Library(NamedTuple):
    """One model library.

    Attributes:
        name: its package.
        residual_stream: where the stream of a module of its passes; ``None`` of any other module.
        convert: a state dict of one of its models, ``None`` of any other; no function where its checkpoints are not
            read.
        describe: fields of ``ViTConfig`` that the ``config.json`` in its folders tells, given that and the weights;
            ``image_size`` is of the images that the position rows were learnt on. No function where it writes none.
        attention: the classes of its attention modules that this library can compute, and of what makes their masks.
        blocks: the classes of its blocks that this library can compute.
        prefix_tokens: the CLS and register tokens that lead the sequence of one of its models; ``None`` of any other
            module.
    """

    name: str
    residual_stream: Callable[[nn.Module], ResidualStream | None]
    convert: Callable[[Mapping[str, Tensor]], Converted | None] | None = None
    describe: Callable[[Mapping[str, Any], Converted], dict[str, Any]] | None = None
    attention: tuple[Kind, ...] = ()
    blocks: tuple[Kind, ...] = ()
    prefix_tokens: Callable[[nn.Module], int | None] = lambda module: None
