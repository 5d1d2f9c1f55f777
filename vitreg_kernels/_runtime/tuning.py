"""What was measured on each architecture, and the tile shapes of the Triton kernels where nothing was.

``configs/sm90.json`` and its like hold, one size at a time, the backend that a call gets if it names none, and tiles
better than the rules below give::

    {
        "fastest": {"16-bit,64,272": "triton"},
        "attention": {"forward": {"16-bit,64,272": {"block_m": 64, "block_n": 128, "num_warps": 4, "num_stages": 2}}}
    }

for half-precision inputs of 33 to 64 channels and of 65 to 272 tokens. Lengths are told apart at 64, 272 and 2048;
longer ones are ``any``. Everything here is a pure function: the same call always runs the same kernel.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

AttentionKernel = Literal["forward", "backward", "grad_query", "grad_key_value", "statistics"]

CONFIGS = Path(__file__).parent / "configs"
_LENGTH_BUCKETS = (64, 272, 2048)
_HEADS_THAT_FILL_A_GPU = 512


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


def padded_head_dim(head_dim: int) -> int:
    """Channels of a tile: the next power of two, and the 16 that ``tl.dot`` needs at least."""
    return max(16, 1 << (head_dim - 1).bit_length())


def length_bucket(num_tokens: int) -> str:
    """What lengths are told apart by: ``"64"``, ``"272"``, ``"2048"`` or ``"any"``."""
    return next((str(bucket) for bucket in _LENGTH_BUCKETS if num_tokens <= bucket), "any")


def size_key(dtype: torch.dtype, head_dim: int, bucket: str) -> str:
    """The name of a size in the tables: ``"16-bit,64,272"``."""
    return f"{torch.finfo(dtype).bits}-bit,{padded_head_dim(head_dim)},{bucket}"


def fastest(arch: int, dtype: torch.dtype, head_dim: int, bucket: str) -> str | None:
    """The attention backend measured to be the fastest for a size on an architecture; ``None`` where none was."""
    return _TABLES.get(arch, {}).get("fastest", {}).get(size_key(dtype, head_dim, bucket))


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
    size = size_key(dtype, head_dim, length_bucket(num_tokens))
    measured = _TABLES.get(arch, {}).get("attention", {}).get(kernel, {}).get(size)
    if measured is not None:
        return Tiles(**measured)
    wide = block_d > 64
    # Without wgmma or tcgen05 all operands of a product lie in registers, and tiles that fit sm_90 and sm_100 spill.
    small = arch < 90 or arch >= 120
    cramped = wide or small
    if bits == 32:
        # Exact fp32 products run on the FMA pipe, which takes whole rows of its operands into registers.
        return Tiles(32, 16, 8, 1) if wide else Tiles(64, 32, 8, 1)
    if kernel == "backward":
        return Tiles(64, 64, 4, 1)
    if kernel == "statistics":
        return Tiles(64, 64, 4, 2)
    if kernel == "forward" and not wide and (num_tokens <= 64 or (num_tokens <= 272 and 90 <= arch < 100)):
        # Keys and values are read once, and leave room for 3 programs a multiprocessor up to 256 tokens, 2 beyond. With
        # more than one tile of keys sm_80 spills, and on sm_100 one program takes all of the tensor memory.
        return Tiles(64, 128, 4, 1, whole_head=True)
    if kernel == "forward":
        # Every owned tile reads all keys and values out of the L2; a tall one halves that. On sm_100 eight warps
        # leave a thread 128 registers, which spill once every statistic is asked for.
        return Tiles(128, 32 if wide and small else 64, 4 if 100 <= arch < 120 else 8, 2)
    return Tiles(64, 32 if cramped else 64, 8 if wide and small else 4, 2)


def backward_by_heads(arch: int, dtype: torch.dtype, head_dim: int, num_tokens: int, num_heads: int) -> bool:
    """Whether a program of the backward owns a whole head (kernel ``"backward"``), or one tile of it (the other two).

    Up to 64 tokens a head is one tile anyway. Longer ones must be many: a multiprocessor of sm_90 has room for two
    programs, so 132 of them are full with 264 heads, and of the second round on it matters little how full the last is.

    Args:
        arch, dtype, head_dim, num_tokens: as for ``attention_tiles``.
        num_heads: of all images together.
    """
    if torch.finfo(dtype).bits == 32 or padded_head_dim(head_dim) > 64:
        return False
    if num_tokens <= 64:
        return 90 <= arch < 120  # sm_80 spills
    # On sm_100 one program takes all of the tensor memory.
    return num_tokens <= 272 and 90 <= arch < 100 and num_heads >= _HEADS_THAT_FILL_A_GPU


def read_tables(folder: Path) -> dict[int, dict[str, Any]]:
    """The tables in a folder by architecture; none if there is no such folder."""
    files = {int(file.stem.removeprefix("sm")): file for file in folder.glob("sm*.json")}
    return {arch: json.loads(file.read_text()) for arch, file in files.items()}


# Read here and now: torch.compile traces through the choice of a backend, and could not trace the reading of a file.
_TABLES = read_tables(CONFIGS)
