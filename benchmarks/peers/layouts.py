"""The layouts that attention's inputs come in, and how a kernel made for one of them serves the others.

- ``"packed"``: the projection of a ViT block, ``[B, N, 3, H, D]``, to ``[B, N, C]``; one packed gradient.
- ``"separate"``: query, key and value ``[B, H, N, D]``, to the same; three gradients.
- ``"multicrop"``: images of several lengths one after another, ``[1, T, 3, H, D]``, to ``[1, T, C]``.

What a kernel needs around it counts as its own: copies of strided views, three gradients stacked into one, crops that
are taken apart and put together again.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.peers.base import Attend
from benchmarks.shapes import Layout


class Pack(NamedTuple):
    """Where the images of a multi-crop input are.

    Attributes:
        runs: (images, tokens an image), in the order in which they lie.
        cu_seqlens: ``[images + 1]`` int32 on the input's device: the first token of each image, and the end.
    """

    runs: tuple[tuple[int, int], ...]
    cu_seqlens: Tensor

    @property
    def lengths(self) -> list[int]:
        """Tokens of each image."""
        return [tokens for images, tokens in self.runs for _ in range(images)]

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest image."""
        return max(tokens for _, tokens in self.runs)

    def batches(self, packed: Tensor) -> Iterator[Tensor]:
        """``[1, T, ...]`` as one ``[images, tokens, ...]`` view a run."""
        sizes = [images * tokens for images, tokens in self.runs]
        for run, (images, tokens) in zip(packed[0].split(sizes), self.runs, strict=True):
            yield run.unflatten(0, (images, tokens))


def pack_of(runs: tuple[tuple[int, int], ...], device: torch.device) -> Pack:
    """The pack of these (images, tokens an image)."""
    lengths = torch.tensor([0, *(tokens for images, tokens in runs for _ in range(images))])
    return Pack(runs, lengths.cumsum(0).to(device, torch.int32))


class Ways(NamedTuple):
    """How one contender serves each layout.

    Attributes:
        packed: of qkv.
        separate: of query, key and value.
        multicrop: of qkv and a ``Pack``.
    """

    packed: Attend
    separate: Attend
    multicrop: Attend

    def attend(self, layout: Layout, pack: Pack | None) -> Attend:
        """Its way of one layout, of the inputs alone."""
        return partial(self.multicrop, pack=pack) if layout == "multicrop" else getattr(self, layout)


def heads_first(kernel: Attend) -> Ways:
    """Ways of a kernel on ``[B, H, N, D]``; images of several lengths take a batched call a length."""

    def packed(qkv: Tensor) -> Tensor:
        return kernel(*split(qkv)).transpose(1, 2).flatten(2)

    def multicrop(qkv: Tensor, pack: Pack) -> Tensor:
        return torch.cat([packed(batch).flatten(0, 1) for batch in pack.batches(qkv)])[None]

    return Ways(packed, kernel, multicrop)


def tokens_first(kernel: Attend, varlen: Attend) -> Ways:
    """Ways of a kernel on ``[B, N, H, D]``, and one on ``[T, H, D]`` and a ``Pack``."""

    def packed(qkv: Tensor) -> Tensor:
        return kernel(*qkv.unbind(2)).flatten(2)

    def separate(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return kernel(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)

    return Ways(packed, separate, several_lengths(varlen))


def several_lengths(varlen: Attend) -> Attend:
    """The multi-crop way of a kernel on ``[T, H, D]`` and a ``Pack``."""

    def multicrop(qkv: Tensor, pack: Pack) -> Tensor:
        return varlen(*qkv[0].unbind(1), pack).flatten(1)[None]

    return multicrop


def split(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value ``[B, H, N, D]``: views of the packed projection."""
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


def _formula(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1) @ value


# The formula in plain torch, in the input's dtype; in fp64 it is what every contender is held against.
EAGER = heads_first(_formula)
