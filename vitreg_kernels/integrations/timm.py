"""timm: ``VisionTransformer``, and the DINOv3 models of its ``Eva``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..layout import TokenLayout
from .attention import timm as attention
from .blocks import timm as blocks
from .library import Converted, Library, ResidualStream
from .modules import derives_from, named
from .state_dict import PATCH_EMBED, backbone, converted, renamed

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


# Arguments of timm's classes and the fields of ``ViTConfig`` that they are.
_ARGUMENTS = {
    "img_size": "image_size",
    "patch_size": "patch_size",
    "in_chans": "in_channels",
    "embed_dim": "dim",
    "depth": "depth",
    "num_heads": "num_heads",
    "reg_tokens": "num_registers",
    "num_reg_tokens": "num_registers",
    "rope_temperature": "rope_base",
}
_ACTIVATIONS = {"gelu": "gelu", "swiglu": "silu"}  # of the MLPs of ``ViTConfig``
# Arguments that the weights tell too, that are of heads or training, or of images which ``RegisterViT`` refuses.
# fmt: off
_HARMLESS = (
    "mlp_ratio", "qkv_bias", "qkv_fused", "qk_norm", "proj_bias", "init_values", "attn_only_layer_scale",
    "class_token", "final_norm", "pre_norm", "scale_attn_norm", "scale_mlp_norm", "scale_attn_inner", "scale_mlp",
    "swiglu_mlp", "swiglu_align_to", "use_abs_pos_emb", "use_pre_transformer_norm", "use_post_transformer_norm",
    "num_classes", "global_pool", "pool_include_prefix", "fc_norm", "use_fc_norm", "attn_pool_num_heads",
    "attn_pool_mlp_ratio", "head_init_scale", "drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate",
    "attn_drop_rate", "drop_path_rate", "weight_init", "fix_init", "dynamic_img_size", "dynamic_img_pad",
    "out_indices", "device", "dtype",
)
# fmt: on
# Arguments that change what is computed, and the one value of which ``RegisterViT`` computes it.
_ONLY = {
    "pos_embed": "learn",
    "norm_layer": "layernorm",
    "use_post_norm": False,
    "attn_type": "eva",
    "use_rot_pos_emb": True,
    "rope_type": "dinov3",
    "rope_rotate_half": True,
    "rope_grid_indexing": "ij",
    "rope_grid_offset": 0.0,
}
# Of models that have weights under the same names: post-norm, and ``Eva``'s and BEiT's, which turn queries and keys.
_OTHER_BLOCKS = re.compile("rpn|rope|dinov3|eva02|eva_giant|beit_|beitv2|sapiens2|lingbot|vit_pe_")


def convert(weights: Mapping[str, Tensor]) -> Converted | None:
    """A state dict of a ``VisionTransformer``, or of one of ``Eva``'s DINOv3 models, or None if these are not timm's.

    Much else has the same names: DeiT, MAE, DINO and MoCo v3, and DINOv2's models without a mask token. What is assumed
    is so of timm's published models: ``VisionTransformer`` resamples positions with antialiasing, most others do not.
    A DINOv3 model is told by LayerScale under Eva's names and registers, without a position embedding. Weights do not
    tell in which way Eva's other models turn queries and keys, nor, of some, that they do, nor that norms stand behind
    the branches.

    Args:
        weights: a state dict, the names with any prefix.

    Raises:
        ValueError: if the shapes do not tell the sizes, there is no CLS token, or the final norm comes after pooling.
    """
    vit = backbone(weights, PATCH_EMBED)
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
    names, left_out = vit.without(_HEADS)
    if "dist_token" in names:
        names["cls_token"] = torch.cat((names["cls_token"], names.pop("dist_token")), dim=1)
    if "blocks.0.gamma_1" in names and "reg_token" in names and "pos_embed" not in names:
        return converted(
            renamed(names, _EVA_RULES),
            left_out,
            head_dims=_DINOV3_HEAD_DIMS,
            rope=True,
            fixed={},
            assumed={"position": "rope", "rope_base": 100.0, "eps": 1e-5},
        )
    return converted(
        renamed(names, _RULES),
        left_out,
        head_dims=_HEAD_DIMS,
        fixed={},
        assumed={"eps": 1e-6, "antialias": True, "interpolate_offset": 0.0},
        blocks_assumed=True,
    )


def describe(config: Mapping[str, Any], found: Converted) -> dict[str, Any]:
    """What the ``config.json`` of a folder of timm's tells: the arguments of the model, as far as they are not those
    that its architecture has anyway, and that it is timm which resamples its positions.

    Args:
        config: that file.
        found: the weights.

    Raises:
        ValueError: if the file is not timm's, or names an architecture, an activation or another argument that
            ``RegisterViT`` does not compute.
    """
    told, architecture = found.told, config.get("architecture")
    if not isinstance(architecture, str):
        raise ValueError("config.json, beside weights under timm's names, names no architecture as timm's does")
    rope = told["position"] == "rope"
    if (rope and "dinov3" not in architecture) or (not rope and _OTHER_BLOCKS.search(architecture)):
        raise ValueError(f"config.json says architecture={architecture!r}, whose blocks RegisterViT does not compute")
    arguments, pretrained = (config.get(key) or {} for key in ("model_args", "pretrained_cfg"))
    if not isinstance(arguments, Mapping) or not isinstance(pretrained, Mapping):
        raise ValueError("config.json must have objects for model_args and pretrained_cfg, as timm writes it")
    _check(arguments)
    size = pretrained.get("input_size")
    if pretrained.get("fixed_input_size") and isinstance(size, list):  # then timm takes it for img_size
        arguments = {"img_size": size[1:], **arguments}
    fields = {field: arguments[name] for name, field in _ARGUMENTS.items() if arguments.get(name) is not None}
    fields |= {"antialias": True, "interpolate_offset": 0.0}
    activation = arguments.get("act_layer")
    if activation is not None:
        if activation != _ACTIVATIONS[told["mlp"]]:
            raise ValueError(
                f"config.json says act_layer={activation!r}, and RegisterViT computes {_ACTIVATIONS[told['mlp']]!r} in "
                "an MLP of these shapes"
            )
        fields["mlp"] = told["mlp"]
    if "no_embed_class" in arguments:
        with_prefix = "prefix" if told["num_registers"] else "cls"
        fields["position_rows"] = "patches" if arguments["no_embed_class"] else with_prefix
    return fields


def _check(arguments: Mapping[str, Any]) -> None:
    for name, value in arguments.items():
        if name in _ONLY:
            if value != _ONLY[name] and not (name == "norm_layer" and value is None):
                raise ValueError(f"config.json says {name}={value!r}, and RegisterViT computes {_ONLY[name]!r} alone")
        elif value is not None and name not in (*_ARGUMENTS, *_HARMLESS, "act_layer", "no_embed_class"):
            raise ValueError(f"config.json says {name}={value!r}, which RegisterViT has no place for")


def prefix_tokens(model: nn.Module) -> int | None:
    """The prefix of a ``VisionTransformer``, ``Eva`` or ``NaFlexVit``; None of anything else."""
    if derives_from(model, "timm", "VisionTransformer", "Eva", "NaFlexVit"):
        return model.num_prefix_tokens
    return None


def residual_stream(model: nn.Module) -> ResidualStream | None:
    """The blocks of a ``VisionTransformer`` or ``Eva``; None of anything else."""
    if not derives_from(model, "timm", "VisionTransformer", "Eva"):
        return None
    registers = 0 if model.reg_token is None else model.reg_token.shape[1]
    layout = TokenLayout(num_registers=registers, num_cls_tokens=model.num_prefix_tokens - registers)
    blocks = named("blocks", model.blocks)
    return ResidualStream.of_blocks(layout, blocks, patch_embed=model.patch_embed, norm=model.norm)


LIBRARY = Library("timm", residual_stream, convert, describe, attention.KINDS, blocks.KINDS, prefix_tokens)
