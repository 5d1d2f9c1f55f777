"""A whole RegisterViT in the hands of torch.export, torch.jit.trace and the ONNX exporters."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.export import Dim

from vitreg_kernels import RegisterViT, UnsupportedError
from vitreg_kernels.nn.config import ViTConfig

pytestmark = [
    pytest.mark.usefixtures("dynamo"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning"),
]

POSITIONS = {
    "rope": {"position": "rope"},
    "antialiased": {"antialias": True},
    "plain": {"antialias": False},
    "offset": {"antialias": False, "interpolate_offset": 0.1},
}
TORCH_CODE = {"attention": "sdpa", "residual_norm": "composite", "assemble": "composite"}
BACKENDS = {"default": None, "kernels": "cpu", "torch code": TORCH_CODE, "reference": "reference"}
slow = pytest.mark.slow
every_position = pytest.mark.parametrize("position", POSITIONS)


def vit(position: str, backend: str, **changes) -> RegisterViT:
    torch.manual_seed(0)
    sizes = {"image_size": (32, 48), "patch_size": 8, "dim": 32, "depth": 2, "num_heads": 2, "num_registers": 2}
    config = ViTConfig(**sizes, **POSITIONS[position], **changes)
    return RegisterViT(config, backend=BACKENDS[backend]).eval()


class Features(nn.Module):
    """One tensor, as ONNX wants it."""

    def __init__(self, model: RegisterViT) -> None:
        super().__init__()
        self.model = model
        self.train(model.training)

    def forward(self, images):
        return self.model.forward_features(images)


@torch.no_grad()
def assert_same(exported, model, *shapes):
    for batch, height, width in shapes:
        images = torch.randn(batch, 3, height, width)
        torch.testing.assert_close(exported(images), model(images), rtol=1e-4, atol=1e-5)


class TestExport:
    @pytest.mark.parametrize(
        ("position", "backend"),
        [
            ("offset", "default"),
            ("rope", "kernels"),
            *(pytest.param(position, "default", marks=slow) for position in POSITIONS if position != "offset"),
            *(pytest.param("rope", backend, marks=slow) for backend in ("torch code", "reference")),
        ],
    )
    def test_any_batch_height_and_width(self, position, backend):
        """The example's own size, which the position rows are made for, and others, larger and smaller."""
        model = vit(position, backend)
        shapes = ({0: Dim("batch"), 2: 8 * Dim("rows"), 3: 8 * Dim("columns")},)
        exported = torch.export.export(model, (torch.randn(2, 3, 32, 48),), dynamic_shapes=shapes)
        assert_same(exported.module(), model, (2, 32, 48), (1, 32, 48), (3, 64, 40), (1, 16, 16), (2, 48, 32))

    @pytest.mark.parametrize(
        ("position", "example"),
        [("rope", (64, 64)), *(pytest.param("offset", size, marks=slow) for size in ((64, 64), (48, 32)))],
    )
    def test_whatever_the_size_of_the_example(self, position, example):
        model = vit(position, "default")
        shapes = ({0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO},)
        exported = torch.export.export(model, (torch.randn(2, 3, *example),), dynamic_shapes=shapes)
        assert_same(exported.module(), model, (2, 32, 48), (1, *example), (3, 40, 72))

    @slow
    def test_strictly(self):
        model = vit("offset", "default")
        shapes = ({0: Dim("batch"), 2: 8 * Dim("rows"), 3: 8 * Dim("columns")},)
        exported = torch.export.export(model, (torch.randn(2, 3, 32, 48),), dynamic_shapes=shapes, strict=True)
        assert_same(exported.module(), model, (1, 32, 48), (3, 64, 40))

    def test_one_size(self):
        model = vit("antialiased", "default")
        exported = torch.export.export(model, (torch.randn(2, 3, 48, 32),))
        assert_same(exported.module(), model, (2, 48, 32))
        assert {str(node.target) for node in exported.graph.nodes} >= {"vitreg.attention_forward_qkv.default"}

    def test_what_cannot_be_exported_says_so(self):
        model = vit("antialiased", "default", interpolate_offset=0.1)
        with pytest.raises(ValueError, match=r"interpolate_offset=0.1 and antialias=True"):
            torch.export.export(model, (torch.randn(2, 3, 48, 32),), dynamic_shapes=({2: 8 * Dim("rows")},))


class TestTrace:
    @every_position
    @pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "kernels"])
    @pytest.mark.parametrize("size", [(64, 40)], ids=str)
    def test_any_batch_with_gradients(self, position, backend, size, tmp_path):
        model = Features(vit(position, backend))
        for name, parameter in model.named_parameters():
            if name.endswith(("cls_token", "register_tokens")):
                nn.init.normal_(parameter)  # new ones are nearly 0: the norm behind them makes much of rounding
        traced = torch.jit.trace(model, torch.randn(2, 3, *size))
        traced.save(tmp_path / "model.pt")
        traced = torch.jit.load(tmp_path / "model.pt")
        assert_same(traced, model, (2, *size), (3, *size), (1, *size))
        gradients = []
        for function in (traced, model):
            images = torch.linspace(-1, 1, 2 * 3 * size[0] * size[1]).view(2, 3, *size).requires_grad_()
            gradients.append(torch.autograd.grad(function(images).sin().sum(), [images, *function.parameters()]))
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)

    @every_position
    def test_kernels_without_gradients(self, position, tmp_path):
        """By name only: torch's own check of a trace takes gradients away and must meet the same ops."""
        model = Features(vit(position, "kernels"))
        with torch.no_grad():
            traced = torch.jit.trace(model, torch.randn(2, 3, 32, 48))
        traced.save(tmp_path / "model.pt")
        assert_same(torch.jit.load(tmp_path / "model.pt"), model, (2, 32, 48), (3, 32, 48), (1, 32, 48))
        assert "vitreg::attention_forward_qkv" in str(traced.inlined_graph)

    def test_kernels_with_gradients_say_so(self):
        with pytest.raises(UnsupportedError, match=r"'cpu' .*torch.jit.trace outside torch.no_grad"):
            torch.jit.trace(vit("rope", "kernels"), torch.randn(2, 3, 32, 48))


@pytest.mark.parametrize("dynamo", [True, False])
class TestOnnx:
    @staticmethod
    def export(model, path, size, *, dynamo):
        axes = {"images": {0: "batch"}}
        options = {"dynamic_shapes": (axes["images"],)} if dynamo else {"dynamic_axes": axes}
        logging.disable(logging.WARNING)
        try:
            images = torch.randn(2, 3, *size)
            torch.onnx.export(model, (images,), path, dynamo=dynamo, input_names=["images"], verbose=False, **options)
        finally:
            logging.disable(logging.NOTSET)

    @pytest.mark.parametrize(
        ("position", "backend", "size"),
        [
            ("rope", "default", (32, 48)),
            pytest.param("offset", "default", (64, 40), marks=slow),
            pytest.param("antialiased", "torch code", (32, 48), marks=slow),
            pytest.param("plain", "reference", (64, 40), marks=slow),
        ],
    )
    def test_any_batch(self, position, backend, size, dynamo, tmp_path):
        onnxruntime = pytest.importorskip("onnxruntime")
        model = Features(vit(position, backend))
        self.export(model, tmp_path / "model.onnx", size, dynamo=dynamo)
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])

        def run(images):
            return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

        assert_same(run, model, (2, *size), (3, *size), (1, *size))

    def test_kernels_say_so(self, dynamo, tmp_path):
        with pytest.raises(Exception, match="backend 'cpu' cannot serve this call: does not support ONNX export"):
            self.export(Features(vit("rope", "kernels")), tmp_path / "model.onnx", (32, 48), dynamo=dynamo)
