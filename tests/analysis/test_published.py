"""Every printed number has a source and a place; those that the analyses are held against are the papers'."""

from __future__ import annotations

import re
from collections import Counter
from typing import get_args

import pytest

from vitreg_kernels.analysis.published import PUBLISHED, REGISTERS, TEST_TIME, Topic, of_topic


def find(topic, model, quantity, source):
    (row,) = (r for r in of_topic(topic) if (r.model, r.quantity, r.source) == (model, quantity, source))
    return row


def test_every_row_has_a_source_and_a_place():
    for row in PUBLISHED:
        assert row.topic in get_args(Topic)
        assert re.fullmatch(r"arXiv \d{4}\.\d{5}|https://github\.com/[\w./-]+", row.source), row
        assert row.place
        assert row.model
        assert row.quantity
        assert row.values
        assert all(condition and number for condition, number in row.values)


def test_every_topic_has_rows_and_no_row_is_there_twice():
    assert [row for topic in get_args(Topic) for row in of_topic(topic)] == list(PUBLISHED)
    assert all(of_topic(topic) for topic in get_args(Topic))
    keys = Counter((row.topic, row.model, row.quantity, row.source) for row in PUBLISHED)
    assert set(keys.values()) == {1}


@pytest.mark.parametrize(
    ("topic", "model", "quantity", "source", "numbers"),
    [
        ("outliers", "DINOv2 ViT-g/14", "share of patches above a norm of 150, %", REGISTERS, ["2.37"]),
        ("local information", "DINOv2 ViT-g/14", "position, top-1 accuracy, %", REGISTERS, ["41.7", "22.8"]),
        ("discovery", "DINOv2 ViT-L/14", "LOST, CorLoc on VOC07, %", REGISTERS, ["35.3", "55.4"]),
        ("discovery", "DINOv2 ViT-L/14", "LOST, CorLoc on COCO20k, %", TEST_TIME, ["25.4", "42.3", "41.9"]),
        ("downstream", "OpenCLIP ViT-B", "NYUd, RMSE", REGISTERS, ["0.702", "0.661"]),
        ("classification", "DINOv2 ViT-g/14", "Cars, accuracy, %", REGISTERS, ["10.8", "85.2", "91.5"]),
    ],
)
def test_what_the_papers_say(topic, model, quantity, source, numbers):
    assert [number for _, number in find(topic, model, quantity, source).values] == numbers


def test_scores_that_may_be_of_the_whole_image_say_so():
    suspect = [row for row in PUBLISHED if ("no registers", "30.8") in row.values]
    assert suspect
    assert all("the whole image" in row.note for row in suspect)
