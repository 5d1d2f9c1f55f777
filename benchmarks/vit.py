"""The smallest ViT that runs pretrained weights with vitreg_kernels in every block: pre-norm, LayerScale, GELU.

Tokens are ``[CLS | registers | patches]``, as in Darcet et al. (arXiv 2309.16588): registers come in after the position
embedding and have no position.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.pretrained import REGISTERS, Pretrained
from vitreg_kernels import RegisterAttention, RegisterTokens, TokenLayout


class Features(NamedTuple):
    """What a ViT makes of ``B`` images.

    Attributes:
        tokens: ``[B, N, C]``, the residual stream after the last block, before the final LayerNorm: where token norms
            are read, because that LayerNorm hides them.
        normalized: ``[B, N, C]``, the same after the final LayerNorm: the features that people use.
        prefix_attention: ``[B, H, P, N]`` fp32, attention of the CLS and register queries in the last block, or None.
    """

    tokens: Tensor
    normalized: Tensor
    prefix_attention: Tensor | None


class LayerScale(nn.Module):
    """A learnt factor a channel (Touvron et al., arXiv 2103.17239)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """``[..., C]`` to the same."""
        return x * self.gamma


class Mlp(nn.Module):
    """Two linear layers and the exact GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., C]`` to the same."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """``x + ls1(attn(norm1(x)))``, then ``x + ls2(mlp(norm2(x)))``."""

    def __init__(self, dim: int, num_heads: int, hidden: int, num_registers: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = RegisterAttention(dim, num_heads, num_registers=num_registers)
        self.ls1 = LayerScale(dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, hidden)
        self.ls2 = LayerScale(dim)

    def forward(self, x: Tensor, outputs: tuple[str, ...] = ()) -> tuple[Tensor, Tensor | None]:
        """``[B, N, C]`` to the same, and the attention of the prefix tokens if ``outputs`` names it."""
        branch = self.attn(self.norm1(x), outputs=outputs)
        branch, statistics = branch if outputs else (branch, None)
        x = x + self.ls1(branch)
        x = x + self.ls2(self.mlp(self.norm2(x)))
        return x, statistics.prefix_attention if outputs else None


class ViT(nn.Module):
    """A pretrained ViT, in eval mode; every size is read off the shapes of its weights.

    Raises:
        ValueError: if the weights are not those of a plain pre-norm ViT with LayerScale.
    """

    def __init__(self, pretrained: Pretrained) -> None:
        super().__init__()
        weights = pretrained.weights
        dim, channels, patch, _ = weights["patch_embed.weight"].shape
        hidden = weights["blocks.0.mlp.fc1.weight"].shape[0]
        depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
        self.antialias = pretrained.antialias
        num_registers = weights[REGISTERS].shape[1] if REGISTERS in weights else 0

        self.patch_embed = nn.Conv2d(channels, dim, patch, stride=patch)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty_like(weights["pos_embed"]))
        self.registers = RegisterTokens(dim, num_registers)
        self.blocks = nn.ModuleList(Block(dim, pretrained.num_heads, hidden, num_registers) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        missing, unexpected = self.load_state_dict(weights, strict=False)
        if missing or unexpected:
            raise ValueError(
                f"{pretrained.name} must be a plain pre-norm ViT with LayerScale; it lacks {missing[:3]} of this one "
                f"and has {unexpected[:3]} besides"
            )
        self.eval().requires_grad_(False)

    @property
    def layout(self) -> TokenLayout:
        """The order of the tokens."""
        return self.registers.layout

    def set_backend(self, backend: str | None) -> None:
        """Attention of every block by this backend; None picks the fastest."""
        for block in self.blocks:
            block.attn.backend = backend

    def forward(self, images: Tensor, *, prefix_attention: bool = False) -> Features:
        """Features of ``[B, 3, height, width]`` normalised images; sides are multiples of the patch size."""
        patches = self.patch_embed(images)
        patches = (patches + self._positions(patches.shape[-2:])).flatten(2).transpose(1, 2)
        x = self.registers(torch.cat((self.cls_token.expand(len(images), -1, -1), patches), dim=1))
        for block in self.blocks[:-1]:
            x, _ = block(x)
        x, attention = self.blocks[-1](x, ("prefix_attention",) if prefix_attention else ())
        return Features(x, self.norm(x), attention)

    def _positions(self, grid: torch.Size) -> Tensor:
        """The square grid of position rows resampled to this one, ``[1, C, height, width]``."""
        side = math.isqrt(self.pos_embed.shape[1])
        positions = self.pos_embed.transpose(1, 2).unflatten(2, (side, side))
        return F.interpolate(positions, size=tuple(grid), mode="bicubic", antialias=self.antialias)
