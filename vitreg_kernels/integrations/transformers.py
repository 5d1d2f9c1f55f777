"""Hugging Face transformers. Checkpoints and residual streams of Dinov2, Dinov2WithRegisters, DINOv3ViT and ViT, and
the residual streams of DeiT and of CLIP's and SigLIP's vision models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..layout import TokenLayout
from .attention import transformers as attention
from .attention.transformers_prefix import prefix_tokens
from .blocks import transformers as blocks
from .library import Converted, Library, ResidualStream
from .modules import derives_from, first_of, named
from .state_dict import HUGGING_FACE_PATCH_EMBED, backbone, converted, renamed

_RULES = (
    (r"^embeddings\.patch_embeddings(\.projection)?\.", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.", ""),
    (r"^layernorm\.", "norm."),
    (r"^(model\.|encoder\.)?layers?\.(\d+)\.", r"blocks.\2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.attention\.(attention\.query|q_proj)\.(\w+)$", r".attn.qkv.\2#0"),
    (r"\.attention\.(attention\.key|k_proj)\.(\w+)$", r".attn.qkv.\2#1"),
    (r"\.attention\.(attention\.value|v_proj)\.(\w+)$", r".attn.qkv.\2#2"),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.(intermediate\.dense|mlp\.weights_in)\.", ".mlp.fc1."),
    (r"\.(output\.dense|mlp\.weights_out|mlp\.down_proj)\.", ".mlp.fc2."),
)
_PLAIN_RULES = (*_RULES, (r"\.mlp\.up_proj\.", ".mlp.fc1."))
_GATED_RULES = (
    *_RULES,
    (r"\.mlp\.gate_proj\.(\w+)$", r".mlp.fc1.\1#0"),
    (r"\.mlp\.up_proj\.(\w+)$", r".mlp.fc1.\1#1"),
)
_CLASSES = (
    *(
        f"{model}{kind}"
        for model in ("Dinov2", "Dinov2WithRegisters", "DINOv3ViT", "ViT")
        for kind in ("Model", "Backbone")
    ),
    "DeiTModel",
    # The first releases of version 5 have the second of each pair within the first.
    *("CLIPVisionModel", "CLIPVisionTransformer", "SiglipVisionModel", "SiglipVisionTransformer"),
)
_CLS_TOKENS = ("cls_token", "distillation_token", "class_embedding")

# Keys of config.json and the fields of ``ViTConfig`` that they are; of sizes those that transformers needs to agree.
_KEYS = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "num_channels": "in_channels",
    "hidden_size": "dim",
    "num_hidden_layers": "depth",
    "num_attention_heads": "num_heads",
    "num_register_tokens": "num_registers",
    "layer_norm_eps": "eps",
    "rope_theta": "rope_base",
    "qkv_bias": "qkv_bias",
    "proj_bias": "proj_bias",
}
_MODEL_TYPES = ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit")
# The switch of each model's gated MLP, if it has one. Dinov2's gate is SiLU, whatever hidden_act says.
_GATES = {"dinov2": "use_swiglu_ffn", "dinov2_with_registers": "use_swiglu_ffn", "dinov3_vit": "use_gated_mlp"}


def convert(weights: Mapping[str, Tensor]) -> Converted | None:
    """A state dict of one of the models, or None if these weights are not of transformers.

    Names of versions 4 and 5 alike. ``Dinov2WithRegisters`` resamples positions with antialiasing and the others
    without, which is assumed of ``ViT``: others, as ``DPT``, have its names and resample otherwise. The epsilons
    assumed are those of each model's default configuration. ``Dinov2`` takes any position rows for those of a square
    grid; ``ViT`` does so only where it resamples them.

    Args:
        weights: a state dict, the names with any prefix.

    Raises:
        ValueError: if sizes cannot be told from the shapes.
    """
    vit = backbone(weights, HUGGING_FACE_PATCH_EMBED)
    if vit is None:
        return None
    names, left_out = vit.without(("pooler", "classifier"), unused=("embeddings.mask_token",))
    dinov3 = "embeddings.patch_embeddings.weight" in names
    plain_vit = any(".layernorm_before." in name for name in names)
    gated = any(".gate_proj." in name for name in names)
    names = renamed(names, _GATED_RULES if gated else _PLAIN_RULES)
    if dinov3:
        assumed = {"rope_base": 100.0, "eps": 1e-5}
        return converted(names, left_out, head_dims={4096: 128}, rope=True, fixed={}, assumed=assumed)
    resampling = {"antialias": "register_tokens" in names, "interpolate_offset": 0.0}
    return converted(
        names,
        left_out,
        head_dims={1280: 80} if plain_vit else None,
        fixed={"position_rows": "cls", **({} if plain_vit else resampling)},
        assumed={"eps": 1e-12, **resampling} if plain_vit else {"eps": 1e-6},
        # Dinov2's gate is SiLU in any case.
        activation_assumed=plain_vit or not any(".mlp.weights_in." in name for name in vit.weights),
        square=not plain_vit,
    )


def describe(config: Mapping[str, Any], found: Converted) -> dict[str, Any]:
    """What the ``config.json`` of a folder of transformers tells.

    Args:
        config: that file.
        found: the weights.

    Raises:
        ValueError: if it is of another model than the weights, names an activation that ``RegisterViT`` does not
            compute, or the weights are quantised.
    """
    kind = config.get("model_type")
    if kind not in _MODEL_TYPES:
        raise ValueError(f"config.json says model_type={kind!r}, and RegisterViT computes {', '.join(_MODEL_TYPES)}")
    if kind not in (ours := _kinds(found)):
        raise ValueError(f"config.json says model_type={kind!r}, and the weights are of {' or '.join(ours)}")
    if config.get("quantization_config") is not None:
        raise ValueError("config.json says that the weights are quantised: give them unquantised")
    fields = {field: config[key] for key, field in _KEYS.items() if config.get(key) is not None}
    if kind == "vit":
        fields |= {"antialias": False, "interpolate_offset": 0.0}
    if not kind.startswith("dinov2"):
        fields |= {"hidden_dim": config["intermediate_size"]} if config.get("intermediate_size") is not None else {}
    else:
        fields.pop("image_size", None)  # their code never looks at it again
    gated = bool(config.get(_GATES.get(kind)))
    if gated and kind.startswith("dinov2"):
        return {**fields, "mlp": "swiglu"}
    activation, computed = config.get("hidden_act"), "silu" if gated else "gelu"
    if activation is not None:
        if activation != computed:
            raise ValueError(f"config.json says hidden_act={activation!r}, and RegisterViT computes {computed!r} there")
        fields["mlp"] = "swiglu" if gated else "gelu"
    return fields


def _kinds(found: Converted) -> tuple[str, ...]:
    """The models that have such weights, as ``config.json`` names them."""
    if found.told["position"] == "rope":
        return ("dinov3_vit",)
    if not found.square:
        return ("vit",)
    return ("dinov2_with_registers",) if found.told["num_registers"] else ("dinov2", "dinov2_with_registers")


def residual_stream(model: nn.Module) -> ResidualStream | None:
    """The layers of one of the models, or of its ``Backbone``; None of anything else."""
    if not derives_from(model, "transformers", *_CLASSES) or not hasattr(model, "embeddings"):
        return None
    embeddings = model.embeddings
    registers = getattr(embeddings, "register_tokens", None)
    layout = TokenLayout(
        num_registers=0 if registers is None else registers.shape[1],
        num_cls_tokens=sum(hasattr(embeddings, name) for name in _CLS_TOKENS),
    )
    modules = dict(model.named_modules())
    # As of version 5 or 4: encoder.layer is kept or is layers, layer is model.layer.
    paths = ("layers", "encoder.layer", "encoder.layers", "model.layer", "layer")
    path = next(path for path in paths if path in modules)
    return ResidualStream.of_blocks(
        layout,
        named(path, modules[path]),
        patch_embed=first_of(embeddings, "patch_embeddings", "patch_embedding"),
        norm=first_of(model, "layernorm", "norm", "post_layernorm"),
        neurons=("mlp.fc2", "mlp.weights_out", "mlp.down_proj", "output.dense"),
    )


LIBRARY = Library("transformers", residual_stream, convert, describe, attention.KINDS, blocks.KINDS, prefix_tokens)
