"""timm: ``VisionTransformer``, and the DINOv3 models of its ``Eva``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..layout import TokenLayout
from ..nn.config import ViTConfig
from .library import Library, ResidualStream, derives_from, named
from .state_dict import backbone, infer_config, renamed

_RULES = ((r"^reg_token$", "register_tokens"),)
_EVA_RULES = (
    *_RULES,
    (r"\.gamma_(\d)$", r".ls\1.gamma"),
    (r"\.attn\.q_bias$", ".attn.qkv.bias#0"),
    (r"\.attn\.v_bias$", ".attn.qkv.bias#2"),
    (r"\.mlp\.fc1_g\.(\w+)$", r".mlp.fc1.\1#0"),
    (r"\.mlp\.fc1_x\.(\w+)$", r".mlp.fc1.\1#1"),
)
_HEADS = ("head", "head_dist", "fc_norm", "attn_pool")
_HEAD_DIMS = {1152: 72, 1280: 80, 1408: 88, 1664: 104}  # of ViT-So400m, H, g and G
_DINOV3_HEAD_DIMS = {4096: 128}  # of the 7B


def convert(
    weights: Mapping[str, Tensor], *, num_heads: int | None = None
) -> tuple[ViTConfig, dict[str, Tensor]] | None:
    """``RegisterViT``'s configuration and weights, or None if these are not timm's.

    ``reg_token`` and a fixed norm epsilon are timm's; ``VisionTransformer`` resamples positions with antialiasing.
    A DINOv3 model is told by LayerScale under Eva's names and registers, without a position embedding: Eva's other
    models turn queries and keys in ways that the weights do not tell.

    Args:
        weights: a state dict, the names with any prefix.
        num_heads: H, where it is not the published model's of that width.

    Raises:
        ValueError: if the shapes do not tell the sizes, there is no CLS token, or the final norm comes after pooling.
    """
    vit = backbone(weights, r"patch_embed\.proj\.weight")
    if vit is None or "register_tokens" in vit.weights:
        return None
    if "cls_token" not in vit.weights:
        raise ValueError(
            "the weights have no cls_token: timm's models without one differ in what no weight tells, the activation "
            "and the number of heads"
        )
    if "fc_norm.weight" in vit.weights and "norm.weight" not in vit.weights:
        raise ValueError(
            "the weights have fc_norm, which normalises the pooled patches, and no norm, which normalises tokens: "
            "RegisterViT has the latter alone and would give other features"
        )
    names = vit.without(_HEADS)
    if "dist_token" in names:
        names["cls_token"] = torch.cat((names["cls_token"], names.pop("dist_token")), dim=1)
    if "blocks.0.gamma_1" in names and "reg_token" in names and "pos_embed" not in names:
        return infer_config(
            renamed(names, _EVA_RULES), num_heads=num_heads, head_dims=_DINOV3_HEAD_DIMS, rope_base=100.0, eps=1e-5
        )
    return infer_config(renamed(names, _RULES), num_heads=num_heads, head_dims=_HEAD_DIMS, eps=1e-6)


def residual_stream(model: nn.Module) -> ResidualStream | None:
    """The blocks of a ``VisionTransformer`` or ``Eva``; None of anything else."""
    if not derives_from(model, "timm", "VisionTransformer", "Eva"):
        return None
    registers = 0 if model.reg_token is None else model.reg_token.shape[1]
    layout = TokenLayout(num_registers=registers, num_cls_tokens=model.num_prefix_tokens - registers)
    return ResidualStream(named("blocks", model.blocks), layout)


LIBRARY = Library("timm", residual_stream, convert)
