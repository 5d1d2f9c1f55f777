"""CorLoc: how often the one box found on an image is around an annotated object."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from .annotations import AnnotatedBox
from .images import Box

_WHOLE = 0.95


class CorLoc(NamedTuple):
    """Of the images that have annotated objects.

    Attributes:
        value: share of them whose box has at least the IoU asked for with any annotated one, 0 to 1.
        standard_error: of that share: sqrt(p (1 - p) / images).
        whole_image: the value if every box were the whole image. A method that is not above it has found nothing.
        whole_image_share: see ``whole_image_share``.
        missing: images on which no box was found; they count as misses.
        images: how many there are.
    """

    value: float
    standard_error: float
    whole_image: float
    whole_image_share: float
    missing: int
    images: int


def corloc(
    boxes: Sequence[Box | None],
    truths: Sequence[Sequence[AnnotatedBox] | None],
    frames: Sequence[Box],
    *,
    iou: float = 0.5,
) -> CorLoc:
    """Compare one box an image with the annotated ones; all in pixels of the images as they are on disk.

    Args:
        boxes: of each image; None where none was found.
        truths: of each image, its annotated objects. An image without any, or with None, is left out.
        frames: of each image, what the model saw of it: ``(0, 0, width, height)`` unless it was cropped.
        iou: from which on a box is right.

    Raises:
        ValueError: if the lengths differ, no image has an annotated object, or ``iou`` is not in (0, 1].
    """
    if not len(boxes) == len(truths) == len(frames):
        raise ValueError(
            f"one box, list of truths and frame for each image: these are {len(boxes)}, {len(truths)} and {len(frames)}"
        )
    if not 0 < iou <= 1:
        raise ValueError(f"iou must be in (0, 1], not {iou}")
    annotated = [image for image in zip(boxes, truths, frames, strict=True) if image[1]]
    if not annotated:
        raise ValueError(f"none of {len(boxes)} images has an annotated object: CorLoc needs some")

    def share(guesses: Sequence[Box | None]) -> float:
        right = [
            guess is not None and max(intersection_over_union(guess, truth) for truth in image[1]) >= iou
            for guess, image in zip(guesses, annotated, strict=True)
        ]
        return sum(right) / len(right)

    found, _, seen = (list(column) for column in zip(*annotated, strict=True))
    value = share(found)
    return CorLoc(
        value=value,
        standard_error=math.sqrt(value * (1 - value) / len(annotated)),
        whole_image=share(seen),
        whole_image_share=whole_image_share(found, seen),
        missing=found.count(None),
        images=len(annotated),
    )


def whole_image_share(boxes: Sequence[Box | None], frames: Sequence[Box]) -> float:
    """Share of images whose box covers more than 95% of what the model saw; needs no annotations.

    Above one half, the boxes say nothing about the images.

    Raises:
        ValueError: if the lengths differ or there is no image.
    """
    if len(boxes) != len(frames) or not boxes:
        raise ValueError(f"one box and frame for each of one image or more: these are {len(boxes)} and {len(frames)}")
    covered = [
        box is not None and _common(box, frame) > _WHOLE * _area(frame)
        for box, frame in zip(boxes, frames, strict=True)
    ]
    return sum(covered) / len(covered)


def intersection_over_union(one: AnnotatedBox, other: AnnotatedBox) -> float:
    """Of two boxes: left, top, right, bottom, the last two exclusive. 0 if one of them is empty."""
    common = _common(one, other)
    return common / (_area(one) + _area(other) - common) if common else 0.0


def _common(one: AnnotatedBox, other: AnnotatedBox) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0) * max(height, 0)


def _area(box: AnnotatedBox) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
