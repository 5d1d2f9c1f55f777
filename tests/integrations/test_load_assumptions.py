"""What no weight tells is said, once, with the arguments that say otherwise; and right once they are given."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
import torch.nn.functional as F

from vitreg_kernels import load_vit

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

from tests.integrations.models import assert_features, assert_same, features, hugging_face, timm_dinov3, timm_vit  # noqa: E402
from tests.integrations.test_checkpoints import GATED, LAYER_SCALE, SWIGLU, dinov2_weights, dinov3_weights  # noqa: E402

OF_TIMM = {"num_heads": 2, "mlp": "gelu", "eps": 1e-6, "antialias": True, "interpolate_offset": 0.0, "grid": (4, 4)}
OF_EVA = {"num_heads": 2, "mlp": "gelu", "eps": 1e-5, "position": "rope", "rope_base": 100.0}
GATED_MLP = {"mlp": "swiglu"}
KINDS = {
    "timm": (lambda: timm_vit().state_dict(), OF_TIMM),
    "timm, registers": (lambda: timm_vit(reg_tokens=4).state_dict(), OF_TIMM),
    "timm, SwiGLU": (lambda: timm_vit(**SWIGLU).state_dict(), OF_TIMM | GATED_MLP),
    "timm, query norms": (
        lambda: timm_vit(qk_norm=True).state_dict(),
        {name: value for name, value in OF_TIMM.items() if name != "num_heads"},
    ),
    "timm, a query norm of all channels": (
        lambda: timm_vit(qk_norm=True, num_heads=1).state_dict(),
        OF_TIMM | {"num_heads": 1},
    ),
    "timm's DINOv3": (lambda: timm_dinov3(qkv_bias=False).state_dict(), OF_EVA),
    "DINOv2": (
        lambda: timm_vit().state_dict() | {"mask_token": torch.zeros(1, 128)},
        {"num_heads": 2, "antialias": False, "interpolate_offset": 0.1},
    ),
    "DINOv2, registers": (
        lambda: dinov2_weights(timm_vit(reg_tokens=4, no_embed_class=True, **SWIGLU, **LAYER_SCALE)),
        {"num_heads": 2, "antialias": True, "interpolate_offset": 0.0},
    ),
    "DINOv3": (lambda: dinov3_weights(hugging_face("DINOv3ViT", **GATED)), {"eps": 1e-5}),
    "transformers' ViT": (
        lambda: hugging_face("ViT").state_dict(),
        {"num_heads": 2, "mlp": "gelu", "eps": 1e-12, "grid": (4, 4), "antialias": False, "interpolate_offset": 0.0},
    ),
    "transformers' Dinov2": (
        lambda: hugging_face("Dinov2").state_dict(),
        {"num_heads": 2, "mlp": "gelu", "eps": 1e-6},
    ),
    "transformers' Dinov2 with a gate, which is SiLU": (
        lambda: hugging_face("Dinov2WithRegisters", use_swiglu_ffn=True).state_dict(),
        {"num_heads": 2, "eps": 1e-6},
    ),
    "transformers' DINOv3ViT": (
        lambda: hugging_face("DINOv3ViT", **GATED).state_dict(),
        {"num_heads": 2, "mlp": "swiglu", "eps": 1e-5, "rope_base": 100.0},
    ),
}


def load_and_listen(source, **changes):
    """The model, and the warnings but for what was left out."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = load_vit(source, **changes)
    return model, [warning for warning in caught if not str(warning.message).startswith("left out")]


@pytest.mark.parametrize("kind", KINDS)
def test_all_that_was_assumed_is_one_sentence_and_giving_it_is_silence(kind):
    make, assumed = KINDS[kind]
    weights = make()
    assumed_model, (warning,) = load_and_listen(weights)
    assert warning.category is UserWarning
    assert warning.filename == __file__, "it must point to the caller"
    message = str(warning.message)
    start, rest = message.split(": ", 1)
    values, end = rest.split("; ")
    assert (start, end) == (
        "assumed what the weights do not tell",
        "give load_vit any of these fields to say otherwise",
    )
    values, blocks, _ = values.partition(", and pre-norm blocks without rotation")
    assert bool(blocks) == (assumed.items() >= {"antialias": True, "grid": (4, 4)}.items())  # timm's names
    named = dict(pair.split("=", 1) for pair in re.split(r", (?=[a-z])", values))
    assert named == {name: repr(value) for name, value in assumed.items()}
    told_model, silence = load_and_listen(weights, **assumed)
    assert not silence
    assert_same(told_model, assumed_model)
    for name in assumed:
        _, rest = load_and_listen(weights, **{name: assumed[name]})
        assert len(rest) == (len(assumed) > 1)
        assert not any(f"{name}=" in str(warning.message) for warning in rest)


def test_said_once_a_place():
    weights = timm_vit().state_dict()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            load_vit(weights)
    assert len(caught) == 1


def test_moco_v3s_vit_s_has_12_heads():
    """Of 384 channels, which are 6 heads in DeiT under the same names. Its file has two encoders."""
    theirs = timm_vit(embed_dim=384, num_heads=12, depth=1)
    names = {
        f"module.{encoder}.{name}": x
        for encoder in ("base_encoder", "momentum_encoder")
        for name, x in theirs.state_dict().items()
    }
    with pytest.raises(
        ValueError, match=r"the weights are of several models, 'base_encoder\.', 'momentum_encoder\.': give"
    ):
        load_vit({"epoch": 300, "arch": "vit_small", "state_dict": names})
    own = {name: x for name, x in names.items() if "base_encoder" in name}
    with pytest.warns(UserWarning, match=r"^assumed what the weights do not tell: num_heads=6, "):
        guessed = load_vit({"state_dict": own})
    assert_features(load_vit(own, **OF_TIMM | {"num_heads": 12}), theirs, sides=[(64, 64)])
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        error = guessed.eval().forward_features(images) - features(theirs, images)
    assert error.norm() / features(theirs, images).norm() > 0.05


@pytest.mark.parametrize("size", [(96, 96), (48, 80)])
@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("mask_token", [True, False])
def test_dinov2s_own_training_resamples_with_its_offset_and_no_filter(size, registers, mask_token):
    """Its formula, in a model of timm's that needs no resampling; with a mask token in the file or without."""
    theirs = timm_vit(no_embed_class=True, reg_tokens=registers)
    weights = dinov2_weights(theirs) if registers else theirs.state_dict()
    if not registers:  # a row for CLS, as DINOv2 has it
        row = 1e-3 * torch.randn(1, 1, 128)
        weights |= {"cls_token": weights["cls_token"] - row, "pos_embed": torch.cat((row, weights["pos_embed"]), dim=1)}
        weights |= {"mask_token": torch.zeros(1, 128)}
    if not mask_token:
        del weights["mask_token"]
        if registers:
            weights["reg_token"] = weights.pop("register_tokens")
            weights = {
                re.sub(r"^blocks\.(\d+)\.\d+\.", r"blocks.\1.", n).replace("w12", "fc1").replace("w3", "fc2"): x
                for n, x in weights.items()
            }
    grid = tuple(side // 16 for side in size)
    rows = theirs.pos_embed.detach().reshape(1, 4, 4, 128).permute(0, 3, 1, 2)
    scale = tuple((n + 0.1) / 4 for n in grid)
    rows = F.interpolate(rows, scale_factor=scale, mode="bicubic", antialias=False).flatten(2).transpose(1, 2)
    resampled = timm_vit(img_size=size, no_embed_class=True, reg_tokens=registers)
    resampled.load_state_dict(theirs.state_dict() | {"pos_embed": rows})
    with pytest.warns(UserWarning, match=f"antialias={bool(registers) or not mask_token}, interpolate_offset="):
        assert load_vit(weights)
    told = {"antialias": False, "interpolate_offset": 0.1, "num_heads": 2, "eps": 1e-6, "mlp": "gelu", "grid": (4, 4)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = load_vit(weights, **told)
    assert_features(ours, resampled, sides=[size])


@pytest.mark.filterwarnings("ignore:assumed what", "ignore:left out")
@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({"norm_layer": lambda dim, **o: torch.nn.LayerNorm(dim, eps=1e-3, **o)}, {"eps": 1e-3}),
        ({"num_heads": 8}, {"num_heads": 8}),
        ({"pos_drop_rate": 0.5, "drop_path_rate": 0.2}, {}),
        ({"patch_drop_rate": 0.5}, {}),
        ({"global_pool": "avg", "fc_norm": False}, {}),
        ({"global_pool": "map"}, {}),
    ],
    ids=str,
)
def test_timms_other_options_load_right(options, changes):
    theirs = timm_vit(**options)
    assert_features(load_vit(theirs.state_dict(), **changes), theirs, sides=[(64, 64)])


def refused_models():
    from timm.layers import HybridEmbed, RmsNorm, SwiGLU
    from timm.models.vision_transformer import ParallelScalingBlock, ParallelThingsBlock

    def stem(**options):
        backbone = torch.nn.Conv2d(3, 8, 16, stride=16)
        return HybridEmbed(backbone, options["img_size"], patch_size=1, embed_dim=options["embed_dim"], **flattened)

    flattened = {"output_fmt": "NHWC", "strict_img_size": False}
    return {
        "pre-norm": ({"pre_norm": True}, "no place for norm_pre"),
        "fc_norm": ({"global_pool": "avg"}, "the weights have fc_norm"),
        "no final norm": ({"final_norm": False}, r"lack norm\.bias, norm\.weight"),
        "no CLS": ({"class_token": False, "global_pool": "avg", "fc_norm": False}, "the weights have no cls_token"),
        "no positions": ({"pos_embed": "none"}, "the weights lack pos_embed"),
        "RMSNorm": ({"norm_layer": RmsNorm}, r"lack blocks\.0\.norm1\.bias"),
        "parallel branches": ({"block_fn": ParallelScalingBlock}, r"lack blocks\.0\.mlp"),
        "parallel blocks": ({"block_fn": ParallelThingsBlock}, r"lack blocks\.0\.mlp"),
        "norms in attention": ({"scale_attn_norm": True}, r"no place for blocks\.0\.attn\.norm"),
        "norms in the MLP": ({"scale_mlp_norm": True}, r"no place for blocks\.0\.mlp\.norm"),
        "SwiGLU in two": ({"mlp_layer": SwiGLU}, r"lack blocks\.0\.mlp\.fc1\.weight"),
        "a norm of patches": ({"embed_norm_layer": torch.nn.LayerNorm}, r"no place for patch_embed\.norm"),
        "a convolutional stem": ({"embed_layer": stem}, r"no place for patch_embed\.backbone"),
    }


@pytest.mark.filterwarnings("ignore:assumed what", "ignore:left out")
def test_what_register_vit_does_not_compute_is_refused():
    for options, message in refused_models().values():
        weights = timm_vit(**options).state_dict()
        with pytest.raises(ValueError, match=message):
            load_vit(weights)


def models_that_leave_no_trace():
    from timm.models.eva import Eva
    from timm.models.vision_transformer import ResPostBlock

    def eva(**options):
        sizes = {"img_size": 64, "patch_size": 16, "embed_dim": 128, "depth": 2, "num_heads": 2, "num_classes": 0}
        return Eva(**sizes, global_pool="token", qkv_bias=False, **options)

    return timm_vit(block_fn=ResPostBlock), eva(use_rot_pos_emb=True), eva(use_post_norm=True)


def test_that_blocks_are_pre_norm_and_without_rotation_is_said():
    """Where nothing in the weights tells otherwise."""
    for model in models_that_leave_no_trace():
        with pytest.warns(UserWarning, match=", and pre-norm blocks without rotation; give load_vit any of these"):
            load_vit(model.state_dict())


@pytest.mark.filterwarnings("ignore:left out.*pooler")
def test_dpt_has_the_names_of_vit_and_resamples_otherwise():
    theirs = hugging_face("DPT")
    with pytest.warns(UserWarning, match="antialias=False, interpolate_offset=0.0"):
        load_vit(theirs.state_dict())


@pytest.mark.parametrize("name", ["DeiT", "Yolos"])
def test_what_is_unknown_is_named_before_its_position_rows_are_read(name):
    token = {"DeiT": "distillation_token", "Yolos": "detection_tokens"}[name]
    size = {"image_size": [64, 64]} if name == "Yolos" else {}
    with pytest.raises(ValueError, match=f"^RegisterViT has no place for .*{token}"):
        load_vit(hugging_face(name, **size).state_dict())
