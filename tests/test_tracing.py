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


REGISTERED = {
    "forward": lambda module, hook: module.register_forward_hook(hook),
    "forward, with kwargs": lambda module, hook: module.register_forward_hook(hook, with_kwargs=True),
    "pre-forward": lambda module, hook: module.register_forward_pre_hook(hook),
    "backward": lambda module, hook: module.register_full_backward_hook(hook),
}


@pytest.mark.parametrize("name", ["patch_embed", "rope", "blocks.1", "norm"])
@pytest.mark.parametrize("kind", REGISTERED)
def test_hooks_are_registered_after_tracing(name, kind):
    """Those from before would be written into the graph, and be run again by the leaf."""
    model, images, calls = vit(CONFIGS["rope"]), torch.randn(2, 3, 16, 16, requires_grad=True), []
    handle = REGISTERED[kind](model.get_submodule(name), lambda *_: calls.append(name))
    with pytest.raises(RuntimeError, match=rf"^{name} has hooks, .* register hooks after tracing"):
        fx.symbolic_trace(model)
    handle.remove()
    calls.clear()
    traced = fx.symbolic_trace(model)
    REGISTERED[kind](traced.get_submodule(name), lambda *_: calls.append(name))
    sum(group.sum() for group in traced(images)).backward()
    assert calls == ([] if (name, kind) == ("rope", "backward") else [name])  # what it gives takes no gradient


def test_hooks_on_a_traced_model_may_replace_what_they_see():
    """Before a block and after it, with all other arguments as they were, such as the rotation."""
    model, images = vit(CONFIGS["rope"]), torch.randn(2, 3, 16, 16)
    traced = fx.symbolic_trace(model)
    plain = model.forward_features(images)
    for name in ("blocks.1", "norm", "patch_embed"):
        traced.get_submodule(name).register_forward_pre_hook(lambda _, args: 1.0 * args[0])
        traced.get_submodule(name).register_forward_hook(lambda _, __, output: 1.0 * output)
    torch.testing.assert_close(torch.cat(traced(images), 1), plain, atol=1e-5, rtol=1e-5)
    traced.get_submodule("blocks.1").register_forward_hook(lambda _, __, output: 2.0 * output)
    model = vit(CONFIGS["rope"])
    model.blocks[1].register_forward_hook(lambda _, __, output: 2.0 * output)
    torch.testing.assert_close(torch.cat(traced(images), 1), model.forward_features(images), atol=1e-5, rtol=1e-5)


def test_hooks_within_a_leaf_run_once():
    model, calls = vit(), []
    model.blocks[1].attn.register_forward_hook(lambda *_: calls.append(1))
    fx.symbolic_trace(model)(torch.randn(2, 3, 16, 16))
    assert calls == [1]


@pytest.mark.parametrize("blocks", [False, True])
def test_a_traced_model_is_monitored_as_the_model_is(blocks):
    model, images = vit(), torch.randn(2, 3, 16, 16)
    layers = [(str(i), block) for i, block in enumerate(model.blocks)] if blocks else None
    with TokenNormMonitor(model, layers=layers) as monitor:
        fx.symbolic_trace(model)(images)
    assert monitor.compute().stats.cls.count.tolist() == [2] * (3 if blocks else 4)
