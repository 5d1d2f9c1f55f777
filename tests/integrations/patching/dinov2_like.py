"""Modules with the interface of DINOv2's, which is no installable package, written anew: names, attributes, parameters
and what is computed are those of facebookresearch/dinov2, its layers and ``models/vision_transformer.py``, and of
xformers' ``BlockDiagonalMask``. Attention is the plain formula, the accuracy rule's eager one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """As of 2025; before that ``attn_drop`` was a module, and there was no ``is_causal``."""

    def __init__(self, dim, num_heads=8, qkv_bias=False, proj_bias=True, attn_drop=0.0, proj_drop=0.0):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.attn_drop = attn_drop
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, is_causal: bool = False) -> Tensor:
        tokens = x.shape[1]
        allowed = torch.ones(tokens, tokens, dtype=torch.bool)
        return self._attend(x, allowed.tril() if is_causal else allowed)

    def _attend(self, x, allowed):
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = (heads[:, :, i].transpose(1, 2) for i in range(3))
        logits = (query * self.scale) @ key.mT
        weights = torch.where(allowed, logits, -torch.inf).softmax(-1)
        if isinstance(self.attn_drop, nn.Module):
            weights = self.attn_drop(weights)
        else:
            weights = nn.functional.dropout(weights, self.attn_drop, self.training)
        return self.proj_drop(self.proj((weights @ value).transpose(1, 2).flatten(2)))


class MemEffAttention(Attention):
    def forward(self, x: Tensor, attn_bias=None) -> Tensor:
        if attn_bias is None:
            return super().forward(x)
        return self._attend(x, attn_bias.materialize(x.shape[1]))


@dataclass
class SeqLenInfo:
    seqstart: Tensor
    max_seqlen: int
    seqstart_py: list[int]


class BlockDiagonalMask:
    def __init__(self, lengths):
        ends = torch.tensor([0, *lengths]).cumsum(0)
        self.q_seqinfo = SeqLenInfo(ends.to(torch.int32), max(lengths), ends.tolist())
        self.k_seqinfo = SeqLenInfo(ends.to(torch.int32), max(lengths), ends.tolist())

    def materialize(self, tokens):
        image = torch.bucketize(torch.arange(tokens), self.q_seqinfo.seqstart[1:], right=True)
        return image[:, None] == image


class BlockDiagonalCausalMask(BlockDiagonalMask):
    def materialize(self, tokens):
        return super().materialize(tokens).tril()


class Mlp(nn.Module):
    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden_dim), nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class SwiGLUFFN(nn.Module):
    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.w12, self.w3 = nn.Linear(dim, 2 * hidden_dim), nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(nn.functional.silu(gate) * value)


class LayerScale(nn.Module):
    def __init__(self, dim, init_values):
        super().__init__()
        self.inplace = False
        self.gamma = nn.Parameter(torch.full((dim,), init_values))

    def forward(self, x):
        return x * self.gamma


class Block(nn.Module):
    """Takes a batch; while it trains, each branch is computed for a part of the images."""

    def __init__(
        self,
        dim,
        num_heads,
        drop_path=0.0,
        attn_class=MemEffAttention,
        init_values=None,
        ffn_layer=Mlp,
        mlp_ratio=2,
        norm_layer=nn.LayerNorm,
        **options,
    ):
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = attn_class(dim, num_heads, **options)
        self.ls1 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = ffn_layer(dim, mlp_ratio * dim)
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.sample_drop_ratio = drop_path

    def forward(self, x):
        (x,) = self._add([x], lambda x, mask: self.ls1(self.attn(self.norm1(x))), pack=False)
        (x,) = self._add([x], lambda x, mask: self.ls2(self.mlp(self.norm2(x))), pack=False)
        return x

    def _add(self, x_list, branch, pack=True):
        kept = [torch.arange(len(x)) for x in x_list]
        if self.training and self.sample_drop_ratio:
            kept = [torch.randperm(len(x))[: max(int(len(x) * (1 - self.sample_drop_ratio)), 1)] for x in x_list]
        parts = [x[rows] for x, rows in zip(x_list, kept, strict=True)]
        if pack:
            mask = BlockDiagonalMask([part.shape[1] for part in parts for _ in part])
            packed = branch(torch.cat([part.flatten(0, 1) for part in parts])[None], mask)
            flat = packed[0].split([part.shape[0] * part.shape[1] for part in parts])
            residuals = [rows.view_as(part) for rows, part in zip(flat, parts, strict=True)]
        else:
            residuals = [branch(parts[0], None)]
        return [
            x.index_add(0, rows, residual.to(x.dtype), alpha=len(x) / len(rows))
            for x, rows, residual in zip(x_list, kept, residuals, strict=True)
        ]


class NestedTensorBlock(Block):
    """Takes a list of batches, too."""

    def forward(self, x_or_x_list):
        if isinstance(x_or_x_list, list):
            x_list = self._add(x_or_x_list, lambda x, mask: self.ls1(self.attn(self.norm1(x), attn_bias=mask)))
            return self._add(x_list, lambda x, mask: self.ls2(self.mlp(self.norm2(x))))
        return super().forward(x_or_x_list)


class PatchEmbed(nn.Module):
    def __init__(self, patch_size, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).mT


class DinoVisionTransformer(nn.Module):
    """For images of ``side`` x ``side`` patches, and others, whose positions are resampled."""

    def __init__(self, blocks, num_register_tokens, patch_size=14, side=4):
        super().__init__()
        dim = blocks[0].norm1.weight.shape[0]
        self.patch_embed = PatchEmbed(patch_size, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side * side, dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, num_register_tokens, dim)) if num_register_tokens else None
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim, eps=blocks[0].norm1.eps)
        self.num_register_tokens, self.patch_size = num_register_tokens, patch_size
        self.chunked_blocks = False

    def prepare_tokens_with_masks(self, x):
        grid = [n // self.patch_size for n in x.shape[2:]]
        x = self.patch_embed(x)
        cls, patches = self.pos_embed.split([1, self.pos_embed.shape[1] - 1], dim=1)
        side = round(patches.shape[1] ** 0.5)
        patches = nn.functional.interpolate(patches.mT.unflatten(2, (side, side)), grid, mode="bicubic").flatten(2).mT
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), dim=1) + torch.cat((cls, patches), dim=1)
        if self.register_tokens is None:
            return x
        return torch.cat((x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]), dim=1)

    def forward_features(self, x: Tensor) -> dict[str, Tensor]:
        x = self.prepare_tokens_with_masks(x)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return {"x_norm_clstoken": x[:, 0], "x_norm_patchtokens": x[:, 1 + self.num_register_tokens :]}

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_features(x)["x_norm_clstoken"]
