"""The sizes and choices that make a Vision Transformer, and the well-known ones by name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

from ..layout import TokenLayout


@dataclass(frozen=True)
class ViTConfig:
    """A pre-norm Vision Transformer over ``[CLS | registers | patches]``.

    Attributes:
        image_size: in pixels, of the images the position embedding is made for: an int for square ones, a tuple of
            height and width for others; images of other sizes are served by resampling it. Multiples of ``patch_size``.
        patch_size: side of a patch in pixels.
        in_channels: channels of an image.
        dim: C, channels of a token; a multiple of ``num_heads``.
        depth: number of blocks.
        num_heads: H.
        num_registers: R, 0 to 16 in Darcet et al. (arXiv 2309.16588).
        num_cls_tokens: K; two with a distillation token, none in a pooled model.
        mlp: ``"gelu"``, two linear layers and the exact GELU; or ``"swiglu"`` (Shazeer, arXiv 2002.05202).
        hidden_dim: channels between the two linear layers of an MLP; ``None`` for ``4 * dim``.
        qkv_bias, proj_bias: whether attention's projections have a bias.
        qk_norm: LayerNorm of queries and keys, head by head.
        layer_scale: initial value of LayerScale's factors (Touvron et al., arXiv 2103.17239); ``None`` for no
            LayerScale.
        drop_path: stochastic depth (Huang et al., arXiv 1603.09382): probability that a branch of the last block
            leaves an image out, rising linearly from 0 in the first block; in training only.
        attn_drop: dropout of attention weights, in training only.
        proj_drop: dropout after attention's projection and both linear layers of an MLP, in training only.
        eps: of every LayerNorm.
        position: ``"absolute"``, a learnt row a token, or ``"rope"``, DINOv3's rotation of queries and keys.
        position_rows: which tokens have a row of the absolute embedding: ``"patches"`` (timm's ``no_embed_class``),
            ``"cls"`` (CLS and patches; DINOv2, Hugging Face) or ``"prefix"`` (registers too).
        antialias: whether the absolute embedding is resampled with an antialiasing filter.
        interpolate_offset: added to the rows and columns before the scale of that resampling is taken: 0.1 in DINOv2
            models without registers, 0 elsewhere.
        rope_base: longest period of the rotation, as a multiple of half an image.

    Raises:
        ValueError: if a value is of another type or out of range, or two do not fit together.
    """

    image_size: int | tuple[int, int] = 224
    patch_size: int = 14
    in_channels: int = 3
    dim: int = 384
    depth: int = 12
    num_heads: int = 6
    num_registers: int = 4
    num_cls_tokens: int = 1
    mlp: Literal["gelu", "swiglu"] = "gelu"
    hidden_dim: int | None = None
    qkv_bias: bool = True
    proj_bias: bool = True
    qk_norm: bool = False
    layer_scale: float | None = 1e-5
    drop_path: float = 0.0
    attn_drop: float = 0.0
    proj_drop: float = 0.0
    eps: float = 1e-6
    position: Literal["absolute", "rope"] = "absolute"
    position_rows: Literal["patches", "cls", "prefix"] = "patches"
    antialias: bool = True
    interpolate_offset: float = 0.0
    rope_base: float = 100.0

    def __post_init__(self) -> None:
        for name in ("patch_size", "in_channels", "dim", "depth", "num_heads", "hidden_dim"):
            value = getattr(self, name)
            if name == "hidden_dim" and value is None:
                continue
            if not is_positive_int(value):
                raise ValueError(f"{name} must be a positive int, not {value!r}")
        sides = self.image_size if isinstance(self.image_size, tuple) else (self.image_size,) * 2
        if len(sides) != 2 or not all(map(is_positive_int, sides)):
            raise ValueError(
                f"image_size must be a positive int, or a tuple of two, height and width, not {self.image_size!r}"
            )
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, not {getattr(self, name)!r}")
        for name in ("drop_path", "attn_drop", "proj_drop"):
            value = getattr(self, name)
            if not (_is_finite(value) and 0.0 <= value < 1.0):
                raise ValueError(f"{name} must be at least 0 and below 1, not {value!r}")
        for name in ("qkv_bias", "proj_bias", "qk_norm", "antialias"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, not {getattr(self, name)!r}")
        for name in ("eps", "rope_base"):
            value = getattr(self, name)
            if not (_is_finite(value) and value > 0):
                raise ValueError(f"{name} must be a positive finite number, not {value!r}")
        if not (_is_finite(self.interpolate_offset) and self.interpolate_offset >= 0):
            raise ValueError(
                f"interpolate_offset must be a finite number of at least 0, not {self.interpolate_offset!r}"
            )
        if self.layer_scale is not None and not _is_finite(self.layer_scale):
            raise ValueError(f"layer_scale must be a finite number or None, not {self.layer_scale!r}")
        if any(side % self.patch_size for side in sides):
            raise ValueError(f"image_size={self.image_size} must be a multiple of patch_size={self.patch_size}")
        if self.dim % self.num_heads:
            raise ValueError(f"dim={self.dim} must be a multiple of num_heads={self.num_heads}")
        if self.position == "rope" and self.head_dim % 4:
            raise ValueError(
                f"position='rope' needs a head dim that is a multiple of 4, two channels to turn by height and two by "
                f"width, not {self.head_dim}"
            )
        _ = self.layout  # which has its own say about the counts of CLS tokens and registers

    @property
    def head_dim(self) -> int:
        """D = C / H."""
        return self.dim // self.num_heads

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of an image of ``image_size``."""
        height, width = self.image_size if isinstance(self.image_size, tuple) else (self.image_size,) * 2
        return height // self.patch_size, width // self.patch_size

    @property
    def layout(self) -> TokenLayout:
        """The order of the tokens; their number varies with the image."""
        return TokenLayout(num_registers=self.num_registers, num_cls_tokens=self.num_cls_tokens)

    @property
    def num_prefix_rows(self) -> int:
        """Rows of the absolute embedding that belong to CLS tokens and registers; they come first."""
        registers = self.num_registers if self.position_rows == "prefix" else 0
        return 0 if self.position_rows == "patches" else self.num_cls_tokens + registers

    @property
    def num_position_rows(self) -> int:
        """Rows of the absolute embedding, those of the patches of an ``image_size`` image among them."""
        return self.num_prefix_rows + math.prod(self.grid)


def is_positive_int(value: Any) -> bool:
    """Whether a value is an int above 0, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


_CHOICES = {
    "mlp": ("gelu", "swiglu"),
    "position": ("absolute", "rope"),
    "position_rows": ("patches", "cls", "prefix"),
}

_SIZES = {
    "small": {"dim": 384, "depth": 12, "num_heads": 6},
    "base": {"dim": 768, "depth": 12, "num_heads": 12},
    "large": {"dim": 1024, "depth": 24, "num_heads": 16},
    "giant": {"dim": 1536, "depth": 40, "num_heads": 24, "mlp": "swiglu", "hidden_dim": 4096},
    "huge_plus": {"dim": 1280, "depth": 32, "num_heads": 20, "mlp": "swiglu", "hidden_dim": 5120},
    "7b": {"dim": 4096, "depth": 40, "num_heads": 32, "mlp": "swiglu", "hidden_dim": 8192, "qkv_bias": False},
}
_SIZES["small_plus"] = {**_SIZES["small"], "mlp": "swiglu", "hidden_dim": 1536}
_DINOV3 = {"patch_size": 16, "position": "rope", "eps": 1e-5}

PRESETS: dict[str, ViTConfig] = {
    **{f"vit_{size}_patch14": ViTConfig(**_SIZES[size]) for size in ("small", "base", "large", "giant")},
    **{
        f"vit_{size}_patch16": ViTConfig(patch_size=16, layer_scale=None, **_SIZES[size])
        for size in ("small", "base", "large")
    },
    **{
        f"dinov3_{size}_patch16": ViTConfig(**_DINOV3, **_SIZES[size])
        for size in ("small", "small_plus", "base", "large", "huge_plus", "7b")
    },
}
"""Shapes by name: ``vit_*_patch14`` of DINOv2, ``vit_*_patch16`` of the original ViT, ``dinov3_*`` of DINOv3; all with
4 registers and for images of 224 pixels."""
