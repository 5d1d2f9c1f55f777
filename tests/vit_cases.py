"""A Vision Transformer in plain torch, straight from the formulas, and weights that let nothing hide. Shared by tests.

The formulas read a state dict: nothing here calls the package's modules.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitreg_kernels import RegisterBlock, RegisterViT, ViTConfig, functional
from vitreg_kernels.measure.accuracy import Accuracy, compare

TINY = ViTConfig(image_size=16, patch_size=4, dim=48, depth=3, num_heads=3, layer_scale=0.5)

Weights = Mapping[str, Tensor]


def lively(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter drawn so that it matters: logits that differ, biases and norms away from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("gamma"):
                value = 0.5 + 0.2 * noise
            elif "norm" in name:
                value = (1.0 if name.endswith("weight") else 0.0) + 0.2 * noise
            elif name.endswith("weight"):
                value = noise * (1.5 if "qkv" in name else 1.0) / math.sqrt(parameter[0].numel())
            else:  # biases, CLS tokens, registers and position rows
                value = 0.3 * noise
            parameter.copy_(value)
    return module


def block(config: ViTConfig = TINY, **options) -> RegisterBlock:
    """A block of the config's sizes and choices."""
    shared = ("num_registers", "mlp", "qkv_bias", "proj_bias", "qk_norm", "layer_scale", "drop_path", "eps")
    given = {name: getattr(config, name) for name in shared} | options
    return lively(RegisterBlock(config.dim, config.num_heads, **given))


def linear(p: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))


def layer_norm(p: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], eps)


def block_formula(p: Weights, x: Tensor, config: ViTConfig, angles: Tensor | None = None) -> Tensor:
    """One block, drop path and dropout apart; ``angles`` ``[M, D/2]`` turn the patches' queries and keys."""
    scale1, scale2 = p.get("ls1.gamma", 1.0), p.get("ls2.gamma", 1.0)
    x = x + scale1 * attention_formula(p, layer_norm(p, "norm1", x, config.eps), config, angles)
    hidden = linear(p, "mlp.fc1", layer_norm(p, "norm2", x, config.eps))
    if config.mlp == "swiglu":
        half = hidden.shape[-1] // 2
        hidden = F.silu(hidden[..., :half]) * hidden[..., half:]
    else:
        hidden = F.gelu(hidden)
    return x + scale2 * linear(p, "mlp.fc2", hidden)


def attention_formula(p: Weights, x: Tensor, config: ViTConfig, angles: Tensor | None) -> Tensor:
    batch, tokens, dim = x.shape
    query, key, value = linear(p, "attn.qkv", x).view(batch, tokens, 3, config.num_heads, -1).permute(2, 0, 3, 1, 4)
    if config.qk_norm:
        query, key = (layer_norm(p, f"attn.{n}_norm", t, config.eps) for n, t in (("q", query), ("k", key)))
    if angles is not None:
        query, key = (turned(t, angles) for t in (query, key))
    weights = (query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])).softmax(-1)
    return linear(p, "attn.proj", (weights @ value).transpose(1, 2).reshape(batch, tokens, dim))


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """The last tokens of ``[B, H, N, D]`` as complex numbers times ``exp(i angle)``."""
    prefix, patches = x.split((x.shape[2] - len(angles), len(angles)), dim=2)
    wide = torch.promote_types(x.dtype, torch.float32)
    as_complex = torch.complex(*patches.to(wide).chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((prefix, torch.cat((as_complex.real, as_complex.imag), dim=-1).to(x.dtype)), dim=2)


def angles_of(grid: tuple[int, int], config: ViTConfig, dtype: torch.dtype) -> Tensor:
    """DINOv3's angles ``[M, D/2]`` in the dtype or fp32: two pi a period, of ``base^(2i / (D/2))`` half images."""
    dtype = torch.promote_types(dtype, torch.float32)
    periods = config.rope_base ** (torch.arange(config.head_dim // 4, dtype=dtype) / (config.head_dim // 4))
    centres = [
        (2 * (row + 0.5) / grid[0] - 1, 2 * (column + 0.5) / grid[1] - 1)
        for row in range(grid[0])
        for column in range(grid[1])
    ]
    return (2 * math.pi * torch.tensor(centres, dtype=dtype)[:, :, None] / periods).flatten(1)


def streams_formula(p: Weights, images: Tensor, config: ViTConfig) -> list[Tensor]:
    """The residual stream before the first block and after each."""
    patches = F.conv2d(images, p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], stride=config.patch_size)
    grid = patches.shape[2:]
    patches = patches.flatten(2).transpose(1, 2)
    batch, empty = len(images), images.new_empty(1, 0, config.dim)
    cls, registers = (p.get(name, empty).expand(batch, -1, -1) for name in ("cls_token", "register_tokens"))
    angles = None
    if config.position == "rope":
        x, angles = torch.cat((cls, registers, patches), dim=1), angles_of(grid, config, images.dtype)
    else:
        prefix, rows = p["pos_embed"].split((config.num_prefix_rows, math.prod(config.grid)), dim=1)
        if tuple(grid) != config.grid:
            rows = rows.transpose(1, 2).reshape(1, -1, *config.grid)
            rows = F.interpolate(rows, size=tuple(grid), mode="bicubic", antialias=config.antialias)
            rows = rows.flatten(2).transpose(1, 2)
        patches = patches + rows
        if config.position_rows == "cls":
            cls = cls + prefix
        elif config.position_rows == "prefix":
            cls, registers = cls + prefix[:, : cls.shape[1]], registers + prefix[:, cls.shape[1] :]
        x = torch.cat((cls, registers, patches), dim=1)
    streams = [x]
    for i in range(config.depth):
        own = {name.removeprefix(f"blocks.{i}."): w for name, w in p.items() if name.startswith(f"blocks.{i}.")}
        streams.append(block_formula(own, streams[-1], config, angles))
    return streams


def vit_formula(p: Weights, images: Tensor, config: ViTConfig) -> Tensor:
    """``[B, N, C]`` after the final LayerNorm."""
    return layer_norm(p, "norm", streams_formula(p, images, config)[-1], config.eps)


def leaves_of(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """The module's weights as leaves that gradients arrive at."""
    return {name: p.detach().to(dtype).requires_grad_() for name, p in module.named_parameters()}


def gradients_of(output: Tensor, leaves: Weights, upstream: Tensor) -> dict[str, Tensor]:
    """The output and its gradients, by name."""
    found = torch.autograd.grad(output, list(leaves.values()), upstream.to(output.dtype))
    results = {"output": output.detach()} | dict(zip(leaves, found, strict=True))
    for name in [name for name in results if name.endswith("k_norm.bias")]:
        # What is added to every key changes no softmax: this gradient is exactly zero, and all that is left of it is
        # the rounding of terms that cancel. They are as large as those of the query's bias: judge both together.
        query = name.replace("k_norm", "q_norm")
        results[query] = torch.stack((results[query], results.pop(name)))
    return results


def assert_accurate(actual: Weights, exact: Weights, eager: Weights, terms: int) -> None:
    """All of them by the one accuracy rule."""
    assert actual.keys() == exact.keys() == eager.keys()
    judged = {name: compare(actual[name], exact[name], eager[name], terms=terms) for name in exact}
    failed: dict[str, Accuracy] = {name: accuracy for name, accuracy in judged.items() if not accuracy.passed}
    assert not failed, "\n".join(f"{name}: {accuracy}" for name, accuracy in failed.items())


def vit(config: ViTConfig = TINY, **options) -> RegisterViT:
    """A lively model."""
    return lively(RegisterViT(config, **options))


def watch_adds(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Grows as residual_layer_norm runs: whether it added a branch."""
    seen, original = [], functional.residual_layer_norm

    def watched(x, branch=None, **options):
        seen.append(branch is not None)
        return original(x, branch, **options)

    monkeypatch.setattr(functional, "residual_layer_norm", watched)
    return seen
