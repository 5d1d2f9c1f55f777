"""The Vision Transformer shapes every benchmark runs, and the useful work in each.

Symbols: B batch, H heads, N tokens, D head dim, P prefix tokens (CLS and 4 registers).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

Size = Literal["quick", "full"]
Mode = Literal["forward", "backward", "forward+backward"]
DType = Literal["fp32", "bf16"]
Layout = Literal["packed", "separate", "multicrop"]  # see ``benchmarks.peers.layouts``

MODES: tuple[Mode, ...] = ("forward", "forward+backward")  # of ``cases``
DTYPES: dict[DType, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
PRODUCTS: dict[Mode, int] = {"forward": 2, "backward": 5, "forward+backward": 7}  # of 2 N^2 D operations, a head
_TENSORS: dict[Mode, int] = {"forward": 4, "backward": 8, "forward+backward": 12}  # of N D elements, a head
HEAD_DIM = 64
NUM_PREFIX_TOKENS = 5

# What each length is: a square of patches and 5 prefix tokens.
LENGTHS: dict[int, str] = {
    54: "98 px crop, patch 14",
    201: "224 px, patch 16",
    261: "224 px, patch 14",
    1029: "448 px, patch 14",
    1374: "518 px, patch 14",
}

# (B, H) by device and size. A GPU needs B*H >= 1024 to be full; two CPU cores are busy with a ViT-S's six heads, and
# with fewer they would not share the work as they do in a model.
_BATCH_AND_HEADS: dict[tuple[str, Size], dict[int, tuple[int, int]]] = {
    ("cpu", "quick"): {54: (16, 6), 201: (4, 6), 261: (4, 6), 1029: (1, 6), 1374: (1, 6)},
    ("cpu", "full"): {54: (32, 6), 201: (8, 6), 261: (8, 6), 1029: (2, 6), 1374: (2, 6)},
    ("cuda", "quick"): {54: (64, 16), 201: (64, 16), 261: (64, 16), 1029: (16, 16), 1374: (16, 16)},
    ("cuda", "full"): {54: (256, 16), 201: (64, 16), 261: (64, 16), 1029: (64, 16), 1374: (64, 16)},
}
# Where the quick size races on one thread too; the full size does everywhere.
_QUICK_ONE_THREAD = (201, 1029)


@dataclass(frozen=True)
class Case:
    """One job: attention as inside a ViT block, in one of the layouts of ``benchmarks.peers.layouts``.

    Attributes:
        batch: images; in the multi-crop layout samples, of several images each.
        heads, dtype, mode, head_dim, prefix_tokens, layout: what they say.
        tokens: of an image; in the multi-crop layout of all images of a sample.
        crops: (images, tokens an image) of a sample in the multi-crop layout.
        threads: of torch's, on a CPU; ``None`` for those it has.
    """

    batch: int
    heads: int
    tokens: int
    dtype: DType
    mode: Mode
    head_dim: int = HEAD_DIM
    prefix_tokens: int = NUM_PREFIX_TOKENS
    layout: Layout = "packed"
    crops: tuple[tuple[int, int], ...] = ()
    threads: int | None = None

    @property
    def flops(self) -> int:
        """Useful floating-point operations: 2 products of ``2 N^2 D`` a head forward, and 5 backward."""
        pairs = sum(images * tokens**2 for images, tokens in self.crops or ((1, self.tokens),))
        return PRODUCTS[self.mode] * 2 * self.batch * self.heads * pairs * self.head_dim

    @property
    def bytes(self) -> int:
        """Bytes that must move if each tensor moves once.

        Forward reads q, k, v and writes the output; backward reads q, k, v, the output and its gradient, and writes
        three gradients. The softmax statistics (under 2%) are left out.
        """
        elements = self.batch * self.tokens * self.heads * self.head_dim
        return _TENSORS[self.mode] * elements * DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        crops = " + ".join(f"{images}x{tokens}" for images, tokens in self.crops)
        layout = "" if self.layout == "packed" else f" {self.layout}"
        head_dim = "" if self.head_dim == HEAD_DIM else f" D={self.head_dim}"
        threads = "" if self.threads is None else f" {in_words(self.threads)}"
        return f"N={crops or self.tokens} {self.dtype} {self.mode}{layout}{head_dim}{threads}"


def cases(size: Size, device: torch.device) -> Iterator[Case]:
    """Every length, dtype and mode of a ``size`` on ``device`` (``cpu`` or ``cuda``), shortest first.

    On a CPU by all of torch's threads, then by one alone: in the quick size at some lengths, in the full size at all.
    """
    for tokens, (batch, heads) in _BATCH_AND_HEADS[device.type, size].items():
        for threads in _threads(size, device, tokens):
            for dtype in DTYPES:
                for mode in MODES:
                    yield Case(batch, heads, tokens, dtype, mode, threads=threads)


def in_words(threads: int) -> str:
    """How many threads."""
    return "1 thread" if threads == 1 else f"{threads} threads"


def _threads(size: Size, device: torch.device, tokens: int) -> tuple[int | None, ...]:
    if device.type != "cpu":
        return (None,)
    every = torch.get_num_threads()
    return (every, 1) if every > 1 and (size == "full" or tokens in _QUICK_ONE_THREAD) else (every,)
