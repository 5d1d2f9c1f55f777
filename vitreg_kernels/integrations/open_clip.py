"""open_clip's ``VisionTransformer``. Trunks from timm are timm's; text towers and pools are no Vision Transformers."""

from __future__ import annotations

from torch import nn

from ..layout import TokenLayout
from .attention import multihead
from .attention import open_clip as attention
from .blocks import open_clip as blocks
from .library import Library, ResidualStream
from .modules import derives_from, named


def residual_stream(model: nn.Module) -> ResidualStream | None:
    """The blocks of a ``VisionTransformer``; None of anything else."""
    if not derives_from(model, "open_clip", "VisionTransformer"):
        return None
    return ResidualStream.of_blocks(
        TokenLayout(num_registers=0),
        named("transformer.resblocks", model.transformer.resblocks),
        patch_embed=model.conv1,
        norm=model.ln_post,
        neurons=("mlp.c_proj",),
    )


def prefix_tokens(model: nn.Module) -> int | None:
    """The CLS token of a ``VisionTransformer``; None of anything else."""
    return 1 if derives_from(model, "open_clip", "VisionTransformer") else None


LIBRARY = Library(
    "open_clip",
    residual_stream,
    attention=(multihead.KIND, *attention.KINDS),
    blocks=(blocks.KIND,),
    prefix_tokens=prefix_tokens,
)
