"""Modules with the interface of DINOv3's, which is no installable package, written anew: names, attributes, parameters
and what is computed are those of facebookresearch/dinov3, its layers and ``models/vision_transformer.py``. Attention is
the plain formula, the accuracy rule's eager one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tests.integrations.patching.dinov2_like import LayerScale


class LinearKMaskedBias(nn.Linear):
    """A packed projection whose key bias counts as zero, by a buffer that a checkpoint fills."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_buffer("bias_mask", torch.full_like(self.bias, math.nan))

    def forward(self, input):
        return nn.functional.linear(input, self.weight, self.bias * self.bias_mask)


class SelfAttention(nn.Module):
    def __init__(
        self,
        dim,
        num_heads=8,
        qkv_bias=False,
        proj_bias=True,
        attn_drop=0.0,
        proj_drop=0.0,
        mask_k_bias=False,
        device=None,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = (LinearKMaskedBias if mask_k_bias else nn.Linear)(dim, 3 * dim, bias=qkv_bias, device=device)
        self.attn_drop = nn.Dropout(attn_drop)  # which nothing calls
        self.proj = nn.Linear(dim, dim, bias=proj_bias, device=device)
        self.proj_drop = nn.Dropout(proj_drop)

    def apply_rope(self, q, k, rope):
        """In the rotation's dtype, to which the prefix is rounded as well."""
        sin, cos = rope

        def turned(x):
            rounded = x.to(sin.dtype)
            prefix, patches = rounded.split([x.shape[2] - sin.shape[-2], sin.shape[-2]], dim=2)
            half = patches.shape[-1] // 2
            partner = patches.roll(half, -1) * torch.tensor([-1, 1]).repeat_interleave(half)
            return torch.cat((prefix, patches * cos + partner * sin), dim=2).to(x.dtype)

        return turned(q), turned(k)

    def forward(self, x: Tensor, attn_bias=None, rope=None) -> Tensor:
        return self.proj_drop(self.proj(self.compute_attention(qkv=self.qkv(x), attn_bias=attn_bias, rope=rope)))

    def forward_list(self, x_list, attn_bias=None, rope_list=None) -> list[Tensor]:
        tokens = [x.shape[0] * x.shape[1] for x in x_list]
        projected = self.qkv(torch.cat([x.flatten(0, 1) for x in x_list])).split(tokens)
        attended = [
            self.compute_attention(qkv.view(*x.shape[:2], -1), attn_bias=attn_bias, rope=rope)
            for qkv, x, rope in zip(projected, x_list, rope_list, strict=True)
        ]
        flat = self.proj(torch.cat([x.flatten(0, 1) for x in attended])).split(tokens)
        return [rows.view_as(x) for rows, x in zip(flat, x_list, strict=True)]

    def compute_attention(self, qkv: Tensor, attn_bias=None, rope=None) -> Tensor:
        assert attn_bias is None
        heads = qkv.unflatten(-1, (3, self.num_heads, -1))
        query, key, value = (heads[:, :, i].transpose(1, 2) for i in range(3))
        if rope is not None:
            query, key = self.apply_rope(query, key, rope)
        weights = (query @ key.mT * self.scale).softmax(-1)
        return (weights @ value).transpose(1, 2).flatten(2)


class CausalSelfAttention(nn.Module):
    def __init__(self, dim, num_heads=8):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)

    def forward(self, x, is_causal=True):
        raise NotImplementedError


class SwiGLUFFN(nn.Module):
    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.w1, self.w2 = nn.Linear(dim, hidden_dim), nn.Linear(dim, hidden_dim)
        self.w3 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(nn.functional.silu(self.w1(x)) * self.w2(x))


class SelfAttentionBlock(nn.Module):
    """Takes a batch, or a list of batches; while it trains, each branch is computed for a part of the images."""

    def __init__(self, dim, num_heads, drop_path=0.0, init_values=None, **options):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = SelfAttention(dim, num_heads, **options)
        self.ls1 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = SwiGLUFFN(dim, 2 * dim)
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.sample_drop_ratio = drop_path

    def forward(self, x_or_x_list, rope_or_rope_list=None):
        if isinstance(x_or_x_list, Tensor):
            return self([x_or_x_list], [rope_or_rope_list])[0]
        x_list, ropes = x_or_x_list, rope_or_rope_list or [None] * len(x_or_x_list)
        if not (self.training and self.sample_drop_ratio):
            x_list = [x + self.ls1(self.attn(self.norm1(x), rope=rope)) for x, rope in zip(x_list, ropes, strict=True)]
            return [x + self.ls2(self.mlp(self.norm2(x))) for x in x_list]
        kept, parts = self._parts(x_list)
        ropes = [
            rope and tuple(part[rows] if part.ndim == 4 else part for part in rope)
            for rope, rows in zip(ropes, kept, strict=True)
        ]
        attended = self.attn.forward_list([self.norm1(part) for part in parts], rope_list=ropes)
        x_list = self._added(x_list, kept, [self.ls1(residual) for residual in attended])
        kept, parts = self._parts(x_list)
        return self._added(x_list, kept, [self.ls2(self.mlp(self.norm2(part))) for part in parts])

    def _parts(self, x_list):
        share = 1 - self.sample_drop_ratio
        kept = [torch.randperm(len(x))[: max(int(len(x) * share), 1)] for x in x_list]
        return kept, [x[rows] for x, rows in zip(x_list, kept, strict=True)]

    @staticmethod
    def _added(x_list, kept, residuals):
        return [
            x.index_add(0, rows, residual, alpha=len(x) / len(rows))
            for x, rows, residual in zip(x_list, kept, residuals, strict=True)
        ]


class PatchEmbed(nn.Module):
    """Gives a map of the grid, C last."""

    def __init__(self, patch_size, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, patch_size, patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).permute(0, 2, 3, 1)


class RopePositionEmbedding(nn.Module):
    """Sines and cosines of the patches' places, ``[M, D]``."""

    def __init__(self, head_dim):
        super().__init__()
        self.register_buffer("periods", 100.0 ** (torch.arange(head_dim // 4) * 4 / head_dim))

    def forward(self, *, H: int, W: int) -> tuple[Tensor, Tensor]:
        axes = [(torch.arange(n, dtype=self.periods.dtype) + 0.5) / n * 2 - 1 for n in (H, W)]
        places = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
        angles = (2 * math.pi * places[:, :, None] / self.periods).flatten(1).tile(2)
        return angles.sin(), angles.cos()


class DinoVisionTransformer(nn.Module):
    def __init__(self, blocks, n_storage_tokens, patch_size=14):
        super().__init__()
        dim, heads = blocks[0].norm1.weight.shape[0], blocks[0].attn.num_heads
        self.patch_embed = PatchEmbed(patch_size, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.n_storage_tokens = n_storage_tokens
        if n_storage_tokens:
            self.storage_tokens = nn.Parameter(torch.zeros(1, n_storage_tokens, dim))
        self.rope_embed = RopePositionEmbedding(dim // heads)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim)
        self.chunked_blocks = False

    def forward_features(self, x: Tensor) -> dict[str, Tensor]:
        patches = self.patch_embed(x)
        prefix = [self.cls_token, self.storage_tokens] if self.n_storage_tokens else [self.cls_token]
        x = [torch.cat([*(token.expand(len(x), -1, -1) for token in prefix), patches.flatten(1, 2)], dim=1)]
        for block in self.blocks:
            x = block(x, [self.rope_embed(H=patches.shape[1], W=patches.shape[2])])
        x = self.norm(x[0])
        return {"x_norm_clstoken": x[:, 0], "x_norm_patchtokens": x[:, 1 + self.n_storage_tokens :]}

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_features(x)["x_norm_clstoken"]
