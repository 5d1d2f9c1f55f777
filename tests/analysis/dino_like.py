"""Whole models with the interface of DINOv2's and DINOv3's, whose attention is that of ``tests/integrations/patching``.

Names, attributes, parameters and what is computed are those of their ``models/vision_transformer.py``, written anew.
"""

from __future__ import annotations

import torch
from torch import nn

from tests.integrations.patching import dinov2_like, dinov3_like
from vitreg_kernels.nn.block import LayerScale
from vitreg_kernels.nn.mlp import Mlp
from vitreg_kernels.nn.vit import PatchEmbed


class Block(nn.Module):
    def __init__(self, dim, attn):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = attn, Mlp(dim, 4 * dim)
        self.ls1, self.ls2 = LayerScale(dim, 1.0), LayerScale(dim, 1.0)

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class DinoVisionTransformer(nn.Module):
    """DINOv2's; positions are of its grid of patches, and of the CLS token."""

    def __init__(self, dim, depth, heads, patch, grid, registers=0):
        super().__init__()
        self.num_register_tokens, self.chunked_blocks = registers, False
        self.patch_embed = PatchEmbed(3, dim, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, registers, dim)) if registers else None
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid[0] * grid[1], dim))
        self.blocks = nn.ModuleList(
            Block(dim, dinov2_like.MemEffAttention(dim, heads, qkv_bias=True)) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, images):
        x = self.patch_embed(images)
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1) + self.pos_embed
        if self.register_tokens is not None:
            x = torch.cat((x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]), dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class ListBlock(Block):
    """DINOv3's: of a list of crops, over which the MLP is flattened."""

    def forward(self, x_list, rope_list):
        attended = self.attn.forward_list([self.norm1(x) for x in x_list], rope_list=rope_list)
        x_list = [x + self.ls1(branch) for x, branch in zip(x_list, attended, strict=True)]
        flat = torch.cat([self.norm2(x).flatten(0, 1) for x in x_list])
        branches = self.mlp(flat).split([x.shape[0] * x.shape[1] for x in x_list])
        return [x + self.ls2(branch.view_as(x)) for x, branch in zip(x_list, branches, strict=True)]


class Dinov3(nn.Module):
    """DINOv3's."""

    def __init__(self, dim, depth, heads, patch, registers=0):
        super().__init__()
        self.n_storage_tokens = registers
        self.head_dim = dim // heads
        self.patch_embed = PatchEmbed(3, dim, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.storage_tokens = nn.Parameter(torch.zeros(1, registers, dim))
        self.blocks = nn.ModuleList(
            ListBlock(dim, dinov3_like.SelfAttention(dim, heads, qkv_bias=True)) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, *crops):
        x_list = [
            torch.cat((self.cls_token.expand(len(x), -1, -1), self.storage_tokens.expand(len(x), -1, -1), x), dim=1)
            for x in map(self.patch_embed, crops)
        ]
        rope_list = [self.rope(x.shape[1] - 1 - self.n_storage_tokens) for x in x_list]
        for block in self.blocks:
            x_list = block(x_list, rope_list)
        x_list = [self.norm(x) for x in x_list]
        return x_list[0] if len(x_list) == 1 else x_list

    def rope(self, patches):
        angles = torch.arange(patches)[:, None] * torch.logspace(0, -1, self.head_dim // 2)
        return angles.sin().repeat(1, 2), angles.cos().repeat(1, 2)


Dinov3.__name__ = "DinoVisionTransformer"
