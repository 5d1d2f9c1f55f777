"""Graphs that were compiled before a monitor was attached, or for another model of the class, count right as well."""

from __future__ import annotations

import random
from functools import partial, update_wrapper

import pytest
import torch
from monitor_cases import LAYOUT, Doublings, layers_of, monitored, small_vit, tokens
from torch import nn

from vitreg_kernels import RegisterViT, TokenNormMonitor, ViTConfig
from vitreg_kernels.ops.token_norms.types import NormDistribution

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def tiny_vit():
    return RegisterViT(ViTConfig(image_size=16, patch_size=8, dim=16, depth=2, num_heads=1, layer_scale=None))


def patched_doublings():
    """Modules whose forward somebody has put on the instance."""
    model = Doublings()
    for block in model.blocks:
        block.forward = partial(type(block).forward, block)
    return model


KINDS = {
    "patched doublings": (patched_doublings, monitored, tokens()),
    "doublings": (Doublings, monitored, tokens()),
    "register vit": (tiny_vit, TokenNormMonitor, IMAGES),
    "blocks of a register vit": (tiny_vit, lambda vit: TokenNormMonitor(vit, layers=layers_of(vit)), IMAGES),
}


def whole(model):
    return torch.compile(model, backend="eager", fullgraph=True)


def in_place(model):
    model.compile(backend="eager", fullgraph=True)
    return model


def within_another(model):
    return torch.compile(nn.Sequential(model), backend="eager", fullgraph=True)


def each_block(model):
    for block in model.blocks:
        block.compile(backend="eager", fullgraph=True)
    return model


def each_block_wrapped(model):
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block, backend="eager", fullgraph=True)
    return model


CASES = [
    *(("doublings", way) for way in (whole, in_place, within_another, each_block, each_block_wrapped)),
    ("patched doublings", whole),
    # Layers that are given, in one graph of the whole: the doublings' are, and trace in a tenth of the time.
    *(pytest.param("register vit", way, marks=pytest.mark.slow) for way in (whole, each_block)),
    ("blocks of a register vit", each_block),
]


def counts(monitor):
    """Of CLS tokens, at each layer."""
    return monitor.compute().stats.cls.count.tolist()


# The walk meets more kinds of graph than a program would: none may be left to eager, where all is right anyway.
@torch._dynamo.config.patch(recompile_limit=64)
@pytest.mark.parametrize(("kind", "compiled"), CASES)
def test_any_order_of_attaching_running_and_removing(kind, compiled, dynamo):
    """Two models of a class, each with 0 to 2 monitors, in an order drawn at random; each counts its own."""
    make, attach, x = KINDS[kind]
    models = [make(), make()]
    runs = [compiled(model) for model in models]
    draw = random.Random(f"{kind} {compiled.__name__}")
    live, runs_seen = ([], []), {}
    for run in runs[draw.randrange(2) :]:  # unmonitored, one of them or both
        run(x)
    for _ in range(8):
        which = draw.randrange(2)
        if live[which] and (len(live[which]) == 2 or draw.random() < 0.5):
            live[which].pop(draw.randrange(len(live[which]))).remove()
        else:
            monitor = attach(models[which])
            live[which].append(monitor)
            runs_seen[monitor] = 0
        for monitors, run in zip(live, runs, strict=True):
            run(x)
            for monitor in monitors:
                runs_seen[monitor] += 1
        for monitor, seen in runs_seen.items():
            assert counts(monitor) == [len(x) * seen] * len(monitor.layers)


@pytest.mark.parametrize("own", [None, lambda x: 3.0 * x, partial(torch.mul, 3.0)], ids=["none", "function", "partial"])
def test_a_monitored_module_is_left_as_it_was(own):
    model = Doublings()
    if own:
        model.blocks[0].forward = own
    before = [dict(block.__dict__) for block in model.blocks]
    first, second = monitored(model), monitored(model)
    assert torch.equal(model.blocks[0](tokens()), (3.0 if own else 2.0) * tokens())
    first.remove()
    second.remove()
    second.remove()
    assert [dict(block.__dict__) for block in model.blocks] == before


@pytest.mark.parametrize("monitored_again", [False, True])
def test_a_forward_that_was_put_over_the_monitors_stays(monitored_again):
    model = Doublings()
    monitor = monitored(model)
    # As accelerate puts one: over whatever is there, which it keeps to call it and to put it back.
    forward = update_wrapper(partial(lambda inner, x: inner(x) + 1.0, model.blocks[0].forward), model.blocks[0].forward)
    model.blocks[0].forward = forward
    covered = forward.__wrapped__
    monitor.remove()
    assert model.blocks[0].forward is forward
    assert torch.equal(model.blocks[0](tokens()), 2.0 * tokens() + 1.0)
    model.blocks[0].forward = covered  # and takes it off again
    if monitored_again:
        monitored(model).remove()
    else:
        assert torch.equal(model.blocks[0](tokens()), 2.0 * tokens())
    assert "forward" not in model.blocks[0].__dict__
    assert torch.equal(model.blocks[0](tokens()), 2.0 * tokens())


def test_one_module_under_two_names_is_counted_under_both(dynamo):
    model = Doublings()
    run = whole(model)
    run(tokens())
    layers = [("a", model.blocks[0]), ("b", model.blocks[0])]
    monitor = TokenNormMonitor(model, layers=layers, layout=LAYOUT)
    run(tokens())
    assert counts(monitor) == [2, 2]
    monitor.remove()
    run(tokens())
    assert counts(monitor) == [2, 2]
    assert "forward" not in model.blocks[0].__dict__


@pytest.mark.parametrize("layers", [1, 2, [0], [-2], [0, 2], [2, 0], [1, 1]])
@pytest.mark.parametrize("norm", [False, True])
def test_intermediate_layers_count_what_they_run_once(layers, norm):
    vit = small_vit()
    with TokenNormMonitor(vit) as monitor:
        vit.intermediate_layers(IMAGES, layers, norm=norm)
    wanted = range(3 - layers, 3) if isinstance(layers, int) else [i % 3 for i in layers]
    run = max(wanted) + 1  # blocks; "embedding" comes before the first
    assert counts(monitor) == [2] * (run + 1) + [0] * (3 - run)


def test_a_model_on_the_meta_device_gets_its_weights_later():
    vit = small_vit()
    weights = vit.state_dict()
    vit.to("meta")
    monitor = TokenNormMonitor(vit)
    assert counts(monitor) == [0] * 4
    vit.to_empty(device="cpu").load_state_dict(weights)
    vit(IMAGES)
    assert counts(monitor) == [2] * 4


def test_trying_out_shapes_counts_nothing():
    """Tokens on the meta device have no norms, and must not draw the counts there."""
    model = Doublings()
    monitor = monitored(model)
    model(tokens())
    model.to("meta")(tokens().to("meta"))
    assert counts(monitor) == [2, 2, 2]


class Elsewhere(torch.Tensor):
    """Says that it is on another device, as far as a machine with one device can."""

    device = torch.device("cpu", 0)

    def to(self, device):
        return self.as_subclass(torch.Tensor)


def test_counts_follow_a_model_that_is_moved():
    model = Doublings()
    monitor = monitored(model)
    model(tokens())
    for tap in monitor._taps:
        tap.into = tap.into._replace(sums=tap.into.sums.as_subclass(Elsewhere))
    model(tokens())
    assert {type(tap.into.sums) for tap in monitor._taps} == {torch.Tensor}
    assert counts(monitor) == [4, 4, 4]


def test_a_move_under_the_compiler_is_refused_in_one_sentence(dynamo):
    model = Doublings()
    monitor = monitored(model)
    monitor._taps[0].into = NormDistribution.zeros((3,), "meta")
    with pytest.raises(Exception, match="the monitor was attached while the model was on another device than cpu"):
        whole(model)(tokens())
