"""``examples/train.py`` on a model small enough for tests, whole or cut on the way."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

for needed in ("timm", "torchvision", "sklearn", "matplotlib", "tqdm"):
    pytest.importorskip(needed)

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import train as example  # noqa: E402

CUT_AFTER = 7  # a report after the checkpoint of step 5, whose counts were begun after the report of step 3
# With stochastic depth and dropout, or nothing would be random but the order of the images.
_SMALL = "--steps=9 --batch-size=16 --report-every=3 --save-every=5 --model-kwargs depth=2 embed_dim=64 num_heads=2"
_RANDOM = "init_values=1.0 drop_path_rate=0.1 proj_drop_rate=0.1"


def train(folder: Path, *options: str, random: bool = False) -> tuple[dict[int, float], float]:
    """The losses that are reported, by step, and the accuracy."""
    return example.main([f"--output={folder}", *_SMALL.split(), *(_RANDOM.split() if random else ()), *options])


class CutError(Exception):
    """The machine stopped."""


def cut(folder: Path, *options: str, random: bool = False) -> None:
    """Begin the same training, which ends after step ``CUT_AFTER`` as if the machine had stopped."""
    steps = example.train

    def some(*args: object) -> Iterator[tuple]:
        for step, loss in steps(*args):
            yield step, loss
            if step == CUT_AFTER:
                raise CutError

    with mock.patch.object(example, "train", some):
        try:
            train(folder, *options, random=random)
        except CutError:
            return
    raise AssertionError("it was not cut")
