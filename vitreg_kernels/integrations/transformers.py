"""Hugging Face transformers: Dinov2, Dinov2WithRegisters, DINOv3ViT and ViT."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..layout import TokenLayout
from ..nn.config import ViTConfig
from .library import Library, ResidualStream, derives_from, named
from .state_dict import backbone, infer_config, renamed

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
_CLASSES = tuple(
    f"{model}{kind}"
    for model in ("Dinov2", "Dinov2WithRegisters", "DINOv3ViT", "ViT")
    for kind in ("Model", "Backbone")
)


def convert(
    weights: Mapping[str, Tensor], *, num_heads: int | None = None
) -> tuple[ViTConfig, dict[str, Tensor]] | None:
    """``RegisterViT``'s configuration and weights, or None if these are not of transformers.

    Names of versions 4 and 5 alike. ``Dinov2WithRegisters`` resamples positions with antialiasing and the others
    without; the epsilons are those of each model's default configuration.

    Args:
        weights: a state dict, the names with any prefix.
        num_heads: H, where it is not the published model's of that width.

    Raises:
        ValueError: if sizes cannot be told from the shapes.
    """
    vit = backbone(weights, r"embeddings\.patch_embeddings(?:\.projection)?\.weight")
    if vit is None:
        return None
    names = vit.without(("pooler", "classifier"), unused=("embeddings.mask_token",))
    dinov3 = "embeddings.patch_embeddings.weight" in names
    plain_vit = any(".layernorm_before." in name for name in names)
    gated = any(".gate_proj." in name for name in names)
    names = renamed(names, _GATED_RULES if gated else _PLAIN_RULES)
    if dinov3:
        return infer_config(names, num_heads=num_heads, head_dims={4096: 128}, rope_base=100.0, eps=1e-5)
    antialias = "register_tokens" in names
    if plain_vit:
        return infer_config(names, num_heads=num_heads, head_dims={1280: 80}, antialias=antialias, eps=1e-12)
    return infer_config(names, num_heads=num_heads, head_dims={}, antialias=antialias, eps=1e-6)


def residual_stream(model: nn.Module) -> ResidualStream | None:
    """The layers of one of the models, or of its ``Backbone``; None of anything else."""
    if not derives_from(model, "transformers", *_CLASSES):
        return None
    registers = getattr(model.embeddings, "register_tokens", None)
    layout = TokenLayout(num_registers=0 if registers is None else registers.shape[1])
    modules = dict(model.named_modules())
    # As of version 5 or 4: encoder.layer is kept or is layers, layer is model.layer.
    path = next(path for path in ("layers", "encoder.layer", "model.layer", "layer") if path in modules)
    return ResidualStream(named(path, modules[path]), layout)


LIBRARY = Library("transformers", residual_stream, convert)
