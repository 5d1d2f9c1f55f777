"""One pass over all images with one model, batch by batch: what is kept of each, in memory and on disk."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..layout import TokenLayout
from .attention import attention_maps
from .images import Box, ImageBatch, ImageFolder, Placement
from .lost import LostOptions, lost
from .record import Recording, record
from .similarity import neighbour_cosine
from .tokencut import tokencut

# The fields of ``Part`` that are arrays of all its images.
_ARRAYS = ("norms", "valid", "cosine", "attention", "boxes", "shown_boxes", "positive_share", "placements", "grid")


class Part(NamedTuple):
    """What is kept of one batch: of every token a few numbers, and pictures of the images that are shown.

    Attributes:
        paths: of its images.
        norms: ``[L, B, N]`` fp32, behind each block.
        valid: ``[B, M]`` bool, patches that show the image.
        cosine: ``[B, M]`` fp32, of each patch with its neighbours; empty if not asked for.
        attention: ``[B, P, N]`` fp32, of the prefix tokens at the last block, averaged over heads; empty if not asked
            for.
        boxes: ``[methods, B, 4]`` int64, in pixels of the images as they are on disk; -1 where none was found.
        shown_boxes: the same in pixels as the model sees them.
        positive_share: ``[methods, B]`` fp64, of entries of the Gram matrix; NaN of TokenCut.
        placements: ``[B, 6]`` int64, each image's ``Placement``: its window's four edges, height and width.
        grid: ``[2]`` int64, rows and columns of patches.
        pictures: by ``"{image}/{name}"`` as in ``findings.Image``, of images that are shown; and ``tokens``
            ``[rows, columns, C]``, the patches behind the last block.
    """

    paths: list[str]
    norms: np.ndarray
    valid: np.ndarray
    cosine: np.ndarray
    attention: np.ndarray
    boxes: np.ndarray
    shown_boxes: np.ndarray
    positive_share: np.ndarray
    placements: np.ndarray
    grid: np.ndarray
    pictures: dict[str, np.ndarray]


class Survey(NamedTuple):
    """What a pass is to find, and with what.

    Attributes:
        model: in eval mode, on its device.
        layout: of its tokens, a test-time register included.
        patch: side of a patch in pixels.
        similarity, attention: whether these are asked for.
        methods: of object discovery: options of LOST, and ``None`` for TokenCut.
        shown: so many images, from the first, are kept as pictures.
        folder: where parts are kept, so that a pass that was cut goes on; ``None`` for nowhere.
    """

    model: nn.Module
    layout: TokenLayout
    patch: int
    similarity: bool
    attention: bool
    methods: Sequence[LostOptions | None]
    shown: int
    folder: Path | None

    def parts(self, images: ImageFolder, batch_size: int) -> Iterator[Part]:
        """A part for each batch, in order; from disk where an earlier pass left it."""
        first = 0
        for batch in images.batches(batch_size):
            path = None if self.folder is None else self.folder / f"{first:08d}.npz"
            if path is not None and path.exists():
                part = read(path)
            else:
                part = self._part(batch, first)
                if path is not None:
                    write(path, part)
            yield part
            first += len(batch.images)

    def _part(self, batch: ImageBatch, first: int) -> Part:
        count, shown = len(batch.images), max(0, min(len(batch.images), self.shown - first))
        asked = {(options.layer, options.features) for options in self.methods if options is not None}
        if None in self.methods:
            asked.add((-1, "key"))
        if shown:
            asked.add((-1, "tokens"))
        with_attention = self.attention and self.layout.num_prefix_tokens > 0
        recording = record(
            self.model,
            batch.pixels.to(next(self.model.parameters()).device),
            features=sorted(asked),
            attention=(-1,) if with_attention else (),
            layout=self.layout,
            valid=batch.valid,
        )
        placements = [image.placement for image in batch.images]
        cosine = torch.empty(count, 0)
        if self.similarity:
            cosine = neighbour_cosine(recording.embeddings, recording.grid, recording.valid)
        boxes = np.full((2, len(self.methods), count, 4), -1, dtype=np.int64)
        positive = np.full((len(self.methods), count), np.nan)
        for i, method in enumerate(self.methods):
            for j, (patches, share) in enumerate(self._found(recording, method)):
                positive[i, j] = np.nan if share is None else share
                if patches is not None:
                    seen = _clipped(tuple(self.patch * edge for edge in patches), placements[j])
                    boxes[:, i, j] = placements[j].to_image(seen), seen
        (rows_of_prefix,) = recording.attention.values() if with_attention else (torch.empty(count, 0, 0, 0),)
        return Part(
            paths=[image.path for image in batch.images],
            norms=recording.norms.float().numpy(),
            valid=recording.valid.numpy(),
            cosine=cosine.float().numpy(),
            attention=rows_of_prefix.mean(1).numpy() if with_attention else np.empty((count, 0, 0), np.float32),
            boxes=boxes[0],
            shown_boxes=boxes[1],
            positive_share=positive,
            placements=np.array([(*p.window, p.height, p.width) for p in placements], dtype=np.int64),
            grid=np.array(recording.grid),
            pictures=self._pictures(batch, recording, rows_of_prefix if with_attention else None, first, shown),
        )

    def _found(
        self, recording: Recording, method: LostOptions | None
    ) -> list[tuple[tuple[int, int, int, int] | None, float | None]]:
        """Of each image the box in patches, and the positive share."""
        depth = len(recording.norms)
        at = (depth - 1, "key") if method is None else (method.layer % depth, method.features)
        features = recording.features[at][:, recording.layout.patches]
        if method is None:
            found = tokencut(features, recording.grid, valid=recording.valid)
        else:
            found = lost(features, recording.grid, method, valid=recording.valid)
        return [(each.box, each.positive_share) for each in found]

    def _pictures(
        self, batch: ImageBatch, recording: Recording, attention: Tensor | None, first: int, shown: int
    ) -> dict[str, np.ndarray]:
        found = {}
        prefix, patches, grid = self.layout.num_prefix_tokens, self.layout.patches, recording.grid
        for j in range(shown):
            maps = {
                "photo": (255 * batch.images[j].pixels).round().byte().permute(1, 2, 0),
                "norms": recording.norms[:, j, patches].unflatten(1, grid).float(),
                "prefix_norms": recording.norms[:, j, :prefix].float(),
                "tokens": recording.features[len(recording.norms) - 1, "tokens"][j, patches].unflatten(0, grid),
            }
            if attention is not None:
                by_head = attention_maps(attention[j : j + 1], self.layout, grid)[0].transpose(0, 1)
                maps |= {"heads": by_head, "attention": by_head.mean(1)}
            found |= {f"{first + j}/{name}": each.contiguous().numpy() for name, each in maps.items()}
        return found


def recording_of(part: Part, layout: TokenLayout) -> Recording:
    """A part's norms as a ``Recording`` that has nothing else."""
    norms, valid = torch.from_numpy(part.norms), torch.from_numpy(part.valid)
    rows, columns = part.grid.tolist()
    return Recording(norms, torch.empty(valid.shape[0], 0, 0), {}, {}, {}, (rows, columns), layout, valid)


def placements_of(part: Part) -> list[Placement]:
    """Where the pixels of each image come from."""
    return [Placement(tuple(edges), height, width) for *edges, height, width in part.placements.tolist()]


def write(path: Path, part: Part) -> None:
    """Keep a part; the file is there as a whole or not at all."""
    arrays = {name: getattr(part, name) for name in _ARRAYS}
    beside = path.with_suffix(".new")
    path.parent.mkdir(parents=True, exist_ok=True)
    with beside.open("wb") as file:
        np.savez(file, paths=np.array(part.paths), **arrays, **part.pictures)
    os.replace(beside, path)


def read(path: Path) -> Part:
    """What ``write`` kept."""
    with np.load(path) as file:
        pictures = {name: file[name] for name in file.files if "/" in name}
        arrays = {name: file[name] for name in _ARRAYS}
        return Part(file["paths"].tolist(), **arrays, pictures=pictures)


def _clipped(box: Box, placement: Placement) -> Box:
    """A box without what of it lies on padding."""
    return tuple(min(edge, side) for edge, side in zip(box, 2 * (placement.width, placement.height), strict=True))
