"""A model whose residual stream is exact, integers that each block doubles: every way to run it must count the same."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vitreg_kernels import RegisterViT, TokenLayout, ViTConfig
from vitreg_kernels.monitor import TokenNormMonitor

DEPTH, CHANNELS, PATCHES = 3, 8, 16
LAYOUT = TokenLayout(num_registers=4)
TOKENS = LAYOUT.num_prefix_tokens + PATCHES
NAMES = tuple(f"blocks.{i}" for i in range(DEPTH))


class Doubling(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((CHANNELS,), 2.0))

    def forward(self, x):
        return x * self.weight


class Doublings(nn.Module):
    """``reentrant`` is of activation checkpointing, of all blocks at once; None without it."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.blocks = nn.ModuleList(Doubling() for _ in range(DEPTH))
        self.reentrant = reentrant

    def forward(self, x):
        if self.reentrant is None:
            return self.run(x)
        return checkpoint(self.run, x, use_reentrant=self.reentrant)

    def run(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def layers_of(model):
    return [(f"blocks.{i}", block) for i, block in enumerate(model.blocks)]


def monitored(model):
    """A monitor of a ``Doublings``, whatever it is wrapped in later."""
    return TokenNormMonitor(model, layers=layers_of(model), layout=LAYOUT)


def tokens(batch=2, seed=0):
    """``[B, N, C]`` integers, no token all zeros."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 8, (batch, TOKENS, CHANNELS), generator=generator).float()


def small_vit(**changes):
    """A ``RegisterViT`` of 21 tokens."""
    torch.manual_seed(0)
    return RegisterViT(ViTConfig(image_size=16, patch_size=4, dim=32, depth=DEPTH, num_heads=2, **changes))


def assert_same_counts(actual, expected):
    """Two reports of the same tokens, which may have been counted in another order: only the sums are rounded."""
    assert actual.layers == expected.layers
    for ours, theirs in zip(actual.stats, expected.stats, strict=True):
        for name in ("histogram", "extremes", "nonfinite"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        torch.testing.assert_close(ours.sums, theirs.sums, rtol=1e-14, atol=0.0)
