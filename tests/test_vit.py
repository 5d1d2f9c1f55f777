"""RegisterViT against the formula in plain torch, and as a module. Agreement with timm is in tests/integrations."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from vit_cases import (
    TINY,
    assert_accurate,
    gradients_of,
    layer_norm,
    leaves_of,
    streams_formula,
    vit,
    vit_formula,
    watch_adds,
)

from vitreg_kernels import RegisterViT, TokenLayout, ViTConfig, functional
from vitreg_kernels.layout import TokenGroups
from vitreg_kernels.nn import PRESETS

KINDS = {
    "patches have rows": TINY,
    "CLS has a row": replace(TINY, position_rows="cls"),
    "registers have rows": replace(TINY, position_rows="prefix"),
    "no antialiasing": replace(TINY, antialias=False),
    "rope": replace(TINY, position="rope", rope_base=10.0),
    "no registers": replace(TINY, num_registers=0, position_rows="cls"),
    "16 registers, 2 CLS": replace(TINY, num_registers=16, num_cls_tokens=2, position_rows="cls"),
    "not square": replace(TINY, image_size=(12, 24), position_rows="cls"),
    "no prefix": replace(TINY, num_registers=0, num_cls_tokens=0),
    "swiglu, qk_norm, no scale": replace(TINY, mlp="swiglu", hidden_dim=40, qk_norm=True, layer_scale=None),
}
SIZES = [(16, 16), (20, 12)]  # the grid that the position rows are made for, and another


def images(size=(16, 16), batch=2, **options):
    return torch.randn(batch, 3, *size, **options)


def runs(model, pixels, upstream):
    """Output and gradients of the parameters, by name."""
    return gradients_of(model.forward_features(pixels), dict(model.named_parameters()), upstream)


class TestFormula:
    @pytest.mark.parametrize("size", SIZES, ids=str)
    @pytest.mark.parametrize("kind", KINDS)
    def test_output_and_gradients(self, kind, size):
        config = KINDS[kind]
        model, pixels = vit(config), images(size)
        upstream = torch.randn_like(model.forward_features(pixels))

        def formula(dtype):
            leaves = leaves_of(model, dtype)
            return gradients_of(vit_formula(leaves, pixels.to(dtype), config), leaves, upstream)

        exact = formula(torch.float64)
        assert min(gradient.abs().max() for gradient in exact.values()) > 1e-3
        assert_accurate(runs(model, pixels, upstream), exact, formula(torch.float32), terms=4 * config.dim)

    def test_groups_are_views_of_the_features(self):
        model, pixels = vit(), images()
        groups = model(pixels)
        assert isinstance(groups, TokenGroups)
        assert [part.shape[1] for part in groups] == [1, 4, 16]
        assert torch.equal(torch.cat(groups, dim=1), model.forward_features(pixels))
        assert groups.cls.untyped_storage().data_ptr() == groups.patches.untyped_storage().data_ptr()

    @pytest.mark.parametrize("count", range(17))
    def test_any_number_of_registers(self, count):
        model = RegisterViT(replace(TINY, depth=1, num_registers=count))
        assert model(images()).registers.shape == (2, count, TINY.dim)
        assert model.layout == TokenLayout(num_registers=count)
        assert ("register_tokens" in model.state_dict()) == (count > 0)

    def test_empty_batch(self):
        assert vit().forward_features(images(batch=0)).shape == (0, 21, TINY.dim)

    @pytest.mark.parametrize("kind", KINDS)
    def test_two_norms_a_block_and_one_do_all_the_adds(self, kind, monkeypatch):
        adds = watch_adds(monkeypatch)
        vit(KINDS[kind])(images())
        assert adds == [False] + 2 * TINY.depth * [True]

    def test_reference_backend_serves_every_op(self, monkeypatch):
        given = []
        for name in ("assemble_tokens", "register_attention_qkv", "residual_layer_norm"):
            original = getattr(functional, name)
            monkeypatch.setattr(
                functional, name, lambda *a, original=original, **k: given.append(k["backend"]) or original(*a, **k)
            )
        pixels = images()
        expected = vit().forward_features(pixels)
        given.clear()
        torch.testing.assert_close(vit(backend="reference").forward_features(pixels), expected, atol=1e-5, rtol=1e-5)
        assert set(given) == {"reference"}
        assert len(given) == 1 + 3 + 7


class TestIntermediateLayers:
    def test_the_stream_has_every_branch_in_it(self):
        model, pixels = vit(), images()
        exact = streams_formula(leaves_of(model, torch.float64), pixels.double(), TINY)[1:]
        for found, expected in zip(model.intermediate_layers(pixels, 3, norm=False), exact, strict=True):
            torch.testing.assert_close(torch.cat(found, dim=1).double(), expected, atol=1e-5, rtol=1e-4)

    def test_norm_applies_the_last_norm_to_each(self):
        model, pixels = vit(), images()
        weights = model.state_dict()
        streams = model.intermediate_layers(pixels, 3, norm=False)
        for found, stream in zip(model.intermediate_layers(pixels, 3, norm=True), streams, strict=True):
            expected = layer_norm(weights, "norm", torch.cat(stream, dim=1), TINY.eps)
            torch.testing.assert_close(torch.cat(found, dim=1), expected)

    def test_the_last_is_what_forward_gives(self):
        model, pixels = vit(), images()
        (last,) = model.intermediate_layers(pixels, 1, norm=True)
        assert all(map(torch.equal, last, model(pixels)))

    def test_named_layers_come_in_the_order_asked_for(self):
        model, pixels = vit(), images()
        first, second, third = model.intermediate_layers(pixels, 3, norm=False)
        for layers, expected in (([2, 0], (third, first)), ((-1, -2), (third, second)), ([1, 1], (second, second))):
            found = model.intermediate_layers(pixels, layers, norm=False)
            assert len(found) == len(expected)
            assert all(
                torch.equal(a, b) for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True)
            )

    def test_no_block_runs_in_vain(self):
        model, ran = vit(), []
        for i, block in enumerate(model.blocks):
            block.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
        model.intermediate_layers(images(), [0, 1], norm=False)
        assert ran == [0, 1]

    def test_each_branch_is_added_once(self, monkeypatch):
        adds = watch_adds(monkeypatch)
        vit().intermediate_layers(images(), [0, 1], norm=False)
        first, second = [False, True, True], [False, True, True]  # two norms of the block, one of the stream after it
        assert adds == first + second

    @pytest.mark.parametrize("layers", [0, 4, -1, [], [3], [-4]])
    def test_layers_it_lacks_are_refused(self, layers):
        with pytest.raises(ValueError, match="layers must be 1 to 3 last ones, or indices of the 3 blocks, not"):
            vit().intermediate_layers(images(), layers, norm=False)

    def test_norm_must_be_said(self):
        with pytest.raises(TypeError, match="norm"):
            vit().intermediate_layers(images(), 1)


class TestStatistics:
    def test_attention_of_the_last_block(self):
        model, pixels = vit(), images()
        seen = []
        model.blocks[-1].attn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        features, statistics = model.forward_features(pixels, outputs=("prefix_attention", "received_attention"))
        attention = model.blocks[-1].attn
        expected = attention(seen[0], outputs=("prefix_attention", "received_attention"))[1]
        assert torch.equal(statistics.prefix_attention, expected.prefix_attention)
        assert torch.equal(statistics.received_attention, expected.received_attention)
        assert statistics.prefix_attention.shape == (2, 3, 5, 21)
        assert statistics.lse is None
        assert torch.equal(features, model.forward_features(pixels))

    @pytest.mark.parametrize("layer_scale", [None, 0.5])
    def test_taps_see_the_norms_of_the_stream_before_each_block_and_after_the_last(self, layer_scale):
        config = replace(TINY, layer_scale=layer_scale)
        model, pixels, seen = vit(config), images(), []
        for tap in (*(block.residual_norms for block in model.blocks), model.residual_norms):
            tap.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
        model(pixels)
        streams = streams_formula(leaves_of(model, torch.float64), pixels.double(), config)
        assert len(seen) == len(streams) == config.depth + 1
        for norms, stream in zip(seen, streams, strict=True):
            torch.testing.assert_close(norms.double(), stream.norm(dim=-1), atol=1e-5, rtol=1e-5)
        # The intermediate layers are those very streams, and pass the same taps.
        found = [torch.cat(groups, dim=1) for groups in model.intermediate_layers(pixels, 3, norm=False)]
        torch.testing.assert_close(seen[1:4], [stream.norm(dim=-1) for stream in found])
        assert len(seen) == 2 * (config.depth + 1)


class TestTraining:
    def test_drop_path_rises_with_depth(self):
        rates = [block.drop_path for block in vit(replace(TINY, drop_path=0.3, depth=4)).blocks]
        assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])
        assert vit(replace(TINY, drop_path=0.3, depth=1)).blocks[0].drop_path == 0.0

    def test_chance_is_for_training_only(self):
        pixels = images()
        for name in ("drop_path", "attn_drop", "proj_drop"):
            model = vit(replace(TINY, **{name: 0.5}))
            assert not torch.equal(model.forward_features(pixels), model.forward_features(pixels)), name
            model.eval()
            assert torch.equal(model.forward_features(pixels), model.forward_features(pixels)), name
            torch.testing.assert_close(model.forward_features(pixels), vit().forward_features(pixels))

    @pytest.mark.parametrize("position", ["absolute", "rope"])
    def test_checkpointing_changes_no_gradient(self, position):
        config = replace(TINY, position=position, drop_path=0.5, attn_drop=0.2, proj_drop=0.2)
        model, pixels, ran = vit(config), images(batch=4), []
        model.blocks[1].register_forward_pre_hook(lambda *_: ran.append(1))
        upstream, results = torch.randn(4, 21, TINY.dim), {}
        for model.checkpointing in (False, True):
            torch.manual_seed(3)
            results[model.checkpointing] = runs(model, pixels, upstream)
        assert len(ran) == 1 + 2  # it did run again
        for name, expected in results[False].items():
            assert torch.equal(results[True][name], expected), name

    def test_repeats_bit_for_bit(self):
        model, pixels, upstream = vit(), images((20, 12)), torch.randn(2, 20, TINY.dim)
        first, second = (runs(model, pixels, upstream) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)

    @pytest.mark.parametrize(
        ("kind", "checkpointing"), [pytest.param("CLS has a row", True, marks=pytest.mark.slow), ("rope", False)]
    )
    def test_compiles_whole_with_gradients_and_any_size(self, kind, checkpointing, dynamo):
        model = vit(replace(KINDS[kind], depth=2))
        model.checkpointing = checkpointing
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        parameters = list(model.parameters())

        def run(call, pixels):
            groups = call(pixels)
            return [*groups, *torch.autograd.grad(sum(group.square().sum() for group in groups), parameters)]

        with torch._dynamo.config.patch(error_on_recompile=True):
            for size in ((20, 12), (24, 28)):
                pixels = images(size)
                torch._dynamo.mark_dynamic(pixels, (2, 3))
                torch.testing.assert_close(run(compiled, pixels), run(model, pixels), atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("kind", ["CLS has a row", "rope", "swiglu, qk_norm, no scale"])
    def test_autocast(self, kind):
        """The stream stays fp32 and what the matrix products read is bf16, as where torch casts by itself."""
        config = KINDS[kind]
        model, pixels = vit(config), images()
        with torch.autocast("cpu", torch.bfloat16):
            output = model.forward_features(pixels)
            (stream,) = model.intermediate_layers(pixels, 1, norm=False)
            eager = vit_formula(model.state_dict(), pixels, config)
        assert (output.dtype, stream.patches.dtype, eager.dtype) == (torch.bfloat16, torch.float32, torch.float32)
        exact = vit_formula(leaves_of(model, torch.float64), pixels.double(), config)
        assert_accurate({"": output}, {"": exact}, {"": eager.bfloat16()}, terms=4 * config.dim)
        output.float().square().mean().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())

    def test_bf16(self):
        model, pixels = vit().bfloat16(), images().bfloat16()
        output = model.forward_features(pixels)
        exact = vit_formula(leaves_of(model, torch.float64), pixels.double(), TINY)
        eager = vit_formula(model.state_dict(), pixels, TINY)
        assert output.dtype == torch.bfloat16
        assert_accurate({"": output}, {"": exact}, {"": eager}, terms=4 * TINY.dim)


class TestModule:
    def test_state_dict_names(self):
        shapes = {name: tuple(w.shape) for name, w in vit(replace(TINY, position_rows="cls")).state_dict().items()}
        assert {name: shape for name, shape in shapes.items() if not name.startswith("blocks.")} == {
            "cls_token": (1, 1, 48),
            "register_tokens": (1, 4, 48),
            "pos_embed": (1, 17, 48),
            "patch_embed.proj.weight": (48, 3, 4, 4),
            "patch_embed.proj.bias": (48,),
            "norm.weight": (48,),
            "norm.bias": (48,),
        }
        assert {name.split(".")[1] for name in shapes if name.startswith("blocks.")} == {"0", "1", "2"}
        assert {".".join(name.split(".")[2:]) for name in shapes if name.startswith("blocks.")} == set(
            vit().blocks[0].state_dict()
        )
        assert "pos_embed" not in vit(replace(TINY, position="rope")).state_dict()
        assert "cls_token" not in vit(replace(TINY, num_cls_tokens=0)).state_dict()
        assert vit(replace(TINY, position_rows="prefix")).pos_embed.shape == (1, 21, 48)

    def test_meta_device_then_weights(self):
        config = replace(TINY, qk_norm=True)
        model = RegisterViT(config, device="meta")
        assert all(tensor.is_meta for tensor in model.state_dict().values())
        model.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(torch.nan)
        torch.manual_seed(5)
        model.reset_parameters()
        other = RegisterViT(config)
        torch.manual_seed(5)
        other.reset_parameters()
        assert model.state_dict().keys() == other.state_dict().keys()
        assert all(map(torch.equal, model.parameters(), other.parameters()))
        pixels = images()
        torch.testing.assert_close(model.forward_features(pixels), other.forward_features(pixels))

    def test_starts_as_timm_and_dinov2_do(self):
        model = RegisterViT(ViTConfig(dim=192, depth=1, num_heads=3))
        stds = {"cls_token": 1e-6, "register_tokens": 1e-6, "pos_embed": 0.02, "blocks.0.mlp.fc1.weight": 0.02}
        for name, expected in stds.items():
            assert model.state_dict()[name].std().item() == pytest.approx(expected, rel=0.2), name
        assert torch.equal(model.blocks[0].ls1.gamma, torch.full((192,), 1e-5))
        assert not model.blocks[0].attn.qkv.bias.any()

    def test_dtype_and_device(self):
        model = RegisterViT(replace(TINY, depth=1, qk_norm=True), dtype=torch.bfloat16)
        assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}

    @pytest.mark.parametrize("position", ["absolute", "rope"])
    @pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
    def test_copies_are_equal(self, copier, position):
        model, pixels = vit(replace(TINY, position=position)), images()
        expected = model.forward_features(pixels)
        twin = copier(model)
        torch.testing.assert_close(twin.forward_features(pixels), expected)
        assert twin.config == model.config

    def test_evaluation_first_and_training_after(self):
        model, pixels = vit(replace(TINY, position="rope")), images()
        with torch.inference_mode():
            model(pixels)
        model.forward_features(pixels).square().mean().backward()

    @pytest.mark.parametrize(
        ("shape", "message"),
        [
            (
                (2, 3, 16, 18),
                "the sides of an image must be multiples of the patch size 4, not 16 x 18; resize, pad or",
            ),
            ((2, 3, 15, 16), "the sides of an image must be multiples of the patch size 4, not 15 x 16"),
            ((2, 3, 0, 16), "the sides of an image must be multiples of the patch size 4, not 0 x 16"),
            ((2, 1, 16, 16), r"images must be \[B, 3, height, width\], not of shape \(2, 1, 16, 16\)"),
            ((3, 16, 16), r"images must be \[B, 3, height, width\], not of shape \(3, 16, 16\)"),
        ],
    )
    def test_bad_images_are_refused(self, shape, message):
        with pytest.raises(ValueError, match=message):
            vit()(torch.zeros(shape))


class TestConfig:
    @pytest.mark.parametrize("name", PRESETS)
    def test_presets(self, name):
        model = RegisterViT.preset(name, device="meta", num_registers=2, depth=1)
        assert model.layout.num_registers == 2
        assert model.config == replace(PRESETS[name], num_registers=2, depth=1)
        assert model.config.head_dim == (128 if "7b" in name else 64)
        assert (model.pos_embed is None) == name.startswith("dinov3")

    @pytest.mark.parametrize(("size", "grid"), [(16, (4, 4)), ((16, 16), (4, 4)), ((12, 24), (3, 6))])
    def test_the_grid_is_that_of_the_images(self, size, grid):
        config = replace(TINY, image_size=size, position_rows="cls")
        assert (config.image_size, config.grid, config.num_position_rows) == (size, grid, 1 + grid[0] * grid[1])
        assert hash(config) == hash(replace(TINY, image_size=size, position_rows="cls"))

    def test_no_such_preset(self):
        with pytest.raises(ValueError, match="no preset is named 'vit_small'; there are vit_small_patch14, vit_base"):
            RegisterViT.preset("vit_small")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"depth": 0}, "depth must be a positive int, not 0"),
            ({"dim": 48.0}, "dim must be a positive int, not 48.0"),
            ({"hidden_dim": -1}, "hidden_dim must be a positive int, not -1"),
            ({"num_heads": True}, "num_heads must be a positive int, not True"),
            ({"num_heads": 5}, "dim=48 must be a multiple of num_heads=5"),
            ({"image_size": 18}, "image_size=18 must be a multiple of patch_size=4"),
            ({"image_size": (16, 18)}, r"image_size=\(16, 18\) must be a multiple of patch_size=4"),
            ({"image_size": [16, 16]}, r"image_size must be a positive int, or a tuple of two, .*, not \[16, 16\]"),
            ({"image_size": (16,)}, r"image_size must be a positive int, or a tuple of two, .*, not \(16,\)"),
            ({"image_size": (16, 0)}, r"image_size must be a positive int, or a tuple of two, .*, not \(16, 0\)"),
            ({"image_size": True}, "image_size must be a positive int, or a tuple of two, height and width, not True"),
            ({"num_registers": -1}, "num_registers must be a non-negative int, not -1"),
            ({"mlp": "relu"}, "mlp must be one of 'gelu', 'swiglu', not 'relu'"),
            ({"position": "none"}, "position must be one of 'absolute', 'rope', not 'none'"),
            ({"position_rows": "all"}, "position_rows must be one of 'patches', 'cls', 'prefix', not 'all'"),
            ({"drop_path": 1.0}, "drop_path must be at least 0 and below 1, not 1.0"),
            ({"drop_path": "x"}, "drop_path must be at least 0 and below 1, not 'x'"),
            ({"proj_drop": True}, "proj_drop must be at least 0 and below 1, not True"),
            ({"eps": -1}, "eps must be a positive finite number, not -1"),
            ({"eps": 0.0}, r"eps must be a positive finite number, not 0\.0"),
            ({"eps": None}, "eps must be a positive finite number, not None"),
            ({"eps": "1e-6"}, "eps must be a positive finite number, not '1e-6'"),
            ({"eps": True}, "eps must be a positive finite number, not True"),
            ({"rope_base": -3}, "rope_base must be a positive finite number, not -3"),
            ({"rope_base": float("inf")}, "rope_base must be a positive finite number, not inf"),
            ({"interpolate_offset": "a"}, "interpolate_offset must be a finite number of at least 0, not 'a'"),
            ({"interpolate_offset": -0.1}, r"interpolate_offset must be a finite number of at least 0, not -0\.1"),
            ({"layer_scale": "b"}, "layer_scale must be a finite number or None, not 'b'"),
            ({"layer_scale": True}, "layer_scale must be a finite number or None, not True"),
            ({"antialias": "no"}, "antialias must be True or False, not 'no'"),
            ({"qkv_bias": 3}, "qkv_bias must be True or False, not 3"),
            ({"proj_bias": None}, "proj_bias must be True or False, not None"),
            ({"qk_norm": 0}, "qk_norm must be True or False, not 0"),
            (
                {"position": "rope", "num_heads": 8},
                "position='rope' needs a head dim that is a multiple of 4, .* not 6",
            ),
        ],
    )
    def test_what_does_not_fit_is_refused(self, changes, message):
        with pytest.raises(ValueError, match=message):
            replace(TINY, **changes)
