"""RegisterAttention and RegisterTokens as torch modules. Agreement with timm and DINOv2 is in tests/integrations."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from vitreg_kernels import RegisterAttention, RegisterTokens, Rope, TokenLayout, UnsupportedError
from vitreg_kernels.measure.accuracy import compare

DIM, HEADS, TOKENS = 48, 3, 21  # one CLS token, four registers, a 4 x 4 grid


def attention(**options):
    """A module whose logits are large enough for the softmax to matter."""
    module = RegisterAttention(DIM, HEADS, **options)
    with torch.no_grad():
        module.qkv.weight.normal_(std=1.5 * DIM**-0.5)
    return module


def formula(module, x, mask=None):
    """The module's output and attention probabilities in plain torch, in the dtype of ``x``."""
    query, key, value = module.qkv(x).view(*x.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    query, key = module.q_norm(query), module.k_norm(key)
    logits = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    probabilities = logits.softmax(-1)
    attended = (probabilities @ value).transpose(1, 2).flatten(2)
    return module.proj(attended), probabilities, attended


def assert_follows_formula(module, x, mask=None):
    exact_mask = mask.double() if mask is not None and mask.is_floating_point() else mask
    exact = formula(copy.deepcopy(module).double(), x.double(), exact_mask)[0]
    accuracy = compare(module(x, mask), exact, formula(module, x, mask)[0], terms=DIM)
    assert accuracy.passed, accuracy


def gradients(module, x, output, gradient):
    """By name, of ``x`` and of every parameter."""
    names, parameters = zip(*module.named_parameters(), strict=True)
    values = torch.autograd.grad(output, [x, *parameters], gradient)
    found = dict(zip(("x", *names), values, strict=True))
    if "k_norm.bias" in found:
        # What is added to every key changes no softmax: this gradient is exactly zero, and all that is left of it is
        # the rounding of terms that cancel. They are as large as those of the query's bias: judge both together.
        found["norm biases"] = torch.stack((found.pop("q_norm.bias"), found.pop("k_norm.bias")))
    return found


class TestRegisterAttention:
    def test_parameter_names(self):
        assert list(attention().state_dict()) == ["qkv.weight", "qkv.bias", "proj.weight", "proj.bias"]
        names = list(attention(qk_norm=True, qkv_bias=False, proj_bias=False).state_dict())
        norms = ["q_norm.weight", "q_norm.bias", "k_norm.weight", "k_norm.bias"]
        assert names == ["qkv.weight", *norms, "proj.weight"]

    @pytest.mark.parametrize("backend", [None, "sdpa", "reference"])
    @pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "qk_norm"])
    def test_computes_the_formula(self, backend, qk_norm):
        torch.manual_seed(0)
        assert_follows_formula(attention(qk_norm=qk_norm, backend=backend), torch.randn(2, TOKENS, DIM))

    @pytest.mark.parametrize("shape", [(1, 1, TOKENS, TOKENS), (2, 1, 1, TOKENS), (2, HEADS, TOKENS, TOKENS)])
    @pytest.mark.parametrize("kind", ["bool", "additive"])
    def test_masks(self, shape, kind):
        torch.manual_seed(0)
        mask = torch.randn(shape)
        if kind == "bool":
            mask = mask > -0.5
            mask[..., 0] = True  # every query keeps a key
        assert_follows_formula(attention(), torch.randn(2, TOKENS, DIM), mask)

    def test_padded_keys_are_as_good_as_absent(self):
        torch.manual_seed(0)
        module, x = attention(), torch.randn(1, TOKENS, DIM)
        keys = (torch.arange(TOKENS) < 12)[None, None, None]
        torch.testing.assert_close(module(x, keys)[:, :12], module(x[:, :12]))

    def test_rope_leaves_the_prefix_alone(self):
        torch.manual_seed(0)
        x, angles = torch.randn(1, TOKENS, DIM), torch.rand(TOKENS - 5, DIM // HEADS // 2).repeat(1, 2)
        rope = Rope(angles.cos(), angles.sin())
        module = attention()
        assert (module(x, rope=rope) - module(x)).abs().max() > 1e-3
        still = Rope(torch.ones_like(angles), torch.zeros_like(angles))
        torch.testing.assert_close(module(x, rope=still), module(x))
        with pytest.raises(ValueError, match="rope"):  # one row a patch: with other registers there are other patches
            attention(num_registers=3)(x, rope=rope)

    @pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "qk_norm"])
    def test_outputs(self, qk_norm):
        torch.manual_seed(0)
        module, x = attention(qk_norm=qk_norm), torch.randn(2, TOKENS, DIM)
        names = ("prefix_attention", "received_attention", "token_norms")
        output, statistics = module(x, outputs=names)
        _, probabilities, attended = formula(copy.deepcopy(module).double(), x.double())
        close = {"atol": 1e-5, "rtol": 1e-4, "check_dtype": False}
        torch.testing.assert_close(statistics.prefix_attention, probabilities[:, :, :5], **close)
        torch.testing.assert_close(statistics.received_attention, probabilities.mean(2), **close)
        torch.testing.assert_close(statistics.token_norms, attended.norm(dim=-1), **close)
        assert statistics.lse is None
        assert not statistics.prefix_attention.requires_grad
        torch.testing.assert_close(output, module(x))

    @pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "qk_norm"])
    def test_gradients_reach_everything(self, qk_norm):
        torch.manual_seed(0)
        module = attention(qk_norm=qk_norm)
        x, gradient = torch.randn(2, TOKENS, DIM, requires_grad=True), torch.randn(2, TOKENS, DIM)
        double, wide = copy.deepcopy(module).double(), x.detach().double().requires_grad_()
        actual = gradients(module, x, module(x), gradient)
        eager = gradients(module, x, formula(module, x)[0], gradient)
        exact = gradients(double, wide, formula(double, wide)[0], gradient.double())
        for name in exact:
            assert exact[name].abs().max() > 1e-3, name
            accuracy = compare(actual[name], exact[name], eager[name], terms=2 * TOKENS)
            assert accuracy.passed, (name, accuracy)

    def test_dropout_is_for_training_only(self):
        torch.manual_seed(0)
        x = torch.randn(2, TOKENS, DIM)
        for options in ({"attn_drop": 0.5}, {"proj_drop": 0.5}):
            module = attention(**options)
            assert not torch.equal(module(x), module(x))
            module.eval()
            assert torch.equal(module(x), module(x))
            assert_follows_formula(module, x)

    def test_dropped_weights_average_to_the_output(self):
        torch.manual_seed(0)
        module, x = attention(attn_drop=0.25), torch.randn(1, TOKENS, DIM)
        with torch.no_grad():
            draws = module(x.expand(2000, -1, -1))
            expected = module.eval()(x)[0]
        deviation = (draws.mean(0) - expected) / (draws.std(0) / 2000**0.5)
        assert deviation.abs().max() < 5.5  # a thousand standard normals exceed this once in some 25,000 runs
        assert deviation.abs().mean() < 1.0

    @pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
    def test_a_norm_that_answers_in_fp32(self, autocast):
        class WideNorm(nn.LayerNorm):
            def forward(self, x):
                return super().forward(x).float()

        module = attention(qk_norm=True, norm_layer=WideNorm, dtype=None if autocast else torch.bfloat16)
        x = torch.randn(1, TOKENS, DIM, dtype=module.qkv.weight.dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert module(x).dtype == torch.bfloat16

    @pytest.mark.parametrize(
        "qk_norm", [pytest.param(False, id="plain"), pytest.param(True, id="qk_norm", marks=pytest.mark.slow)]
    )
    @torch._dynamo.config.patch(error_on_recompile=True)
    def test_compiles_whole_with_gradients(self, qk_norm):
        torch._dynamo.reset()
        torch.manual_seed(0)
        module = attention(qk_norm=qk_norm)
        compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
        for tokens in (21, 33):
            x = torch.randn(2, tokens, DIM)
            results = {}
            for name, run in (("eager", module), ("compiled", compiled)):
                leaf = x.clone().requires_grad_()
                output, statistics = run(leaf, outputs=("prefix_attention",))
                gradients = torch.autograd.grad(output.square().sum(), [leaf, *module.parameters()])
                results[name] = [output, statistics.prefix_attention, *gradients]
            torch.testing.assert_close(results["compiled"], results["eager"])

    @pytest.mark.slow
    def test_inductor(self):
        torch.manual_seed(0)
        module, x = attention(), torch.randn(2, TOKENS, DIM)
        module.zero_grad()
        output = torch.compile(module, fullgraph=True)(x)
        output.square().sum().backward()
        gradients = [p.grad.clone() for p in module.parameters()]
        torch.testing.assert_close(output, module(x))
        expected = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
        torch.testing.assert_close(gradients, list(expected))

    @pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
    def test_copies_are_independent_and_equal(self, copier):
        module, x = attention(qk_norm=True, num_registers=2), torch.randn(1, TOKENS, DIM)
        twin = copier(module)
        assert torch.equal(twin(x), module(x))
        assert (twin.layout, repr(twin)) == (module.layout, repr(module))
        nn.init.zeros_(twin.proj.weight)
        assert not torch.equal(twin(x), module(x))

    def test_meta_device_then_weights(self):
        with torch.no_grad():
            module = RegisterAttention(DIM, HEADS, qk_norm=True, device="meta", dtype=torch.float32)
            assert all(p.is_meta for p in module.parameters())
            real, x = attention(qk_norm=True), torch.randn(1, TOKENS, DIM)
            module.to_empty(device="cpu").load_state_dict(real.state_dict())
            assert torch.equal(module(x), real(x))

    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
    @pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
    def test_nested_tensors_are_told_to_come_as_a_pack(self, layout):
        x = torch.nested.nested_tensor([torch.randn(n, DIM) for n in (6, 9)], layout=layout)
        with pytest.raises(TypeError, match=r"register_attention_qkv .* cu_seqlens=x.offsets\(\)"):
            attention()(x)

    def test_repr_says_what_it_is(self):
        text = repr(RegisterAttention(384, 6, num_registers=2, backend="sdpa")).splitlines()[1].strip()
        assert text == "384, num_heads=6, num_registers=2, num_cls_tokens=1, backend='sdpa'"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"dim": 0}, "dim must be a positive int, not 0"),
            ({"dim": 48.0}, "dim must be a positive int, not 48.0"),
            ({"num_heads": 0}, "num_heads must be a positive int, not 0"),
            ({"num_heads": True}, "num_heads must be a positive int, not True"),
            ({"attn_drop": 1.0}, "attn_drop must be at least 0 and below 1, not 1.0"),
            ({"num_heads": 5}, "dim=48 must be a multiple of num_heads=5"),
            ({"num_registers": -1}, "num_registers must be a non-negative int, not -1"),
            ({"backend": "fastest"}, "unknown backend 'fastest'.* 'sdpa'"),
        ],
    )
    def test_bad_modules_are_refused(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            RegisterAttention(**{"dim": DIM, "num_heads": HEADS, **arguments})

    @pytest.mark.parametrize(
        ("shape", "message"),
        [
            ((TOKENS, DIM), r"x must be \[B, N, 48\], not of shape \(21, 48\)"),
            ((2, TOKENS, 40), r"x must be \[B, N, 48\], not of shape \(2, 21, 40\)"),
            ((2, 4, DIM), "x has 4 tokens, fewer than the 1 CLS and 4 register tokens"),
        ],
    )
    def test_bad_inputs_are_refused(self, shape, message):
        with pytest.raises(ValueError, match=message):
            attention()(torch.zeros(shape))

    def test_causal_attention_is_refused(self):
        x = torch.zeros(1, TOKENS, DIM)
        attention()(x, is_causal=False)
        with pytest.raises(ValueError, match="is_causal=True is not served"):
            attention()(x, is_causal=True)

    def test_a_named_backend_runs_or_raises(self):
        module = attention(backend="xformers")
        with pytest.raises(UnsupportedError, match=r"backend 'xformers' cannot serve this call: .*cpu"):
            module(torch.randn(1, TOKENS, DIM))

    @pytest.mark.parametrize("shape", [(0, TOKENS, DIM), (2, 5, DIM)], ids=["empty batch", "prefix only"])
    def test_smallest_inputs(self, shape):
        assert attention()(torch.randn(shape)).shape == shape


class TestRegisterTokens:
    @pytest.mark.parametrize(("cls_tokens", "registers"), [(1, 4), (2, 1), (0, 8)])
    def test_go_in_behind_the_cls_tokens_and_come_out(self, cls_tokens, registers):
        module = RegisterTokens(DIM, registers, num_cls_tokens=cls_tokens)
        x = torch.randn(3, cls_tokens + 16, DIM)
        inserted = module(x)
        groups = module.layout.split(inserted)
        assert torch.equal(groups.cls, x[:, :cls_tokens])
        assert torch.equal(groups.registers, module.register_tokens.expand(3, -1, -1))
        assert torch.equal(groups.patches, x[:, cls_tokens:])
        assert torch.equal(module.remove(inserted), x)

    def test_no_registers_is_no_operation(self):
        module, x = RegisterTokens(DIM, 0), torch.randn(2, 17, DIM)
        assert module(x) is x
        assert module.remove(x) is x
        assert not module.state_dict()

    def test_start_near_zero_but_unequal(self):
        torch.manual_seed(0)
        module = RegisterTokens(384)
        assert module.register_tokens.std().item() == pytest.approx(1e-6, rel=0.1)
        with torch.no_grad():
            module.register_tokens.zero_()
        module.reset_parameters()
        assert module.register_tokens.std().item() == pytest.approx(1e-6, rel=0.1)

    def test_layout_and_names(self):
        module = RegisterTokens(DIM, 3, num_cls_tokens=2)
        assert module.layout == TokenLayout(num_registers=3, num_cls_tokens=2)
        assert {k: v.shape for k, v in module.state_dict().items()} == {"register_tokens": (1, 3, DIM)}
        assert repr(module) == "RegisterTokens(48, num_registers=3, num_cls_tokens=2)"

    def test_learn_from_every_image(self):
        module = RegisterTokens(DIM)
        gradient = torch.randn(3, TOKENS, DIM)
        x = torch.randn(3, TOKENS - 4, DIM, requires_grad=True)
        module(x).backward(gradient)
        torch.testing.assert_close(module.register_tokens.grad, gradient[:, 1:5].sum(0, keepdim=True))
        assert torch.equal(x.grad, torch.cat((gradient[:, :1], gradient[:, 5:]), 1))

    def test_the_sequence_keeps_its_dtype(self):
        assert RegisterTokens(DIM)(torch.randn(2, 17, DIM, dtype=torch.bfloat16)).dtype == torch.bfloat16

    def test_compiles_whole(self):
        module, x = RegisterTokens(DIM), torch.randn(2, 17, DIM)
        compiled = torch.compile(lambda x: module.remove(module(x) * 2), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), x * 2)

    def test_copies_and_meta(self):
        module, x = RegisterTokens(DIM), torch.randn(1, 17, DIM)
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(twin(x), module(x))
        empty = RegisterTokens(DIM, device="meta")
        assert empty.register_tokens.is_meta
        empty.to_empty(device="cpu").load_state_dict(module.state_dict())
        assert torch.equal(empty(x), module(x))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"dim": 0}, "dim must be a positive int, not 0"),
            ({"num_registers": -4}, "num_registers must be a non-negative int, not -4"),
            ({"num_cls_tokens": 1.0}, "num_cls_tokens must be a non-negative int, not 1.0"),
        ],
    )
    def test_bad_modules_are_refused(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            RegisterTokens(**{"dim": DIM, **arguments})

    def test_bad_inputs_are_refused(self):
        module = RegisterTokens(DIM, num_cls_tokens=2)
        with pytest.raises(ValueError, match=r"x must be \[B, N, 48\], not of shape \(17, 48\)"):
            module(torch.zeros(17, DIM))
        with pytest.raises(ValueError, match="x has 1 tokens, fewer than the 2 CLS tokens"):
            module(torch.zeros(1, 1, DIM))
        with pytest.raises(ValueError, match=r"x must be \[B, N, 48\]"):
            module.remove(torch.zeros(1, 17, 40))
        with pytest.raises(ValueError, match="x has 5 tokens, too few for the layout's 2 CLS and 4 register tokens"):
            module.remove(torch.zeros(1, 5, DIM))
