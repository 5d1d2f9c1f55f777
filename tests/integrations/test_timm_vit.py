"""RegisterBlock and RegisterViT in timm's place: the same weights, the same features and gradients."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from vit_cases import assert_accurate, gradients_of, lively

from vitreg_kernels import RegisterBlock, RegisterViT, ViTConfig
from vitreg_kernels.nn import PRESETS
from vitreg_kernels.nn.block import Residual
from vitreg_kernels.nn.position import resample_positions
from vitreg_kernels.nn.rope import patch_rope

timm = pytest.importorskip("timm")
from timm.layers import Mlp, SwiGLUPacked  # noqa: E402  (importable only where timm is)
from timm.layers.pos_embed import resample_abs_pos_embed  # noqa: E402
from timm.layers.pos_embed_sincos import RotaryEmbeddingDinoV3  # noqa: E402
from timm.models.vision_transformer import Block  # noqa: E402

DIM, HEADS, TOKENS = 96, 3, 21  # one CLS token, four registers, a 4 x 4 grid


def results_of(module, output, upstream, rename=lambda name: name):
    """The output and its gradients by our names."""
    return gradients_of(output, {rename(name): p for name, p in module.named_parameters()}, upstream)


class TestBlock:
    @pytest.mark.parametrize("fused", [False, True], ids=["tensor", "residual"])
    @pytest.mark.parametrize(("init_values", "mlp"), [(1e-5, "gelu"), (None, "gelu"), (1e-5, "swiglu")])
    def test_is_timms(self, init_values, mlp, fused):
        layer = Mlp if mlp == "gelu" else SwiGLUPacked
        options = {"act_layer": torch.nn.SiLU} if mlp == "swiglu" else {}
        norm = lambda *args, **kwargs: torch.nn.LayerNorm(*args, eps=1e-6, **kwargs)  # noqa: E731
        theirs = Block(
            DIM, HEADS, qkv_bias=True, init_values=init_values, mlp_layer=layer, norm_layer=norm, **options
        ).eval()
        lively(theirs)
        ours = RegisterBlock(DIM, HEADS, layer_scale=init_values, mlp=mlp, hidden_dim=theirs.mlp.fc2.in_features).eval()
        ours.load_state_dict(theirs.state_dict())
        x, upstream = torch.randn(2, TOKENS, DIM), torch.randn(2, TOKENS, DIM)
        output = ours(Residual(x)).added() if fused else ours(x)
        double = copy.deepcopy(theirs).double()
        assert_accurate(
            results_of(ours, output, upstream),
            results_of(double, double(x.double()), upstream),
            results_of(theirs, theirs(x), upstream),
            terms=4 * DIM,
        )


class TestViT:
    @pytest.mark.parametrize("size", [(56, 56), (70, 42)], ids=str)
    def test_small_patch14_reg4_dinov2(self, size):
        theirs = timm.create_model(
            "vit_small_patch14_reg4_dinov2", depth=2, img_size=56, dynamic_img_size=True, num_classes=0
        )
        config = replace(PRESETS["vit_small_patch14"], depth=2, image_size=56)
        self.compare(theirs, config, size)

    @pytest.mark.parametrize("size", [(64, 64), (80, 48)], ids=str)
    def test_small_patch16_224(self, size):
        """Rows for CLS, no registers, no LayerScale."""
        theirs = timm.create_model("vit_small_patch16_224", depth=2, img_size=64, dynamic_img_size=True, num_classes=0)
        config = replace(PRESETS["vit_small_patch16"], depth=2, image_size=64, num_registers=0, position_rows="cls")
        self.compare(theirs, config, size)

    def test_rows_for_registers(self):
        options = {"depth": 2, "img_size": 56, "dynamic_img_size": True, "num_classes": 0, "no_embed_class": False}
        theirs = timm.create_model("vit_small_patch14_reg4_dinov2", **options)
        self.compare(theirs, ViTConfig(depth=2, image_size=56, position_rows="prefix"), (70, 42))

    @staticmethod
    def compare(theirs, config, size):
        lively(theirs).eval()
        ours = RegisterViT(config).eval()

        def rename(name):
            return "register_tokens" if name == "reg_token" else name

        ours.load_state_dict({rename(name): weight for name, weight in theirs.state_dict().items()})
        pixels = torch.randn(2, 3, *size)
        output = ours.forward_features(pixels)
        upstream = torch.randn_like(output)
        double = copy.deepcopy(theirs).double()
        assert_accurate(
            results_of(ours, output, upstream),
            results_of(double, double.forward_features(pixels.double()), upstream, rename),
            results_of(theirs, theirs.forward_features(pixels), upstream, rename),
            terms=4 * config.dim,
        )
        # timm's own call for the streams of some blocks, before the final norm.
        options = {"indices": [0, 1], "output_fmt": "NLC", "intermediates_only": True, "norm": False}
        streams = theirs.forward_intermediates(pixels, **options)
        for found, expected in zip(ours.intermediate_layers(pixels, 2, norm=False), streams, strict=True):
            torch.testing.assert_close(found.patches, expected, atol=1e-4, rtol=1e-4)


class TestShapes:
    @pytest.mark.parametrize(
        ("preset", "name"),
        [
            *(
                (f"vit_{size}_patch14", f"vit_{size}_patch14_reg4_dinov2")
                for size in ("small", "base", "large", "giant")
            ),
            *((f"vit_{size}_patch16", f"vit_{size}_patch16_224") for size in ("small", "base", "large")),
        ],
    )
    def test_presets_have_timms(self, preset, name):
        with torch.device("meta"):
            theirs = timm.create_model(name, num_classes=0, depth=1, img_size=224)
        ours = RegisterViT.preset(preset, device="meta", depth=1)
        assert PRESETS[preset].depth == (24 if "large" in name else 40 if "giant" in name else 12)
        assert shapes(ours, "blocks.0.") == shapes(theirs, "blocks.0.")
        assert ours.blocks[0].attn.num_heads == theirs.blocks[0].attn.num_heads
        assert ours.patch_embed.proj.weight.shape == theirs.patch_embed.proj.weight.shape

    @pytest.mark.parametrize("size", ["small", "small_plus", "base", "large", "huge_plus", "7b"])
    def test_presets_have_dinov3s(self, size):
        with torch.device("meta"):
            theirs = timm.create_model(f"vit_{size}_patch16_dinov3", num_classes=0)
        ours = RegisterViT.preset(f"dinov3_{size}_patch16", device="meta")
        assert len(ours.blocks) == len(theirs.blocks)
        assert ours.blocks[0].attn.num_heads == theirs.blocks[0].attn.num_heads
        assert ours.blocks[0].mlp.fc2.weight.shape == theirs.blocks[0].mlp.fc2.weight.shape
        assert ours.blocks[0].norm1.eps == theirs.blocks[0].norm1.eps
        assert ours.register_tokens.shape == theirs.reg_token.shape


def shapes(model, prefix):
    return {name: weight.shape for name, weight in model.state_dict().items() if name.startswith(prefix)}


class TestPositions:
    @pytest.mark.parametrize("from_grid", [(7, 7), (6, 9), (18, 32)])
    @pytest.mark.parametrize("grid", [(4, 4), (7, 5), (9, 14), (7, 7)])
    @pytest.mark.parametrize("antialias", [True, False])
    @pytest.mark.parametrize("prefix", [0, 5])
    def test_resampled_as_timm_does(self, from_grid, grid, antialias, prefix):
        pos_embed = torch.randn(1, prefix + from_grid[0] * from_grid[1], 12)
        options = {"antialias": antialias, "num_prefix_tokens": prefix}
        theirs = resample_abs_pos_embed(pos_embed, list(grid), list(from_grid), **options)
        ours = resample_positions(pos_embed, grid, from_grid=from_grid, num_prefix_rows=prefix, antialias=antialias)
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)

    @pytest.mark.parametrize("grid", [(4, 4), (3, 7), (37, 37)])
    def test_rope_is_timms_dinov3(self, grid):
        theirs = RotaryEmbeddingDinoV3(64, temperature=100.0, feat_shape=list(grid), rotate_half=True)
        sin, cos = theirs.get_embed(list(grid)).chunk(2, dim=-1)
        ours = patch_rope(grid, 64, base=100.0, device=torch.device("cpu"), dtype=torch.float32)
        torch.testing.assert_close(ours.cos, cos, atol=2e-6, rtol=0)
        torch.testing.assert_close(ours.sin, sin, atol=2e-6, rtol=0)
