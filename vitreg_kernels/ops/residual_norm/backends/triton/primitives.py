"""Loading the parameters of the norm.

Shapes in comments: C channels, padded to BLOCK_C.
"""

# ruff: noqa: ANN001, ANN201  (what a kernel takes is traced, not annotated; shapes stand in comments)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_channels(pointer, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """[1, C] fp32 of a parameter; zero in the padding."""
    channels = tl.arange(0, BLOCK_C)
    return tl.load(pointer + channels, mask=channels < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def load_factor(layer_scale, drop_path, image, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """[1, C] or a scalar: what the branch of an image is multiplied by."""
    factor = 1.0
    if layer_scale is not None:
        factor = load_channels(layer_scale, C, BLOCK_C)
    if drop_path is not None:
        factor = factor * tl.load(drop_path + image).to(tl.float32)
    return factor
