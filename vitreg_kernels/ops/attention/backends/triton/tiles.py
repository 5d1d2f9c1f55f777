"""The tile shapes of the Triton attention kernels: what was measured to be the best, or else a rule.

Measured ones stand in section ``attention_tiles`` of the tables in ``dispatch/configs``. Everything here is a pure
function: the same call always runs the same kernel.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from .....dispatch import tables

AttentionKernel = Literal["forward", "backward", "grad_query", "grad_key_value", "statistics"]

SECTION = "attention_tiles"

# More fill a GPU. A bucket of the tables ends here, so that what was measured of one decides for kernels of one kind.
_FEW_HEADS = tables.HEAD_BUCKETS[-1]


@dataclass(frozen=True)
class Tiles:
    """Shape of one kernel.

    Attributes:
        block_m: tokens a program owns, a power of two from 16.
        block_n: tokens it sweeps at a time, a power of two from 16 to 256.
        num_warps, num_stages: compiler options.
        whole_head: of the forward only: one program owns every tile of a head, one after another, and holds the head's
            keys and values in shared memory.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    whole_head: bool = False


class Key(NamedTuple):
    """What a row of measured tiles decides for.

    Attributes:
        device: ``"sm_90"``, ...
        kernel: which one.
        bits: of a number of query, key and value.
        width: channels of a tile, see ``padded_head_dim``.
        tokens: the bucket of the longest image, see ``tables.token_bucket``.
    """

    device: str
    kernel: AttentionKernel
    bits: int
    width: int
    tokens: int


def key_of(kernel: AttentionKernel, capability: int, dtype: torch.dtype, head_dim: int, num_tokens: int) -> Key:
    """What row decides for a kernel; the arguments are those of ``attention_tiles``."""
    bits = torch.finfo(dtype).bits
    return Key(f"sm_{capability}", kernel, bits, padded_head_dim(head_dim), tables.token_bucket(num_tokens))


def padded_head_dim(head_dim: int) -> int:
    """Channels of a tile: the next power of two, and the 16 that ``tl.dot`` needs at least."""
    return max(16, 1 << (head_dim - 1).bit_length())


def fills_a_gpu(num_heads: int) -> bool:
    """Whether a program a head keeps a GPU busy.

    A multiprocessor of sm_90 has room for two or three programs that own a head, so its 132 are full with 264 or 396
    heads. With 512 a second round has begun, and from there on it matters less and less how full the last round is.

    Args:
        num_heads: of all images together.
    """
    return num_heads > _FEW_HEADS


@functools.lru_cache(maxsize=1024)
def attention_tiles(
    kernel: AttentionKernel,
    capability: int,
    dtype: torch.dtype,
    head_dim: int,
    num_tokens: int,
    many_heads: bool = True,
) -> Tiles:
    """Tiles of an attention kernel.

    Args:
        kernel: which one.
        capability: of the GPU, ten times the version.
        dtype: of query, key and value.
        head_dim: D.
        num_tokens: N, the longest image's if packed.
        many_heads: whether they fill a GPU, as they do where tiles are measured.
    """
    block_d = padded_head_dim(head_dim)
    bits = torch.finfo(dtype).bits
    measured = _MEASURED.get(key_of(kernel, capability, dtype, head_dim, num_tokens))
    if measured is not None and (many_heads or num_tokens <= 64 or not measured.whole_head):
        return measured
    wide = block_d > 64
    # Without wgmma or tcgen05 all operands of a product lie in registers, and tiles that fit sm_90 and sm_100 spill.
    small = capability < 90 or capability >= 120
    cramped = wide or small
    if bits == 32:
        # Exact fp32 products run on the FMA pipe, which takes whole rows of its operands into registers.
        return Tiles(32, 16, 8, 1) if wide else Tiles(64, 32, 8, 1)
    if kernel == "backward":
        return Tiles(64, 64, 4, 1)
    if kernel == "statistics":
        return Tiles(64, 64, 4, 2)
    if kernel == "forward" and not wide and (num_tokens <= 64 or _short_on_sm_90(capability, num_tokens)):
        if num_tokens <= 64 or many_heads:
            # Keys and values are read once, and leave room for 3 programs a multiprocessor up to 256 tokens, 2 beyond.
            # With more than one tile of keys sm_80 spills, and on sm_100 one program takes all of the tensor memory.
            return Tiles(64, 128, 4, 1, whole_head=True)
        # One program a head would leave most multiprocessors idle, and the others pass all queries one tile after
        # another. Small tiles make the most programs.
        return Tiles(64, 64, 4, 2)
    if kernel == "forward":
        # Every owned tile reads all keys and values out of the L2; a tall one halves that. On sm_100 eight warps
        # leave a thread 128 registers, which spill once every statistic is asked for.
        return Tiles(128, 32 if wide and small else 64, 4 if 100 <= capability < 120 else 8, 2)
    if kernel == "grad_key_value" and not small:
        # Without prefetching: from two stages on, triton 3.6 copies the statistics of queries 4 bytes at a time, a copy
        # for each column of a thread. Three programs a multiprocessor hide the latency as well.
        # At 128 channels this takes every register of a thread: by triton 3.6 and 3.7, 8 bytes spill outside the loops;
        # by 3.9, 160, of which a round of the loop loads 21 words. With 32 queries nothing spills, but it is predicted
        # 25% slower on sm_90; with two stages too, 3%, and 39% by triton 3.6, for its copies.
        return Tiles(64, 64, 4, 1)
    return Tiles(64, 32 if cramped else 64, 8 if wide and small else 4, 2)


def backward_by_heads(capability: int, dtype: torch.dtype, head_dim: int, num_tokens: int, num_heads: int) -> bool:
    """Whether a program of the backward owns a whole head (kernel ``"backward"``), or one tile of it (the other two).

    Up to 64 tokens a head is one tile anyway. Longer ones must be many.

    Args:
        capability, dtype, head_dim, num_tokens: as for ``attention_tiles``.
        num_heads: of all images together.
    """
    if torch.finfo(dtype).bits == 32 or padded_head_dim(head_dim) > 64:
        return False
    if num_tokens <= 64:
        return 90 <= capability < 120  # sm_80 spills
    # On sm_100 one program takes all of the tensor memory.
    return _short_on_sm_90(capability, num_tokens) and fills_a_gpu(num_heads)


def _short_on_sm_90(capability: int, num_tokens: int) -> bool:
    """Whether all tokens of a head fit the shared memory of a program, two of which a multiprocessor of sm_90 holds."""
    return num_tokens <= 272 and 90 <= capability < 100


def measured_tiles(folder: Path) -> dict[Key, Tiles]:
    """The tiles that the tables in a folder hold."""
    return {
        Key(device, *(row[name] for name in Key._fields[1:])): Tiles(*(row[f.name] for f in fields(Tiles)))
        for device, rows in tables.read(folder, SECTION).items()
        for row in rows
    }


_MEASURED = measured_tiles(tables.CONFIGS)
