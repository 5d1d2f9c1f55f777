"""How a call is cut into programs and tiles; needs no triton and reads no tensor data.

Every kernel owns tiles of `block_m` tokens and sweeps tiles of `block_n` tokens, and both axes are the tokens of an
image. Triton tiles are powers of two, lengths of ViTs are not, so the swept axis ends in a *tail*: whatever a whole
number of `block_n` leaves, rounded up to 16 and made of halves, quarters... of `block_n`. 201 tokens cost 208, 1374
cost 1376. Where the patches alone fill tiles (256 or 1024 patches after a few prefix tokens), the prefix takes a
16-wide tile of its own on both axes and the patches start aligned: 261 = 5 + 256 costs 272 on the swept axis and, with
a 16-row program for the prefix, 272 on the owned one.

Only the class of the tail is compiled in, never the length, so there are at most `block_n / 16 + 1` variants however
many lengths a model meets. Packed images have lengths known on the device only; they take full tiles and one masked
tile of `block_n`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ....._runtime import tuning
from ....._runtime.launch import Constant
from ...types import AttentionInputs, Rope

_PREFIX_TILE = 16  # the narrowest tile tl.dot takes
_PATCH_ALIGNMENT = 64


class Work(NamedTuple):
    """What all kernels launch with.

    Attributes:
        num_tiles: owned tiles an image.
        num_programs: programs a head: one for each owned tile, or one for all.
        images: number of images.
        held: widths of the tiles that hold a whole head; none where programs sweep.
        grid: all programs of all heads of all images.
        arguments: the run-time arguments every kernel has.
        constants: the compile-time arguments every kernel has.
        num_warps, num_stages: compiler options.
    """

    num_tiles: int
    num_programs: int
    images: int
    held: tuple[int, ...]
    grid: tuple[int, ...]
    arguments: dict[str, Tensor | int | float | None]
    constants: dict[str, Constant]
    num_warps: int
    num_stages: int


def of(inputs: AttentionInputs, kernel: tuning.AttentionKernel, arch: int) -> Work:
    """The work of one kernel for a call on an architecture (compute capability times ten)."""
    batch, heads, tokens, head_dim = inputs.query.shape
    packed = inputs.cu_seqlens is not None
    longest = _longest(inputs)
    tiles = tuning.attention_tiles(kernel, arch, inputs.query.dtype, head_dim, longest)
    num_tiles, prefix, tail = _cut(longest, inputs.num_prefix_tokens, tiles, packed)
    owns_heads = kernel == "backward" or (kernel == "forward" and tiles.whole_head)
    held = _held(longest, tiles.block_n) if owns_heads else ()
    num_programs = 1 if held else num_tiles
    images = inputs.cu_seqlens.shape[0] - 1 if packed else batch
    arguments = {
        "cu_seqlens": inputs.cu_seqlens,
        **_mask_arguments(inputs),
        **_rope_arguments(inputs.rope),
        "num_programs": num_programs,
        "num_heads": heads,
        "num_tokens": tokens,
        "num_prefix": inputs.num_prefix_tokens,
        "scale": inputs.scale,
    }
    constants = {
        "D": head_dim,
        "BLOCK_D": tuning.padded_head_dim(head_dim),
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": held[0] if held else tiles.block_n,  # short images are held in narrower tiles
        "TAIL": tail,
        "PREFIX": prefix,
        "INTERLEAVED": inputs.rope is not None and inputs.rope.interleaved,
        # fp32 products are exact unless the user allowed tf32 for torch's own; ignored for half precision.
        "PRECISION": "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
    }
    grid = (num_programs * heads * images,)
    return Work(num_tiles, num_programs, images, held, grid, arguments, constants, tiles.num_warps, tiles.num_stages)


def holds_heads(inputs: AttentionInputs, arch: int) -> bool:
    """Whether a program of the forward holds all keys of a head, so that it can tell what a prefix token attends to."""
    _, _, _, head_dim = inputs.query.shape
    return tuning.attention_tiles("forward", arch, inputs.query.dtype, head_dim, _longest(inputs)).whole_head


def backward_by_heads(inputs: AttentionInputs, arch: int) -> bool:
    """Whether a program of the backward owns all tiles of a head."""
    batch, heads, _, head_dim = inputs.query.shape
    images = batch if inputs.cu_seqlens is None else inputs.cu_seqlens.shape[0] - 1
    return tuning.backward_by_heads(arch, inputs.query.dtype, head_dim, _longest(inputs), images * heads)


def strides(**tensors: Tensor) -> dict[str, int]:
    """Strides of ``[B, H, N, D]`` tensors as kernel arguments: ``query_stride_b``, ``query_stride_h``..."""
    return {
        f"{name}_stride_{axis}": s for name, x in tensors.items() for axis, s in zip("bhnd", x.stride(), strict=True)
    }


def leaves_few(inputs: AttentionInputs, work: Work) -> bool:
    """Whether an image may be 1 to 16 tokens longer than a whole number of owned tiles."""
    left_over = inputs.query.shape[2] % work.constants["BLOCK_M"]
    return inputs.cu_seqlens is not None or 0 < left_over <= _PREFIX_TILE


def prefix_tiles(inputs: AttentionInputs) -> int:
    """Tiles of 16 tokens that the prefix takes."""
    return _ceil_div(inputs.num_prefix_tokens, _PREFIX_TILE)


def _longest(inputs: AttentionInputs) -> int:
    return inputs.query.shape[2] if inputs.cu_seqlens is None else inputs.max_seqlen


def _held(tokens: int, block_n: int) -> tuple[int, ...]:
    """Cut like a swept axis, but each tile is a step of the online softmax, so a tail that would take three is one."""
    full, tail = divmod(_ceil_div(max(tokens, 1), 16) * 16, block_n)
    widths = [block_n] * full
    while tail:
        tile = 1 << (tail - 1).bit_length()
        if tail <= tile * 5 // 8:
            tile //= 2
        widths.append(tile)
        tail = max(tail - tile, 0)
    return tuple(widths)


def _cut(tokens: int, prefix_tokens: int, tiles: tuning.Tiles, packed: bool) -> tuple[int, int, int]:
    """Owned tiles an image, width of the prefix's own tile (0 for none) and width of the tail."""
    if packed:
        return _ceil_div(tokens, tiles.block_m), 0, tiles.block_n
    patches = tokens - prefix_tokens
    if 0 < prefix_tokens < _PREFIX_TILE and patches > 0 and patches % _PATCH_ALIGNMENT == 0:
        return 1 + _ceil_div(patches, tiles.block_m), _PREFIX_TILE, patches % tiles.block_n
    return _ceil_div(tokens, tiles.block_m), 0, _ceil_div(tokens % tiles.block_n, 16) * 16


def _mask_arguments(inputs: AttentionInputs) -> dict[str, Tensor | int | None]:
    """The key-padding mask ``[B or 1, 1, 1, N or 1]`` as bytes ``[B, N]``."""
    if inputs.attn_mask is None:
        return {"key_mask": None, "mask_stride_b": 0, "mask_stride_n": 0}
    batch, _, tokens, _ = inputs.query.shape
    mask = inputs.attn_mask[:, 0, 0].expand(batch, tokens).view(torch.uint8)
    return {"key_mask": mask, "mask_stride_b": mask.stride(0), "mask_stride_n": mask.stride(1)}


def _rope_arguments(rope: Rope | None) -> dict[str, Tensor | int | None]:
    """cos and sin ``[B, M, D]`` or ``[M, D]`` with common strides, as tables made together have anyway."""
    if rope is None:
        return {"cos": None, "sin": None, "rope_stride_b": 0, "rope_stride_m": 0}
    cos, sin = rope.cos, rope.sin
    if cos.stride() != sin.stride() or cos.stride(-1) != 1:
        cos, sin = torch.stack((cos, sin)).unbind()
    batched = cos.ndim == 3 and cos.shape[0] > 1
    return {"cos": cos, "sin": sin, "rope_stride_b": cos.stride(0) if batched else 0, "rope_stride_m": cos.stride(-2)}


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
