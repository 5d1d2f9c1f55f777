"""Modules with the interface of perception_models', which is no installable package, written anew: names, attributes,
parameters and what is computed are those of facebookresearch/perception_models, ``core/vision_encoder/pe.py`` and
``rope.py``. Attention is the plain formula, the accuracy rule's eager one.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional


class Rope2D:
    """Turns queries and keys. No module; the model sets ``freq``, the angles, before its blocks run."""

    __module__ = "core.vision_encoder.rope"

    def __init__(self, dim, use_cls_token=False):
        self.dim, self.use_cls_token, self.freq = dim, use_cls_token, None

    def update_grid(self, device, height, width):
        rates = 10000.0 ** -(torch.arange(0, self.dim // 2, 2, device=device) / (self.dim // 2))
        ys, xs = torch.meshgrid(*(torch.arange(n, device=device) for n in (height, width)), indexing="ij")
        axes = [(axis.flatten()[:, None] + self.use_cls_token) * rates for axis in (xs, ys)]
        angles = torch.cat(axes, dim=1).repeat_interleave(2, dim=1)
        if self.use_cls_token:
            angles = functional.pad(angles, (0, 0, 1, 0))
        self.freq = angles[None]

    def __call__(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self._turned(q), self._turned(k)

    def _turned(self, x):
        angles = self.freq[:, None]
        turned, rest = x.split([angles.shape[-1], x.shape[-1] - angles.shape[-1]], dim=-1)
        partner = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
        return torch.cat((turned * angles.cos() + partner * angles.sin(), rest), dim=-1).to(x.dtype)


class SelfAttention(nn.Module):
    __module__ = "core.vision_encoder.pe"

    def __init__(self, embed_dim, num_heads, rope=None):
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * embed_dim))
        self.out_proj = nn.Linear(embed_dim, embed_dim)
        self.rope, self.scale = rope, self.head_dim**-0.5

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        projected = functional.linear(x, self.in_proj_weight, self.in_proj_bias)
        query, key, value = projected.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if self.rope:
            query, key = self.rope(query, key)
        attended = (query @ key.mT * self.scale).softmax(-1) @ value
        return functional.linear(attended.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)


class ResidualAttentionBlock(nn.Module):
    __module__ = "core.vision_encoder.pe"

    def __init__(self, dim, heads, rope):
        super().__init__()
        self.attn = SelfAttention(dim, heads, rope)
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        mlp = {"c_fc": nn.Linear(dim, 2 * dim), "gelu": nn.GELU(), "c_proj": nn.Linear(2 * dim, dim)}
        self.mlp = nn.Sequential(OrderedDict(mlp))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), attn_mask=attn_mask)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    __module__ = "core.vision_encoder.pe"

    def __init__(self, width, layers, heads, rope):
        super().__init__()
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(width, heads, rope) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resblocks:
            x = block(x)
        return x


class AttentionPooling(nn.Module):
    __module__ = "core.vision_encoder.pe"

    def __init__(self, embed_dim, num_heads):
        super().__init__()
        self.probe = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.attn = nn.MultiheadAttention(embed_dim, num_heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(self.probe.repeat(len(x), 1, 1), x, x, need_weights=False)[0][:, 0]


class VisionTransformer(nn.Module):
    __module__ = "core.vision_encoder.pe"

    def __init__(self, patch_size, width, layers, heads, use_cls_token=False):
        super().__init__()
        self.patch_size, self.use_cls_token = patch_size, use_cls_token
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width)) if use_cls_token else None
        self.rope = Rope2D(width // heads, use_cls_token)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads, self.rope)
        self.attn_pool = AttentionPooling(width, heads)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.conv1(x)
        self.rope.update_grid(x.device, *patches.shape[2:])
        x = patches.flatten(2).mT
        if self.use_cls_token:
            x = torch.cat((self.class_embedding.expand(len(x), 1, -1), x), dim=1)
        return self.attn_pool(self.ln_post(self.transformer(self.ln_pre(x))))
