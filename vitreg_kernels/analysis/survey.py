"""One pass over all images with one model, batch by batch: what is kept of each, in memory and on disk."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..integrations import residual_stream
from ..layout import TokenLayout
from .attention import attention_maps, sinks
from .images import Box, ImageBatch, ImageFolder, Placement
from .lost import LostOptions, lost
from .record import Recording, record
from .similarity import cls_cosine, neighbour_cosine
from .tokencut import tokencut

# The fields of ``Part`` that are arrays of all its images.
_ARRAYS = (
    "norms",
    "valid",
    "finite",
    "cosine",
    "cls_cosine",
    "attention",
    "sinks",
    "heads",
    "boxes",
    "shown_boxes",
    "positive_share",
    "placements",
    "grid",
)


class Part(NamedTuple):
    """What is kept of one batch: of every token a few numbers, and pictures of the images that are shown.

    Attributes:
        paths: of its images.
        norms: ``[L, B, N]`` fp32, behind each block.
        valid: ``[B, M]`` bool, patches that show the image.
        finite: ``[B]`` bool, images all of whose norms are finite: of the others nothing but the norms is taken.
        cosine: ``[B, M]`` fp32, of each patch with its neighbours; empty if not asked for.
        cls_cosine: ``[B, M]`` fp32, of each patch with the CLS token behind the last block; empty as well without one.
        attention: ``[B, P, N]`` fp32, of the prefix tokens at the last block, averaged over heads; empty if not asked
            for.
        sinks: ``[2, L, B, N]`` uint8, in how many heads of each block a token is an attention sink: at least, and at
            most; empty if not asked for.
        heads: ``[L]`` int64, of each block; empty as well.
        boxes: ``[methods, B, 4]`` int64, in pixels of the images as they are on disk; -1 where none was found.
        shown_boxes: the same in pixels as the model sees them.
        positive_share: ``[methods, B]`` fp64, of entries of the Gram matrix; NaN of TokenCut and where none was taken.
        placements: ``[B, 6]`` int64, each image's ``Placement``: its window's four edges, height and width.
        grid: ``[2]`` int64, rows and columns of patches.
        pictures: by ``"{image}/{name}"`` as in ``findings.Image``, of images that are shown; and ``tokens``
            ``[rows, columns, C]``, the patches behind the last block.
    """

    paths: list[str]
    norms: np.ndarray
    valid: np.ndarray
    finite: np.ndarray
    cosine: np.ndarray
    cls_cosine: np.ndarray
    attention: np.ndarray
    sinks: np.ndarray
    heads: np.ndarray
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
            part = None if path is None else read(path)
            # A file that could not be read before, and now can, moves those behind it to other batches.
            if part is None or part.paths != [image.path for image in batch.images]:
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
        with_cls = self.similarity and self.layout.num_cls_tokens > 0
        if shown or with_cls:
            asked.add((-1, "tokens"))
        depth = len(residual_stream(self.model).blocks)
        with_attention = self.attention and self.layout.num_prefix_tokens > 0
        recording = record(
            self.model,
            batch.pixels.to(next(self.model.parameters()).device),
            features=sorted(asked),
            attention=range(depth) if with_attention else (),
            received=range(depth) if self.attention else (),
            layout=self.layout,
            valid=batch.valid,
        )
        placements = [image.placement for image in batch.images]
        finite = recording.norms.isfinite().all(2).all(0)
        cosine = of_cls = torch.empty(count, 0)
        if self.similarity:
            cosine = neighbour_cosine(recording.embeddings, recording.grid, recording.valid)
        if with_cls:
            of_cls = cls_cosine(recording.features[depth - 1, "tokens"], recording.layout, recording.valid)
        boxes = np.full((2, len(self.methods), count, 4), -1, dtype=np.int64)
        positive = np.full((len(self.methods), count), np.nan)
        for i, method in enumerate(self.methods):
            for j, (patches, share) in self._found(recording, method, finite):
                positive[i, j] = np.nan if share is None else share
                if patches is not None:
                    seen = _clipped(tuple(self.patch * edge for edge in patches), placements[j])
                    boxes[:, i, j] = placements[j].to_image(seen), seen
        rows_of_prefix = recording.attention[depth - 1] if with_attention else None
        bounds = _sinks(recording) if self.attention else torch.empty(2, 0, count, 0, dtype=torch.uint8)
        return Part(
            paths=[image.path for image in batch.images],
            norms=recording.norms.float().numpy(),
            valid=recording.valid.numpy(),
            finite=finite.numpy(),
            cosine=cosine.float().numpy(),
            cls_cosine=of_cls.float().numpy(),
            attention=np.empty((count, 0, 0), np.float32) if rows_of_prefix is None else rows_of_prefix.mean(1).numpy(),
            sinks=bounds.numpy(),
            heads=np.array([recording.received[layer].shape[1] for layer in sorted(recording.received)], np.int64),
            boxes=boxes[0],
            shown_boxes=boxes[1],
            positive_share=positive,
            placements=np.array([(*p.window, p.height, p.width) for p in placements], dtype=np.int64),
            grid=np.array(recording.grid),
            pictures=self._pictures(batch, recording, rows_of_prefix, first, shown),
        )

    def _found(
        self, recording: Recording, method: LostOptions | None, finite: Tensor
    ) -> list[tuple[int, tuple[Box | None, float | None]]]:
        """Of each image that is finite its place in the batch, the box in patches, and the positive share."""
        if not finite.any():
            return []
        depth = len(recording.norms)
        at = (depth - 1, "key") if method is None else (method.layer % depth, method.features)
        features, valid = recording.features[at][finite][:, recording.layout.patches], recording.valid[finite]
        if method is None:
            found = tokencut(features, recording.grid, valid=valid)
        else:
            found = lost(features, recording.grid, method, valid=valid)
        places = finite.nonzero().flatten().tolist()
        return list(zip(places, [(each.box, each.positive_share) for each in found], strict=True))

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


def _sinks(recording: Recording) -> Tensor:
    """``[2, L, B, N]`` uint8, in how many heads a token is a sink: for certain, and possibly."""
    found = []
    for layer, received in sorted(recording.received.items()):
        without_prefix = received.new_empty(*received.shape[:2], 0, received.shape[2])
        bounds = sinks(received, recording.attention.get(layer, without_prefix))
        found.append(torch.stack([bounds.certain.sum(1), bounds.possible.sum(1)]))
    return torch.stack(found, dim=1).to(torch.uint8)


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


def read(path: Path) -> Part | None:
    """What ``write`` kept; ``None`` if there is no such file, or not all of it, as after a loss of power."""
    try:
        with np.load(path) as file:
            pictures = {name: file[name] for name in file.files if "/" in name}
            arrays = {name: file[name] for name in _ARRAYS}
            return Part(file["paths"].tolist(), **arrays, pictures=pictures)
    except (FileNotFoundError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error):
        return None


def _clipped(box: Box, placement: Placement) -> Box:
    """A box without what of it lies on padding."""
    return tuple(min(edge, side) for edge, side in zip(box, 2 * (placement.width, placement.height), strict=True))
