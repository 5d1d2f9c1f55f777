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

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ....._triton.launch import Argument, Constant, Launch, Strided
from ...features import tf32_is_allowed
from ...types import AttentionInputs, Rope
from . import tiles as tuning

_PREFIX_TILE = 16  # the narrowest tile tl.dot takes
_PATCH_ALIGNMENT = 64


class Sizes(NamedTuple):
    """What every kernel needs to find its program's image and head: one kernel argument."""

    num_programs: int  # a head
    num_heads: int
    num_tokens: int
    num_prefix: int


class RopeTables(NamedTuple):
    """cos and sin ``[B, M, D]`` in common strides, of which the last is 1: one kernel argument.

    Attributes:
        cos, sin: the tables.
        strides: of an image (0 if all images share one table) and of a patch.
    """

    cos: Tensor
    sin: Tensor
    strides: tuple[int, int]


class ForwardBuffers(NamedTuple):
    """What a forward writes; ``None`` for what the call does not need."""

    output: Tensor  # [B, H, N, D]
    lse: Tensor | None  # [B, H, N]
    normalizer: Tensor | None  # [B, H, N]; what the statistics kernel needs beside the lse
    max_logit: Tensor | None  # [images, H, tiles]: the largest logit of each tile of queries
    square_norm: Tensor | None  # [B, H, N]: sum of squares of each head of each output token
    received_attention: Tensor | None  # [B, H, N]
    prefix_attention: Tensor | None  # [B, H, P, N]


class LaunchPlan(NamedTuple):
    """What a kernel is launched with beside its own tensors.

    Attributes:
        num_tiles: owned tiles an image.
        images: number of images.
        resident_widths: widths of the tiles that keep a whole head in shared memory; none where programs sweep.
        grid: one program for each owned tile of each head of each image, or one for all tiles of a head.
        arguments: the run-time arguments every kernel has.
        constants: the compile-time arguments every kernel has.
        num_warps, num_stages: compiler options.
    """

    num_tiles: int
    images: int
    resident_widths: tuple[int, ...]
    grid: tuple[int, ...]
    arguments: dict[str, Argument]
    constants: dict[str, Constant]
    num_warps: int
    num_stages: int

    def launch(self, kernel: Any, tensors: dict[str, Argument], constants: dict[str, Constant] | None = None) -> Launch:
        """The launch of a kernel with its own tensors and constants."""
        return Launch(
            kernel=kernel,
            grid=self.grid,
            arguments=tensors | self.arguments,
            constants=self.constants | (constants or {}),
            num_warps=self.num_warps,
            num_stages=self.num_stages,
        )


def launch_plan(inputs: AttentionInputs, kernel: tuning.AttentionKernel, capability: int) -> LaunchPlan:
    """How one kernel is launched for a call on a GPU of a compute capability (ten times the version)."""
    _, heads, tokens, head_dim = inputs.query.shape
    packed = inputs.cu_seqlens is not None
    longest = _longest(inputs)
    images = _num_images(inputs)
    many_heads = tuning.fills_a_gpu(images * heads)
    tiles = tuning.attention_tiles(kernel, capability, inputs.query.dtype, head_dim, longest, many_heads)
    num_tiles, prefix, tail = _cut(longest, inputs.num_prefix_tokens, tiles, packed)
    owns_heads = kernel == "backward" or (kernel == "forward" and tiles.whole_head)
    resident_widths = _resident_widths(longest, tiles.block_n) if owns_heads else ()
    num_programs = 1 if owns_heads else num_tiles
    return LaunchPlan(
        num_tiles=num_tiles,
        images=images,
        resident_widths=resident_widths,
        grid=(num_programs * heads * images,),
        arguments={
            "key_mask": _mask(inputs),
            "rope": _rope_tables(inputs.rope),
            "cu_seqlens": inputs.cu_seqlens,
            "sizes": Sizes(num_programs, heads, tokens, inputs.num_prefix_tokens),
            "scale": inputs.scale,
        },
        constants={
            "D": head_dim,
            "BLOCK_D": tuning.padded_head_dim(head_dim),
            "BLOCK_M": tiles.block_m,
            "BLOCK_N": resident_widths[0] if owns_heads else tiles.block_n,  # short images take narrower tiles
            "TAIL": tail,
            "PREFIX": prefix,
            "INTERLEAVED": inputs.rope is not None and inputs.rope.interleaved,
            "PRECISION": _precision(inputs.query.dtype, capability, head_dim),
        },
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )


def backward_by_heads(inputs: AttentionInputs, capability: int) -> bool:
    """Whether a program of the backward owns all tiles of a head."""
    _, heads, _, head_dim = inputs.query.shape
    num_heads = _num_images(inputs) * heads
    return tuning.backward_by_heads(capability, inputs.query.dtype, head_dim, _longest(inputs), num_heads)


def leaves_small_remainder(inputs: AttentionInputs, plan: LaunchPlan) -> bool:
    """Whether an image may be 1 to 16 tokens longer than a whole number of owned tiles."""
    remainder = inputs.query.shape[2] % plan.constants["BLOCK_M"]
    return inputs.cu_seqlens is not None or 0 < remainder <= _PREFIX_TILE


def prefix_tiles(inputs: AttentionInputs) -> int:
    """Tiles of 16 tokens that the prefix takes."""
    return _ceil_div(inputs.num_prefix_tokens, _PREFIX_TILE)


def _precision(dtype: torch.dtype, capability: int, head_dim: int) -> str:
    """Of products of fp32 inputs: exact, or, where the user allows tf32, three products of tf32 for one.

    One alone would cut its operands off where cuBLAS rounds them, and miss the accuracy rule by a factor of two. Three
    keep it even against exact products. On GPUs whose products take their operands from registers, and at wide heads,
    the parts of all operands spill; exact products serve there.
    """
    room = 90 <= capability < 120 and tuning.padded_head_dim(head_dim) <= 64
    return "tf32x3" if dtype == torch.float32 and room and tf32_is_allowed("cuda") else "ieee"


def _longest(inputs: AttentionInputs) -> int:
    return inputs.query.shape[2] if inputs.cu_seqlens is None else inputs.max_seqlen


def _num_images(inputs: AttentionInputs) -> int:
    return inputs.query.shape[0] if inputs.cu_seqlens is None else inputs.cu_seqlens.shape[0] - 1


def _resident_widths(tokens: int, block_n: int) -> tuple[int, ...]:
    """Cut like a swept axis, but into fewer tiles, since each is a step of the online softmax.

    What is left after full tiles is one tile, or two where that saves three eighths of it or more.
    """
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


def _mask(inputs: AttentionInputs) -> Strided | None:
    """The key-padding mask ``[B or 1, 1, 1, N or 1]`` in strides of ``[B, N]``."""
    if inputs.attn_mask is None:
        return None
    batch, _, tokens, _ = inputs.query.shape
    return Strided(inputs.attn_mask, inputs.attn_mask[:, 0, 0].expand(batch, tokens).stride())


def _rope_tables(rope: Rope | None) -> RopeTables | None:
    """Tables made together have common strides; others are copied."""
    if rope is None:
        return None
    cos, sin = rope.cos, rope.sin
    if cos.stride() != sin.stride() or cos.stride(-1) != 1:
        cos, sin = torch.stack((cos, sin)).unbind()
    batched = cos.ndim == 3 and cos.shape[0] > 1
    return RopeTables(cos, sin, (cos.stride(0) if batched else 0, cos.stride(-2)))


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
