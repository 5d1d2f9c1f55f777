"""What a module is given, and told when it is made, is right or refused in one sentence, before torch refuses it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import nn
from vit_cases import TINY

from vitreg_kernels import RegisterAttention, RegisterBlock, RegisterViT, UnsupportedError
from vitreg_kernels.ops.attention import features
from vitreg_kernels.ops.attention.backends import BACKENDS

SMALL = replace(TINY, depth=1)
IMAGES, TOKENS = torch.randn(2, 3, 16, 16), torch.randn(2, 21, TINY.dim)
# How each is made, what goes in, and what its sentence calls it.
MODULES = {
    "vit": (lambda **options: RegisterViT(SMALL, **options), IMAGES, "images"),
    "attention": (lambda **options: RegisterAttention(TINY.dim, TINY.num_heads, **options), TOKENS, "x"),
    "block": (lambda **options: RegisterBlock(TINY.dim, TINY.num_heads, **options), TOKENS, "x"),
}
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
every_module = pytest.mark.parametrize("kind", MODULES)


def refused(error, fragments, function, *args, **options):
    with pytest.raises(error) as raised:
        function(*args, **options)
    assert type(raised.value) is error
    text = str(raised.value)
    for fragment in fragments:
        assert fragment in text
    assert "\n" not in text
    assert not text.endswith((".", " "))


def named(dtype):
    return str(dtype).removeprefix("torch.")


@every_module
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("given", "weights"), product((*FLOATS, torch.uint8), FLOATS), ids=str)
def test_dtypes_that_differ(kind, given, weights, autocast):
    make, x, name = MODULES[kind]
    module, x = make(dtype=weights), x.to(given)
    cast = autocast and {given, weights} <= {torch.float32, torch.float16, torch.bfloat16}
    with torch.autocast("cpu", dtype=autocast) if autocast else nullcontext(), torch.no_grad():
        if given == weights or cast:
            module(x)
        elif kind == "block" and {given, weights} - {torch.float32, torch.float16, torch.bfloat16}:
            # Its first norm says so, which takes fp32, fp16 and bf16 together.
            refused(TypeError, ["must be fp", ", got ["], module, x)
        else:
            words = [f"{name} and the model's weights must have one dtype, got {named(given)} and {named(weights)}"]
            words += [f"{name}.to({weights})"]
            narrow = {given, weights} <= {torch.float32, torch.float16, torch.bfloat16}
            refused(TypeError, [*words, *(["autocast"] if narrow else [])], module, x)


@pytest.mark.parametrize("kind", ["vit", "attention"])
def test_devices_that_differ(kind):
    make, x, name = MODULES[kind]
    refused(ValueError, ["meta device and has no weights", name, "to_empty"], make(device="meta"), x)
    refused(ValueError, [f"{name} and the model must be on one device, got meta and cpu"], make(), x.to("meta"))


@pytest.mark.parametrize("kind", ["vit", "attention"])
def test_layers_that_bring_or_cast_their_own_weights_are_left_alone(kind):
    """As offloading, layerwise casting and quantisation have them: what the weights are is known when they are used."""
    make, x, _ = MODULES[kind]

    class Quantised(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight.to(x.dtype))

    def layer(module):
        return (module.patch_embed if kind == "vit" else module), ("proj" if kind == "vit" else "qkv")

    module = make()
    owner, name = layer(module)
    inner = getattr(owner, name).to(torch.bfloat16)
    inner.register_forward_pre_hook(lambda layer, args: layer.float() and None)
    module(x)

    module = make()
    owner, name = layer(module)
    inner = getattr(owner, name)
    whole = inner.forward
    inner.to(torch.bfloat16).forward = lambda x: inner.float() and whole(x)
    module(x)

    if kind == "attention":
        quantised = Quantised(TINY.dim, 3 * TINY.dim, bias=False)
        quantised.weight = nn.Parameter(torch.ones(3 * TINY.dim, TINY.dim, dtype=torch.int8), requires_grad=False)
        module.qkv = quantised
        module(x)


def without_dropout():
    return [b.name for b in BACKENDS if features.DROPOUT not in b.requirements.features]


@every_module
@pytest.mark.parametrize("name", [None, *(b.name for b in BACKENDS)])
@pytest.mark.parametrize("as_mapping", [False, True])
def test_dropout_of_a_backend_that_has_none_is_refused_when_the_module_is_made(kind, name, as_mapping):
    def make(attn_drop):
        backend = {"attention": name} if as_mapping else name
        if kind == "vit":
            return RegisterViT(replace(SMALL, attn_drop=attn_drop), backend=backend)
        return MODULES[kind][0](attn_drop=attn_drop, backend=backend)

    make(0.0)
    if name not in without_dropout():
        make(0.1)
        return
    others = "sdpa, sdpa_efficient, sdpa_math, reference"
    words = [f"backend {name!r} does not support dropout, which attn_drop=0.1 asks for", others]
    refused(UnsupportedError, words, make, 0.1)
