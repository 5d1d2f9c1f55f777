"""Tile shapes of the Triton kernels: a pure function, so that the same call always runs the same kernel.

Where something better was measured, ``configs/sm90.json`` and its like override the rules for one architecture, one
kernel, one size at a time::

    {"attention": {"forward": {"16-bit,64,272": {"block_m": 64, "block_n": 128, "num_warps": 4, "num_stages": 2}}}}

for half-precision inputs of 33 to 64 channels and of 65 to 272 tokens. Lengths are told apart at 64, 272 and 2048;
longer ones are ``any``.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib import resources
from typing import Literal

import torch

AttentionKernel = Literal["forward", "grad_query", "grad_key_value", "statistics"]

_CONFIGS = resources.files(__package__) / "configs"
_LENGTH_BUCKETS = (64, 272, 2048)


@dataclass(frozen=True)
class Tiles:
    """Shape of one kernel.

    Attributes:
        block_m: tokens a program owns, a power of two from 16.
        block_n: tokens it sweeps at a time, a power of two from 16 to 256.
        num_warps, num_stages: compiler options.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def padded_head_dim(head_dim: int) -> int:
    """Channels of a tile: the next power of two, and the 16 that ``tl.dot`` needs at least."""
    return max(16, 1 << (head_dim - 1).bit_length())


@functools.lru_cache(maxsize=1024)
def attention_tiles(kernel: AttentionKernel, arch: int, dtype: torch.dtype, head_dim: int, num_tokens: int) -> Tiles:
    """Tiles of an attention kernel.

    Args:
        kernel: which one.
        arch: compute capability times ten.
        dtype: of query, key and value.
        head_dim: D.
        num_tokens: N, the longest image's if packed.
    """
    block_d = padded_head_dim(head_dim)
    bits = torch.finfo(dtype).bits
    bucket = next((str(b) for b in _LENGTH_BUCKETS if num_tokens <= b), "any")
    measured = _table(arch).get("attention", {}).get(kernel, {}).get(f"{bits}-bit,{block_d},{bucket}")
    if measured is not None:
        return Tiles(**measured)
    wide = block_d > 64
    # Without wgmma or tcgen05 all operands of a product lie in registers, and tiles that fit sm_90 and sm_100 spill.
    small = arch < 90 or arch >= 120
    cramped = wide or small
    if bits == 32:
        # Exact fp32 products run on the FMA pipe, which takes whole rows of its operands into registers.
        return Tiles(32, 16, 8, 1) if wide else Tiles(64, 32, 8, 1)
    if kernel == "statistics" or (kernel == "forward" and num_tokens <= 64 and not wide):
        return Tiles(64, 64, 4, 2)
    if kernel == "forward":
        # Every owned tile reads all keys and values out of the L2; a tall one halves that. On sm_100 eight warps
        # leave a thread 128 registers, which spill once every statistic is asked for.
        return Tiles(128, 32 if wide and small else 64, 4 if 100 <= arch < 120 else 8, 2)
    return Tiles(64, 32 if cramped else 64, 8 if wide and small else 4, 2)


@functools.cache
def _table(arch: int) -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    file = _CONFIGS / f"sm{arch}.json"
    return json.loads(file.read_text()) if file.is_file() else {}
