"""DINOv3's own models and files (https://github.com/facebookresearch/dinov3)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..layout import TokenLayout
from .attention import dinov3 as attention
from .blocks import dino as blocks
from .library import Converted, Library, ResidualStream
from .modules import derives_from, named
from .state_dict import PATCH_EMBED, backbone, converted, renamed

_RULES = (
    (r"^storage_tokens$", "register_tokens"),
    (r"\.mlp\.w1\.(\w+)$", r".mlp.fc1.\1#0"),
    (r"\.mlp\.w2\.(\w+)$", r".mlp.fc1.\1#1"),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)
_PERIODS = "rope_embed.periods"


def convert(weights: Mapping[str, Tensor]) -> Converted | None:
    """A state dict of a ``DinoVisionTransformer``, or None if these weights are not DINOv3's.

    They are told by the periods of the rotation, which also tell its base and the number of heads. The norms' epsilon
    is that of the published models; DINOv3's code knows another.

    The published files hold those periods rounded to bf16; ``RegisterViT`` computes them from their base, as timm and
    transformers do, so an angle may differ by 1 part in 500.

    Args:
        weights: a state dict, the names with any prefix; a training checkpoint's teacher is taken.

    Raises:
        ValueError: if sizes cannot be told from the shapes, or the periods are no powers of one base.
    """
    vit = backbone(weights, PATCH_EMBED)
    if vit is None or _PERIODS not in vit.weights:
        return None
    periods = vit.weights[_PERIODS]
    # The norm of local crops' CLS tokens is used in training alone.
    names, left_out = vit.without(("head",), unused=("mask_token", "local_cls_norm", _PERIODS))
    for mask in [name for name in names if name.endswith(".bias_mask")]:
        bias = mask.removesuffix("_mask")
        names[bias] = names[bias] * names.pop(mask)  # 0 for the keys
    dim = names["patch_embed.proj.weight"].shape[0]
    return converted(
        renamed(names, _RULES),
        left_out,
        rope=True,
        told={"num_heads": dim // (4 * len(periods)), "rope_base": _base_of(periods)},
        fixed={},
        assumed={"eps": 1e-5},
        activation_assumed=False,
    )


def _base_of(periods: Tensor) -> float:
    """The base of ``periods[i] = base^(i / n)`` to two digits, which is what bf16 leaves of it."""
    periods = periods.double()
    n = len(periods)
    base = float(f"{periods[-1].item() ** (n / max(n - 1, 1)):.2g}")
    expected = base ** (torch.arange(n, dtype=torch.float64, device=periods.device) / n)
    if not torch.allclose(periods, expected, rtol=2**-8, atol=0.0):
        raise ValueError(f"{_PERIODS} must be powers of one base, not {[round(p, 3) for p in periods.tolist()]}")
    return base


def prefix_tokens(model: nn.Module) -> int | None:
    """The prefix of a ``DinoVisionTransformer``: a CLS token and the registers; None of anything else."""
    return 1 + model.n_storage_tokens if _is_ours(model) else None


def _is_ours(model: nn.Module) -> bool:
    return derives_from(model, None, "DinoVisionTransformer") and hasattr(model, "n_storage_tokens")


def residual_stream(model: nn.Module) -> ResidualStream | None:
    """The blocks of a ``DinoVisionTransformer``; None of anything else.

    These take and give lists, one tensor for each size of crop.
    """
    if not _is_ours(model):
        return None
    layout, layers = TokenLayout(num_registers=model.n_storage_tokens), named("blocks", model.blocks)
    return ResidualStream.of_blocks(layout, layers, patch_embed=model.patch_embed, norm=model.norm)


LIBRARY = Library(
    "dinov3",
    residual_stream,
    convert,
    attention=attention.KINDS,
    blocks=blocks.DINOV3,
    prefix_tokens=prefix_tokens,
)
