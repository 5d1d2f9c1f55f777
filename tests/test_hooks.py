"""What a hook sees on every module of a RegisterViT, and that without one all stays fused."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from vit_cases import TINY, block, vit, watch_adds

from vitreg_kernels import RegisterAttention
from vitreg_kernels.functional import register_attention
from vitreg_kernels.nn.block import Residual
from vitreg_kernels.nn.hooks import hooked

BATCH, TOKENS, DIM, HEADS = 2, 21, TINY.dim, TINY.num_heads  # one CLS token, four registers, a 4 x 4 grid
PLAIN = replace(TINY, depth=2)
CONFIGS = {
    "plain": PLAIN,
    "qk_norm, swiglu": replace(PLAIN, qk_norm=True, mlp="swiglu"),
    "no layer scale, rope": replace(PLAIN, layer_scale=None, position="rope"),
}
STREAM = (BATCH, TOKENS, DIM)
# Of what a module gives, by the end of its name; None where it depends on the config.
SHAPES = {
    "patch_embed": (BATCH, 16, DIM),
    "patch_embed.proj": (BATCH, DIM, 4, 4),
    "attn.qkv": (BATCH, TOKENS, 3 * DIM),
    "attn.q_norm": (BATCH, HEADS, TOKENS, DIM // HEADS),
    "attn.k_norm": (BATCH, HEADS, TOKENS, DIM // HEADS),
    "attn.attn_drop": (BATCH, HEADS, TOKENS, TOKENS),
    "mlp.fc1": None,
    "mlp.drop": None,
    "residual_norms": (BATCH, TOKENS),
}
ALONE = {"blocks", "rope"}  # a list, and what gives a Rope


def images():
    return torch.randn(BATCH, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def names(config):
    return [name for name, _ in vit(config).named_modules() if name and name not in ALONE]


def every_module(test):
    cases = [(kind, name) for kind, config in CONFIGS.items() for name in names(config)]
    return pytest.mark.parametrize(("kind", "name"), cases)(test)


def shape_of(name):
    found = [shape for end, shape in SHAPES.items() if name == end or name.endswith(f".{end}")]
    return found[0] if found else STREAM


def outcome(model):
    """The features and all gradients."""
    model.zero_grad()
    output = model.forward_features(images())
    output.square().sum().backward()
    return output.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@every_module
def test_a_forward_hook_sees_one_tensor_in_and_out_and_changes_nothing(kind, name):
    model, seen = vit(CONFIGS[kind]), []
    plain = outcome(model)
    module = model.get_submodule(name)
    before = module.register_forward_pre_hook(lambda _, args: seen.append(args))
    after = module.register_forward_hook(lambda _, args, output: seen.append((args[0], output)))
    watched = outcome(model)
    assert seen
    assert all(isinstance(tensors[0], Tensor) for tensors in seen)
    assert isinstance(seen[1][1], Tensor)
    if shape_of(name):
        assert seen[1][1].shape == shape_of(name)
    torch.testing.assert_close(watched, plain, atol=1e-4, rtol=1e-4)
    before.remove()
    after.remove()
    assert torch.equal(outcome(model)[0], plain[0])


@every_module
@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_a_backward_hook_sees_the_gradient_of_that_tensor(kind, name, register):
    model, seen = vit(CONFIGS[kind]), []
    plain = outcome(model)
    getattr(model.get_submodule(name), register)(lambda *given: seen.append(given[-1]))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing when gradients are computed with respect to")
        watched = outcome(model)
    torch.testing.assert_close(watched, plain, atol=1e-4, rtol=1e-4)
    if name.endswith("residual_norms"):  # norms carry no gradient
        return
    assert seen
    for (gradient,) in seen:
        assert isinstance(gradient, Tensor)
        assert shape_of(name) in (None, gradient.shape)


@every_module
def test_what_a_hook_gives_instead_is_taken(kind, name):
    if name.endswith(("residual_norms",)):
        return  # which leads nowhere
    model = vit(CONFIGS[kind])
    plain = model.forward_features(images())
    factor = lambda output: torch.linspace(0.5, 2.0, output.shape[-1])  # noqa: E731
    model.get_submodule(name).register_forward_hook(lambda _, __, output: factor(output) * output)
    assert not torch.allclose(model.forward_features(images()), plain, atol=1e-3)


def doubled(_, args):
    return 2.0 * args[0]


def doubled_with_kwargs(_, args, kwargs):
    return (2.0 * args[0], *args[1:]), kwargs


@every_module
@pytest.mark.parametrize(("with_kwargs", "checkpointing"), [(False, False), (True, False), (False, True)])
def test_what_a_hook_before_gives_instead_is_all_that_changes(kind, name, with_kwargs, checkpointing):
    """The other arguments, such as the rotation, are as without it."""
    model = vit(CONFIGS[kind])
    model.checkpointing = checkpointing
    module = model.get_submodule(name)
    inner = module.forward
    # What is right: the same module, called fused or not, whose first argument its forward doubles itself.
    handle = module.register_forward_hook(lambda *_: None)
    module.forward = lambda first, *args, **options: inner(2.0 * first, *args, **options)
    expected = outcome(model)
    del module.forward
    handle.remove()
    hook = doubled_with_kwargs if with_kwargs else doubled
    module.register_forward_pre_hook(hook, with_kwargs=with_kwargs)
    torch.testing.assert_close(outcome(model), expected, atol=1e-5, rtol=1e-5)


def test_a_hook_before_the_rotation_gives_another_grid():
    model = vit(CONFIGS["no layer scale, rope"])
    plain = model.forward_features(images())
    module = model.rope
    handle = module.register_forward_pre_hook(lambda _, args, kwargs: (args, kwargs), with_kwargs=True)
    assert torch.equal(model.forward_features(images()), plain)
    handle.remove()
    module.register_forward_pre_hook(lambda _, args: ((2, 8),))
    assert not torch.allclose(model.forward_features(images()), plain, atol=1e-4)


def test_a_hook_on_the_list_of_blocks_is_told_once_where_the_model_is_called_that_nobody_calls_it():
    model = vit()
    model.blocks.register_forward_hook(lambda *_: None)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        model(images())
        model.forward_features(images())
    assert [warning.filename for warning in given] == [__file__]
    assert re.match(r"blocks has a hook but is a list, .* never called: .* blocks\[-1\]", str(given[0].message))


def test_without_hooks_all_is_fused(monkeypatch):
    model, adds = vit(), watch_adds(monkeypatch)
    model(images())
    assert adds == [False, *[True] * (2 * TINY.depth)]
    adds.clear()
    handles = [model.blocks[1].register_forward_hook(lambda *_: None)]
    handles.append(model.blocks[1].norm2.register_forward_hook(lambda *_: None))
    model(images())
    # The second block is given the stream and gives it back; its second norm is a plain one.
    assert adds == [False, True, False, False, False, True, True]
    adds.clear()
    for handle in handles:
        handle.remove()
    model(images())
    assert adds == [False, *[True] * (2 * TINY.depth)]


def test_hooks_of_fsdp_do_not_count():
    class State:
        def before(self, *_):
            pass

    module = block()
    assert not hooked(module)
    handle = module.register_forward_pre_hook(State().before)
    assert hooked(module)
    handle.remove()
    State.__module__ = "torch.distributed.fsdp._fully_shard._fsdp_state"
    module.register_forward_pre_hook(State().before)
    assert not hooked(module)
    module.register_forward_hook(lambda *_: None)
    assert hooked(module)


@pytest.mark.parametrize("training", [False, True])
def test_probabilities_on_attn_drop(training):
    """Those of the formula, with any mask and backend and in training; what is dropped is dropped from them."""
    module, x = RegisterAttention(DIM, HEADS, attn_drop=0.5).train(training), torch.randn(STREAM)
    keep = torch.rand(BATCH, 1, 1, TOKENS) > 0.3
    seen = []
    module.attn_drop.register_forward_hook(lambda _, args, output: seen.extend((args[0], output)))
    output, statistics = module(x, keep, outputs=("prefix_attention",))
    probabilities, dropped = seen
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(BATCH, HEADS, TOKENS))
    assert (probabilities.masked_select(~keep) == 0.0).all()
    torch.testing.assert_close(probabilities[:, :, :5], statistics.prefix_attention)
    assert torch.equal(probabilities, dropped) != training
    value = module.qkv(x).unflatten(2, (3, HEADS, -1))[:, :, 2].transpose(1, 2)
    torch.testing.assert_close(output, module.proj((dropped @ value).transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("backend", [None, "cpu", "sdpa", "reference", "triton"])
def test_probabilities_whatever_the_backend(backend):
    module, x, seen = RegisterAttention(DIM, HEADS, backend=backend), torch.randn(STREAM), []
    module.attn_drop.register_forward_hook(lambda _, args, output: seen.append(output))
    output = module(x)
    query, key, value = module.qkv(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    expected = register_attention(query, key, value, backend="reference").transpose(1, 2).flatten(2)
    torch.testing.assert_close(output, module.proj(expected))
    torch.testing.assert_close(seen[0], (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1))


def test_hooks_see_tensors_under_autocast_and_checkpointing():
    model, seen = vit(PLAIN), {}
    model.checkpointing = True
    for name in names(PLAIN):
        hook = lambda _, __, output, name=name: seen.setdefault(name, []).append(output)  # noqa: E731
        model.get_submodule(name).register_forward_hook(hook)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.forward_features(images()).sum().backward()
    assert seen.keys() == set(names(PLAIN))
    assert all(isinstance(output, Tensor) for outputs in seen.values() for output in outputs)


@pytest.mark.parametrize(
    "watched",
    [
        "blocks.1.norm1",
        "blocks.1.attn.attn_drop",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("", "blocks.1", "blocks.1.ls2")),
    ],
)
def test_a_hooked_model_compiles_whole(watched, dynamo):
    model, expected, counter = vit(), vit().forward_features(images()), CompileCounter()
    if watched:
        model.get_submodule(watched).register_forward_hook(lambda _, __, output: 1.0 * output)
    compiled = torch.compile(model.forward_features, backend=counter, fullgraph=True)
    torch.testing.assert_close(compiled(images()), expected, atol=1e-4, rtol=1e-4)
    assert counter.frame_count == 1


def test_blocks_compiled_one_by_one_still_share_a_graph(dynamo):
    counter, model = CompileCounter(), vit(replace(TINY, depth=6))
    for module in model.blocks:
        module.compile(backend=counter, fullgraph=True)
    model(images())
    assert counter.frame_count <= 2  # the first has nothing to add


def test_a_block_alone_gives_its_hooks_what_it_is_given():
    module, x, seen = block(), torch.randn(STREAM), []
    module.register_forward_hook(lambda _, args, output: seen.append((type(args[0]), type(output))))
    module(x)
    module(Residual(x))
    assert seen == [(Tensor, Tensor), (Residual, Residual)]


class Scaled(nn.Module):
    """Somebody's own module in the place of another."""

    def __init__(self, factor=0.5):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


PLACES = ["norm1", "norm2", "ls1", "ls2", "attn.q_norm", "attn.k_norm", "attn.attn_drop"]
EVERY_PLACE = pytest.mark.parametrize("place", PLACES)


def replace_module(model, place, module):
    parent, _, name = f"blocks.1.{place}".rpartition(".")
    setattr(model.get_submodule(parent), name, module)


@EVERY_PLACE
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_module_in_the_place_of_another_is_called(place, training, qk_norm):
    config = replace(PLAIN, qk_norm=qk_norm)
    models = [vit(config).train(training) for _ in range(2)]
    replace_module(models[0], place, Scaled())
    # The reference: the same as a hook on what stands there, which is called with plain tensors.
    module = models[1].blocks[1].get_submodule(place)
    module.register_forward_hook(lambda _, args, __: 0.5 * args[0])
    torch.testing.assert_close(models[0].forward_features(images()), models[1].forward_features(images()))


@EVERY_PLACE
def test_a_forward_on_the_instance_is_called(place):
    model, other = vit(PLAIN), vit(PLAIN)
    model.blocks[1].get_submodule(place).forward = lambda x: 0.5 * x
    replace_module(other, place, Scaled())
    assert torch.equal(model.forward_features(images()), other.forward_features(images()))


@EVERY_PLACE
@pytest.mark.parametrize("training", [False, True])
def test_an_identity_in_the_place_of_another(place, training):
    model, other = vit(PLAIN).train(training), vit(PLAIN).train(training)
    replace_module(model, place, nn.Identity())
    replace_module(other, place, Scaled(1.0))
    torch.testing.assert_close(model.forward_features(images()), other.forward_features(images()))


@pytest.mark.parametrize("place", ["norm1", "norm2"])
def test_a_plain_layer_norm_in_the_place_of_ours(place):
    model = vit(PLAIN)
    expected = outcome(model)
    norm = nn.LayerNorm(DIM, eps=PLAIN.eps)
    norm.load_state_dict(model.blocks[1].get_submodule(place).state_dict())
    replace_module(model, place, norm)
    torch.testing.assert_close(outcome(model)[0], expected[0], atol=1e-5, rtol=1e-5)


def test_no_dropout_at_all_stays_fused(monkeypatch):
    module, x = RegisterAttention(DIM, HEADS, attn_drop=0.5).train(), torch.randn(STREAM)
    module.attn_drop = nn.Identity()
    monkeypatch.setattr(RegisterAttention, "_by_formula", None)
    assert torch.equal(module(x), module.eval()(x))


class GradCam:
    """Of pytorch-grad-cam: a forward hook keeps what a layer gives, and a hook on that tensor its gradient."""

    def __init__(self, layer: nn.Module) -> None:
        layer.register_forward_hook(self.keep)

    def keep(self, _, __, output):
        self.activation = output.detach()
        output.register_hook(self.keep_gradient)

    def keep_gradient(self, gradient):
        self.gradient = gradient


@pytest.mark.parametrize("layer", ["norm1", "norm2", "ls1", "ls2", "attn", "mlp", ""])
def test_grad_cam(layer):
    """The gradient is that by which the output moves with the activation, found by finite differences in fp64."""
    model = vit().double()
    module = model.blocks[-1].get_submodule(layer)
    pixels, direction = images().double(), torch.randn(STREAM, dtype=torch.float64)
    kept = GradCam(module)
    model.forward_features(pixels).square().sum().backward()

    def moved(by):
        handle = module.register_forward_hook(lambda _, __, output: output + by * direction)
        value = model.forward_features(pixels).square().sum()
        handle.remove()
        return value

    slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
    gradient = kept.gradient  # of the last forward that had a backward
    torch.testing.assert_close((gradient * direction).sum(), slope.detach(), rtol=1e-6, atol=1e-6)
