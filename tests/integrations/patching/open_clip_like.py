"""``Attention`` with the interface that open_clip's has since its blocks left ``nn.MultiheadAttention``, after release
3.3.0, written anew: names, attributes, parameters and what is computed are those of mlfoundations/open_clip,
``open_clip/transformer.py``. Attention is the plain formula, the accuracy rule's eager one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Attention(nn.Module):
    __module__ = "open_clip.transformer"

    def __init__(
        self,
        dim,
        num_heads=8,
        kdim=None,
        qkv_bias=True,
        qk_norm=False,
        scaled_cosine=False,
        scale_heads=False,
        inner_norm=False,
        norm_layer=nn.LayerNorm,
        attn_drop=0.0,
        proj_drop=0.0,
    ):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale, self.use_sdpa = self.head_dim**-0.5, True
        self.in_proj_weight = self.q_proj_weight = self.k_proj_weight = self.v_proj_weight = None
        if kdim in (None, dim):
            self.in_proj_weight = nn.Parameter(torch.zeros(3 * dim, dim))
        else:
            self.q_proj_weight = nn.Parameter(torch.zeros(dim, dim))
            self.k_proj_weight = nn.Parameter(torch.zeros(dim, kdim))
            self.v_proj_weight = nn.Parameter(torch.zeros(dim, kdim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim)) if qkv_bias else None
        self.ln_q = norm_layer(self.head_dim) if qk_norm else nn.Identity()
        self.ln_k = norm_layer(self.head_dim) if qk_norm else nn.Identity()
        self.logit_scale = nn.Parameter(torch.zeros(num_heads, 1, 1)) if scaled_cosine else None
        self.attn_drop = nn.Dropout(attn_drop)
        self.head_scale = nn.Parameter(torch.ones(num_heads, 1, 1)) if scale_heads else None
        self.ln_inner = norm_layer(dim) if inner_norm else nn.Identity()
        self.out_proj = nn.Linear(dim, dim)
        self.out_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None):
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        weights = weights if self.in_proj_weight is None else self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        inputs = (x, x if k_x is None else k_x, x if v_x is None else v_x)
        query, key, value = (
            functional.linear(*given).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for given in zip(inputs, weights, biases, strict=True)
        )
        logits = self.ln_q(query) @ self.ln_k(key).mT * self.scale
        if attn_mask is not None:
            if attn_mask.dim() == 3:
                attn_mask = attn_mask.reshape(len(x), self.num_heads, *attn_mask.shape[1:])
            kept = attn_mask if attn_mask.dtype == torch.bool else None
            logits = logits + attn_mask if kept is None else logits.masked_fill(~kept, -torch.inf)
        attended = self.attn_drop(logits.softmax(-1)) @ value
        if self.head_scale is not None:
            attended = attended * self.head_scale
        return self.out_drop(self.out_proj(self.ln_inner(attended.transpose(1, 2).flatten(2))))
