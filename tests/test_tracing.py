"""torch.fx takes the modules as leaves, and traces a RegisterViT into them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import fx, nn
from vit_cases import TINY, block, vit

from vitreg_kernels import RegisterAttention, RegisterBlock, RegisterTokens, TokenNormMonitor
from vitreg_kernels.nn.block import Residual, ResidualLayerNorm

DIM, TOKENS = TINY.dim, 21
LEAVES = (RegisterAttention, RegisterBlock, ResidualLayerNorm, RegisterTokens)
CONFIGS = {
    "absolute": TINY,
    "rope": replace(TINY, position="rope"),
    "all rows": replace(TINY, position_rows="prefix", layer_scale=None),
    "no prefix": replace(TINY, num_registers=0, num_cls_tokens=0),
}


class Holding(nn.Module):
    """Somebody's model around one of the modules."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.head = nn.Linear(DIM, DIM)

    def forward(self, x):
        return self.head(self.module(2.0 * x)).relu()


class FusedBlocks(nn.Module):
    """A stack that hands a ``Residual`` along."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.norm = block(), block(), ResidualLayerNorm(DIM)

    def forward(self, x):
        residual, normalized, _ = self.norm(self.second(self.first(Residual(x))))
        return residual + normalized


class Registers(nn.Module):
    def __init__(self):
        super().__init__()
        self.registers, self.mix = RegisterTokens(DIM), nn.Linear(DIM, DIM)

    def forward(self, x):
        return self.registers.remove(self.mix(self.registers(x)))


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_module_within_a_model_is_one_node(leaf):
    module = leaf(DIM) if leaf in (ResidualLayerNorm, RegisterTokens) else leaf(DIM, 3)
    model, x = Holding(module), torch.randn(2, TOKENS, DIM)
    traced = fx.symbolic_trace(model)
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert calls == ["module", "head"]
    assert traced.get_submodule("module") is module
    torch.testing.assert_close(traced(x), model(x))


@pytest.mark.parametrize("model", [FusedBlocks, Registers])
def test_a_stack_of_leaves(model):
    torch.manual_seed(0)
    module, x = model(), torch.randn(2, TOKENS, DIM)
    traced = fx.symbolic_trace(module)
    torch.testing.assert_close(traced(x), module(x))
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert calls == [name for name, _ in module.named_children()]


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_leaf_that_is_traced_alone_says_what_it_is(leaf):
    module = leaf(DIM) if leaf in (ResidualLayerNorm, RegisterTokens) else leaf(DIM, 3)
    with pytest.raises(TypeError, match=f"torch.fx takes a {leaf.__name__} as a leaf .* trace a model that holds it"):
        fx.symbolic_trace(module)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("hold", [False, True], ids=["alone", "held"])
def test_a_register_vit(kind, hold):
    """Every size of image by one graph, with gradients; its nodes are the blocks, which give tensors."""
    model = vit(CONFIGS[kind])
    if hold:
        model = nn.Sequential(model)
    traced = fx.symbolic_trace(model)
    prefix = "0." if hold else ""
    targets = [str(node.target) for node in traced.graph.nodes if node.op == "call_module"]
    assert [f"{prefix}blocks.{i}" for i in range(3)] == [t for t in targets if "blocks" in t]
    for shape in ((2, 3, 16, 16), (1, 3, 8, 24)):
        images = torch.randn(shape)
        for actual, expected in zip(traced(images), model(images), strict=True):
            torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    sum(group.sum() for group in traced(images)).backward()
    assert all(p.grad is not None for p in model.parameters())
    seen = {}
    for name, module in traced.named_modules():
        if name in targets and not name.endswith("rope"):
            module.register_forward_hook(lambda _, __, output, name=name: seen.setdefault(name, output))
    traced(images)
    assert all(isinstance(output, torch.Tensor) for output in seen.values())


def test_a_traced_model_is_monitored_as_the_model_is():
    model, images = vit(), torch.randn(2, 3, 16, 16)
    with TokenNormMonitor(model) as monitor:
        fx.symbolic_trace(model)(images)
    assert monitor.compute().stats.cls.count.tolist() == [2] * 4
