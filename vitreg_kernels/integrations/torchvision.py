"""torchvision's ``VisionTransformer``."""

from __future__ import annotations

from torch import nn

from ..layout import TokenLayout
from .attention import multihead
from .blocks import torchvision as blocks
from .library import Library, ResidualStream
from .modules import derives_from, named


def residual_stream(model: nn.Module) -> ResidualStream | None:
    """The blocks of a ``VisionTransformer``; None of anything else."""
    if not derives_from(model, "torchvision", "VisionTransformer"):
        return None
    return ResidualStream.of_blocks(
        TokenLayout(num_registers=0),
        named("encoder.layers", model.encoder.layers),
        patch_embed=model.conv_proj,
        norm=model.encoder.ln,
        neurons=("mlp.3",),
    )


def prefix_tokens(model: nn.Module) -> int | None:
    """The CLS token of a ``VisionTransformer``; None of anything else."""
    return 1 if derives_from(model, "torchvision", "VisionTransformer") else None


LIBRARY = Library(
    "torchvision",
    residual_stream,
    attention=(multihead.KIND,),
    blocks=(blocks.KIND,),
    prefix_tokens=prefix_tokens,
)
