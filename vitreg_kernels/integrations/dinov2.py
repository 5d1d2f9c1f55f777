"""DINOv2's own models and files (https://github.com/facebookresearch/dinov2)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..layout import TokenLayout
from .attention import dinov2 as attention
from .blocks import dino as blocks
from .library import Converted, Library, ResidualStream
from .modules import derives_from, named
from .state_dict import PATCH_EMBED, backbone, converted, renamed

_RULES = (
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # chunks for FSDP, within which the numbers of blocks run on
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)


def convert(weights: Mapping[str, Tensor]) -> Converted | None:
    """A state dict of a ``DinoVisionTransformer``, or None if these weights are not DINOv2's.

    They are told by the mask token, which every DINOv2 model has and no feature shows. The published models with
    registers resample positions with antialiasing, those without with an offset of 0.1 instead; DINOv2's own training
    does the latter unless it is told otherwise, with registers or without. Its code takes the grid for a square.

    Args:
        weights: a state dict, the names with any prefix; a training checkpoint's teacher is taken.

    Raises:
        ValueError: if sizes cannot be told from the shapes.
    """
    vit = backbone(weights, PATCH_EMBED)
    if vit is None or not {"mask_token", "pos_embed"} <= vit.weights.keys():
        return None
    names, left_out = vit.without(("head",), unused=("mask_token",))
    names = renamed(names, _RULES)
    registers = "register_tokens" in names
    return converted(
        names,
        left_out,
        fixed={"eps": 1e-6, "position_rows": "cls"},
        assumed={"antialias": registers, "interpolate_offset": 0.0 if registers else 0.1},
        activation_assumed=False,
        square=True,
    )


def prefix_tokens(model: nn.Module) -> int | None:
    """The prefix of a ``DinoVisionTransformer``: a CLS token and the registers; None of anything else."""
    return 1 + model.num_register_tokens if _is_ours(model) else None


def _is_ours(model: nn.Module) -> bool:
    return derives_from(model, None, "DinoVisionTransformer") and hasattr(model, "num_register_tokens")


def residual_stream(model: nn.Module) -> ResidualStream | None:
    """The blocks of a ``DinoVisionTransformer``, taken out of their chunks; None of anything else."""
    if not _is_ours(model):
        return None
    layers = named("blocks", model.blocks)
    if model.chunked_blocks:
        # A chunk begins with an Identity for each block of the chunks before it.
        layers = [
            (name, block)
            for path, chunk in layers
            for name, block in named(path, chunk)
            if not isinstance(block, nn.Identity)
        ]
    layout = TokenLayout(num_registers=model.num_register_tokens)
    return ResidualStream.of_blocks(layout, layers, patch_embed=model.patch_embed, norm=model.norm)


LIBRARY = Library(
    "dinov2",
    residual_stream,
    convert,
    attention=attention.KINDS,
    blocks=blocks.DINOV2,
    prefix_tokens=prefix_tokens,
)
