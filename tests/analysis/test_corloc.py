"""CorLoc: IoU against torchvision's, what counts and what does not, and the box that is the whole image."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch

from benchmarks import torchvision_beside_torch
from vitreg_kernels.analysis.corloc import CorLoc, corloc, intersection_over_union, whole_image_share

FRAME = (0, 0, 100, 80)


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed")
def test_iou_is_torchvisions():
    torchvision_beside_torch.declare()
    from torchvision.ops import box_iou

    corners = torch.randint(0, 12, (60, 2, 2), generator=torch.Generator().manual_seed(0))
    first, last = corners.amin(1), corners.amax(1) + 1  # left, top and right, bottom
    boxes = torch.cat([first, last], dim=1)
    expected = box_iou(boxes.double(), boxes.double())
    own = torch.tensor(
        [[intersection_over_union(a, b) for b in boxes.tolist()] for a in boxes.tolist()], dtype=torch.float64
    )
    torch.testing.assert_close(own, expected, rtol=0, atol=1e-12)
    assert (own == 0).any()


def test_an_empty_box_agrees_with_nothing():
    assert intersection_over_union((3, 3, 3, 5), (0, 0, 9, 9)) == 0
    assert intersection_over_union((3, 3, 3, 5), (3, 3, 3, 5)) == 0


def test_a_share_of_images_that_have_objects():
    """Right by its second object; wrong; none found; two images that count for nothing."""
    boxes = [(0, 0, 10, 10), (0, 0, 10, 10), None, (0, 0, 10, 10), (0, 0, 10, 10)]
    truths = [[(50, 50, 60, 60), (0, 0, 10, 20)], [(0, 0, 90, 80)], [(0, 0, 100, 60)], [], None]
    found = corloc(boxes, truths, [FRAME] * 5)
    assert found == CorLoc(
        value=1 / 3,
        standard_error=math.sqrt(1 / 3 * 2 / 3 / 3),
        whole_image=2 / 3,
        whole_image_share=0,
        missing=1,
        images=3,
    )


def test_an_iou_of_exactly_the_bound_counts():
    """A box of half the object."""
    one = [(0, 0, 10, 10)], [[(0, 0, 10, 20)]], [FRAME]
    assert corloc(*one).value == 1
    assert corloc(*one, iou=0.51).value == 0


def test_boxes_of_the_whole_image_are_no_better_than_themselves():
    truths = [[(0, 0, 100, 60)], [(10, 10, 40, 40)]]
    found = corloc([FRAME, (1, 1, 99, 79)], truths, [FRAME] * 2)
    assert found.whole_image_share == 1
    assert found.value == found.whole_image == 0.5


def test_what_is_whole_is_what_the_model_saw():
    """Of a wide image, its central square: no box that was found is larger."""
    square = (10, 0, 90, 80)
    assert whole_image_share([square, (10, 0, 90, 75), None], [square] * 3) == 1 / 3
    assert corloc([square], [[(0, 0, 85, 80)]], [square], iou=0.8).whole_image == 1
    assert corloc([square], [[(0, 0, 85, 80)]], [FRAME], iou=0.8).whole_image_share == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([None], [[]], [FRAME]), "none of 1 images has an annotated object"),
        (([None], [[FRAME]], []), "these are 1, 1 and 0"),
    ],
)
def test_what_does_not_fit_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        corloc(*arguments)


def test_an_iou_is_a_share():
    with pytest.raises(ValueError, match=r"iou must be in \(0, 1\], not 50"):
        corloc([FRAME], [[FRAME]], [FRAME], iou=50)


def test_no_image_has_no_share():
    with pytest.raises(ValueError, match="one image or more"):
        whole_image_share([], [])
