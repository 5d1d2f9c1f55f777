"""timm's ViT with registers, small enough for tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.timm_vits import import_timm


def vit(**options) -> nn.Module:
    """A small ViT with four registers; LayerScale of 1, since DINOv2's 1e-5 would hide the attention."""
    torch.manual_seed(0)
    options = {"img_size": 56, "depth": 3, "embed_dim": 64, "num_heads": 2, "init_values": 1.0, **options}
    return import_timm().create_model("vit_small_patch14_reg4_dinov2", **options).eval()


def images() -> Tensor:
    """Two of them, 21 tokens each."""
    return torch.randn(2, 3, 56, 56)
