"""A monitored timm model and a RegisterViT with its weights give the same statistics."""

from __future__ import annotations

import pytest
import torch

from vitreg_kernels import TokenNormMonitor, load_vit

timm = pytest.importorskip("timm")


@pytest.fixture
def theirs():
    """Four registers, LayerScale, and weights large enough for norms to grow and to differ."""
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=64, depth=3, embed_dim=96, num_heads=3, reg_tokens=4, no_embed_class=True,
        init_values=0.5, num_classes=0, global_pool="",
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def test_timm_and_register_vit_give_the_same_numbers(theirs):
    assumed = {"eps": 1e-6, "mlp": "gelu", "grid": (4, 4), "antialias": True, "interpolate_offset": 0.0}
    ours = load_vit(theirs.state_dict(), num_heads=3, **assumed).eval()
    images = torch.randn(4, 3, 64, 64)
    rows = []
    for model in (ours, theirs):
        with torch.no_grad(), TokenNormMonitor(model) as monitor:
            model(images)
        rows.append([row for row in monitor.compute().rows() if row.layer != "embedding"])
    assert len(rows[0]) == len(rows[1]) == 3 * 3
    for our, their in zip(*rows, strict=True):
        assert our[:3] == their[:3], "layer, group and count"
        for name in ("mean", "std", "min", "max"):
            assert getattr(our, name) == pytest.approx(getattr(their, name), rel=1e-5, abs=1e-4), name
        # What lies within a rounding of a bin's edge may be counted on its other side.
        for name in ("median", "threshold"):
            assert getattr(our, name) == pytest.approx(getattr(their, name), rel=1 / 64), name


def test_timm_trains_bitwise_the_same_and_as_one_graph(theirs, dynamo):
    images = torch.randn(2, 3, 64, 64)

    def gradients(model):
        theirs.zero_grad()
        model(images).square().sum().backward()
        return [parameter.grad for parameter in theirs.parameters()]

    plain = gradients(theirs)
    with TokenNormMonitor(theirs) as monitor:
        assert all(map(torch.equal, gradients(theirs), plain))
        eager = monitor.compute()
        monitor.reset()
        gradients(torch.compile(theirs, backend="aot_eager", fullgraph=True))
    assert monitor.layers == ("blocks.0", "blocks.1", "blocks.2")
    assert all(map(torch.equal, monitor.compute().stats.patches, eager.stats.patches))
