"""RegisterBlock against the formula in plain torch, and what the fused stream is good for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from vit_cases import (
    TINY,
    angles_of,
    assert_accurate,
    block,
    block_formula,
    gradients_of,
    leaves_of,
    watch_adds,
)

from vitreg_kernels import RegisterBlock, Rope
from vitreg_kernels.nn.block import Residual
from vitreg_kernels.nn.mlp import Mlp, SwiGLU

TOKENS = 21  # one CLS token, four registers, a 4 x 4 grid

KINDS = {
    "plain": TINY,
    "swiglu": replace(TINY, mlp="swiglu"),
    "no layer scale": replace(TINY, layer_scale=None),
    "qk_norm": replace(TINY, qk_norm=True),
    "no biases": replace(TINY, qkv_bias=False, proj_bias=False),
    "rope": replace(TINY, position="rope", rope_base=10.0),
    "eps": replace(TINY, eps=0.1),
}


class TestFormula:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_output_and_gradients(self, kind, dtype):
        config = KINDS[kind]
        module = block(config).to(dtype)
        x, upstream = torch.randn(2, TOKENS, config.dim).to(dtype), torch.randn(2, TOKENS, config.dim).to(dtype)
        angles = angles_of((4, 4), config, dtype) if kind == "rope" else None
        rope = None if angles is None else Rope(angles.cos().tile(2), angles.sin().tile(2))

        leaf = x.clone().requires_grad_()
        parameters = dict(module.named_parameters())
        actual = gradients_of(module(leaf, rope), {"x": leaf, **parameters}, upstream)

        def formula(dtype):
            leaves = {"x": x.detach().to(dtype).requires_grad_(), **leaves_of(module, dtype)}
            turns = None if angles is None else angles.to(torch.promote_types(dtype, torch.float32))
            return gradients_of(block_formula(leaves, leaves["x"], config, turns), leaves, upstream)

        exact, eager = formula(torch.float64), formula(dtype)
        assert min(gradient.abs().max() for gradient in exact.values()) > 1e-3
        assert_accurate(actual, exact, eager, terms=4 * config.dim)

    def test_hidden_dim(self):
        assert RegisterBlock(48, 3).mlp.fc1.weight.shape == (192, 48)
        assert RegisterBlock(48, 3, hidden_dim=40).mlp.fc1.weight.shape == (40, 48)
        module = RegisterBlock(48, 3, hidden_dim=40, mlp="swiglu")
        assert (module.mlp.fc1.weight.shape, module.mlp.fc2.weight.shape) == ((80, 48), (48, 40))

    def test_layer_scale_starts_where_it_was_told(self):
        module = RegisterBlock(48, 3, layer_scale=0.25)
        assert torch.equal(module.ls1.gamma, torch.full((48,), 0.25))
        assert torch.equal(module.ls2.gamma, module.ls1.gamma)

    def test_parameter_names(self):
        names = list(RegisterBlock(48, 3, qk_norm=True).state_dict())
        attention = ["qkv.weight", "qkv.bias", "q_norm.weight", "q_norm.bias", "k_norm.weight", "k_norm.bias"]
        attention += ["proj.weight", "proj.bias"]
        expected = ["norm1.weight", "norm1.bias", *(f"attn.{name}" for name in attention), "ls1.gamma"]
        expected += ["norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"]
        assert names == [*expected, "ls2.gamma"]
        assert not [name for name in RegisterBlock(48, 3, layer_scale=None).state_dict() if "ls" in name]


class TestStream:
    @pytest.mark.parametrize("layer_scale", [None, 0.5])
    @pytest.mark.parametrize("drop_path", [0.0, 0.5])
    def test_fused_blocks_equal_one_after_another(self, layer_scale, drop_path):
        config = replace(TINY, layer_scale=layer_scale, drop_path=drop_path)
        blocks = [block(config) for _ in range(3)]
        x, upstream = torch.randn(4, TOKENS, TINY.dim), torch.randn(4, TOKENS, TINY.dim)
        results = {}
        for fused in (False, True):
            torch.manual_seed(1)  # of the images that are left out
            leaf = x.clone().requires_grad_()
            stream = Residual(leaf) if fused else leaf
            for module in blocks:
                stream = module(stream)
            output = stream.added() if fused else stream
            parameters = {f"{i}.{k}": p for i, module in enumerate(blocks) for k, p in module.named_parameters()}
            results[fused] = gradients_of(output, {"x": leaf, **parameters}, upstream)
        assert results[True].keys() == results[False].keys()
        torch.testing.assert_close(results[True], results[False])

    def test_two_norms_a_block_do_all_the_adds(self, monkeypatch):
        adds = watch_adds(monkeypatch)
        modules, x = [block(), block()], torch.randn(2, TOKENS, TINY.dim)
        stream = modules[0](Residual(x))
        assert adds == [False, True]
        assert stream.branch is not None
        modules[1](stream)
        assert adds[2:] == [True, True]
        modules[0](x)
        assert adds[4:] == [False, True]

    def test_layer_scale_leaves_as_a_copy(self):
        module = block()
        left = module(Residual(torch.randn(2, TOKENS, TINY.dim))).layer_scale
        assert torch.equal(left, module.ls2.gamma)
        assert left.data_ptr() != module.ls2.gamma.data_ptr()

    @pytest.mark.parametrize("layer_scale", [False, True])
    @pytest.mark.parametrize("drop_path", [False, True])
    def test_added(self, layer_scale, drop_path):
        x, branch, gamma = torch.randn(3, 5, 8), torch.randn(3, 5, 8), torch.randn(8)
        kept = torch.tensor([0.0, 2.0, 2.0])
        stream = Residual(x, branch, gamma if layer_scale else None, kept if drop_path else None)
        factor = (gamma if layer_scale else 1.0) * (kept[:, None, None] if drop_path else 1.0)
        torch.testing.assert_close(stream.added(), x + factor * branch)
        assert Residual(x).added() is x
        # The stream keeps its dtype, whatever the parameters have.
        assert stream._replace(x=x.bfloat16()).added().dtype == torch.bfloat16

    def test_residual_norms_are_those_of_what_comes_in(self):
        module, seen = block(), []
        module.residual_norms.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
        x, branch, gamma = torch.randn(2, TOKENS, 48), torch.randn(2, TOKENS, 48), torch.randn(48)
        module(x)
        module(Residual(x, branch, gamma))
        torch.testing.assert_close(seen[0], x.norm(dim=-1))
        torch.testing.assert_close(seen[1], (x + gamma * branch).norm(dim=-1))
        assert not seen[1].requires_grad

    @pytest.mark.parametrize("fused", [False, True])
    def test_outputs_are_those_of_attention(self, fused):
        module, x = block(), torch.randn(2, TOKENS, TINY.dim)
        given = Residual(x) if fused else x
        result, statistics = module(given, outputs=("prefix_attention", "lse"))
        expected = module.attn(module.norm1(Residual(x)).normalized, outputs=("prefix_attention", "lse"))[1]
        assert torch.equal(statistics.prefix_attention, expected.prefix_attention)
        assert torch.equal(statistics.lse, expected.lse)
        plain = module(given)
        assert torch.equal(result[0] if fused else result, plain[0] if fused else plain)


class TestDropPath:
    def test_each_branch_of_each_image_is_kept_or_left_out(self):
        """Each of the four outcomes of an image is the formula with those branches, scaled by 1 / (1 - p) = 4 / 3."""
        module, images = block(drop_path=0.25), 4000
        x = torch.randn(1, TOKENS, TINY.dim).expand(images, -1, -1)
        with torch.no_grad():
            output = module(x)
            found = torch.zeros(images, 4, dtype=torch.bool)
            for outcome in range(4):
                scaled = {name: p.clone() for name, p in module.named_parameters()}
                scaled["ls1.gamma"] *= 4 / 3 * (outcome % 2)
                scaled["ls2.gamma"] *= 4 / 3 * (outcome // 2)
                expected = block_formula(scaled, x[:1], TINY)
                found[:, outcome] = (output - expected).abs().amax((1, 2)) < 1e-4
        assert torch.equal(found.sum(1), torch.ones(images, dtype=torch.long))
        probabilities = torch.tensor([0.25 * 0.25, 0.75 * 0.25, 0.25 * 0.75, 0.75 * 0.75])
        deviation = (found.float().mean(0) - probabilities) / (probabilities * (1 - probabilities) / images).sqrt()
        assert deviation.abs().max() < 5  # four standard normals exceed this once in some 400,000 runs

    def test_eval_leaves_nothing_out(self):
        module, x = block(drop_path=0.9).eval(), torch.randn(8, TOKENS, TINY.dim)
        assert torch.equal(module(x), module(x))
        torch.testing.assert_close(module(x), block()(x))

    def test_the_factors_of_a_bf16_block_are_exact(self):
        module = block(drop_path=0.1).bfloat16()
        factors = module(Residual(torch.randn(64, TOKENS, TINY.dim, dtype=torch.bfloat16))).drop_path
        assert factors.dtype == torch.float32
        assert {round(factor, 6) for factor in factors.tolist()} == {0.0, round(1 / 0.9, 6)}

    def test_dropout_is_for_training_only(self):
        x = torch.randn(2, TOKENS, TINY.dim)
        for options in ({"attn_drop": 0.5}, {"proj_drop": 0.5}):
            module = block(**options)
            assert not torch.equal(module(x), module(x))
            torch.testing.assert_close(module.eval()(x), block()(x))

    @pytest.mark.parametrize("kind", [Mlp, SwiGLU])
    def test_an_mlp_drops_after_both_linear_layers(self, kind):
        module, hidden = kind(48, 96, drop=0.25), []
        module.fc2.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0]))
        for x in (module(torch.randn(200, 48)), hidden[0]):
            assert x.eq(0.0).float().mean().item() == pytest.approx(0.25, abs=0.02)


class TestBackend:
    @pytest.mark.parametrize(
        ("name", "norms"), [(None, None), ("triton", "triton"), ("reference", "reference"), ("sdpa", None)]
    )
    def test_serves_whatever_op_has_one_of_the_name(self, name, norms):
        module = RegisterBlock(48, 3, backend=name)
        assert (module.attn.backend, module.norm1.backend, module.norm2.backend) == (name, norms, norms)

    def test_reference_agrees_with_the_default(self):
        x = torch.randn(2, TOKENS, TINY.dim)
        torch.testing.assert_close(block(backend="reference")(x), block()(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mlp": "relu"}, "mlp must be one of 'gelu', 'swiglu', not 'relu'"),
        ({"drop_path": 1.0}, "drop_path must be at least 0 and below 1, not 1.0"),
        ({"num_heads": 5}, "dim=48 must be a multiple of num_heads=5"),
        ({"backend": "flash"}, "unknown backend 'flash': expected None or one of 'triton', 'cpu', 'sdpa'"),
        ({"backend": {"attention": "composite"}}, "unknown backend 'composite'"),
        ({"backend": {"norms": "composite"}}, "no op 'norms' is called here: expected any of 'attention'"),
    ],
)
def test_bad_blocks_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RegisterBlock(**{"dim": 48, "num_heads": 3, **options})


def test_repr_says_what_it_is():
    assert "LayerScale(48, initial=1e-05)" in repr(RegisterBlock(48, 3, drop_path=0.1))
    assert "drop_path=0.1" in repr(RegisterBlock(48, 3, drop_path=0.1))
