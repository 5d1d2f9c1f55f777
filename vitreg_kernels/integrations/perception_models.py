"""The vision encoders of Meta's Perception Encoder (https://github.com/facebookresearch/perception_models)."""

from __future__ import annotations

from torch import nn

from ..layout import TokenLayout
from .attention import perception_models as attention
from .library import Library, ResidualStream
from .modules import derives_from, named


def residual_stream(model: nn.Module) -> ResidualStream | None:
    """The blocks of a ``VisionTransformer``; None of anything else."""
    prefix = prefix_tokens(model)
    if prefix is None:
        return None
    return ResidualStream.of_blocks(
        TokenLayout(num_registers=0, num_cls_tokens=prefix),
        named("transformer.resblocks", model.transformer.resblocks),
        patch_embed=model.conv1,
        norm=model.ln_post,
        neurons=("mlp.c_proj",),
    )


def prefix_tokens(model: nn.Module) -> int | None:
    """The CLS token of a ``VisionTransformer``, if it has one; None of anything else."""
    if derives_from(model, "core", "VisionTransformer") and hasattr(model, "use_cls_token"):
        return int(model.use_cls_token)
    return None


LIBRARY = Library("perception_models", residual_stream, attention=(attention.KIND,), prefix_tokens=prefix_tokens)
