"""RegisterViT with another library's weights has that library's features."""

from __future__ import annotations

import pickle
import re
import warnings
from functools import partial

import pytest
import torch

from vitreg_kernels import load_vit
from vitreg_kernels.integrations.configuration import configure
from vitreg_kernels.integrations.timm import convert
from vitreg_kernels.nn.tokens import patch_like_registers

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:assumed what")  # which test_assumptions.py is about

from timm.layers import SwiGLUPacked  # noqa: E402

from tests.integrations.models import assert_features, hugging_face, timm_dinov3, timm_vit  # noqa: E402

LAYER_SCALE = {"init_values": 1.0}
SWIGLU = {"mlp_layer": SwiGLUPacked, "act_layer": torch.nn.SiLU, "mlp_ratio": 4}
GATED = {"use_gated_mlp": True, "hidden_act": "silu"}
MODELS = {
    "timm": partial(timm_vit),
    "timm LayerScale, rows of patches": partial(timm_vit, reg_tokens=4, no_embed_class=True, **LAYER_SCALE),
    "timm registers, a row each": partial(timm_vit, reg_tokens=4),
    "timm SwiGLU": partial(timm_vit, **SWIGLU, **LAYER_SCALE),
    "timm qk norm, no bias": partial(timm_vit, qk_norm=True, qkv_bias=False, proj_bias=False),
    "timm DINOv3": partial(timm_dinov3, qkv_bias=False),
    "timm DINOv3 SwiGLU, biases": partial(timm_dinov3, qkv_bias=True, swiglu_mlp=True, swiglu_align_to=8),
    "Dinov2": partial(hugging_face, "Dinov2"),
    "Dinov2WithRegisters SwiGLU": partial(hugging_face, "Dinov2WithRegisters", use_swiglu_ffn=True),
    "DINOv3ViT": partial(hugging_face, "DINOv3ViT", num_register_tokens=4),
    "DINOv3ViT gated, key bias": partial(hugging_face, "DINOv3ViT", key_bias=True, **GATED),
    "ViT": partial(hugging_face, "ViT"),
}


@pytest.mark.filterwarnings("ignore:left out.*pooler")
@pytest.mark.parametrize("name", MODELS)
def test_features_are_theirs(name):
    theirs = MODELS[name]()
    assert_features(load_vit(theirs.state_dict()), theirs)


@pytest.mark.filterwarnings("ignore:left out.*pooler")
@pytest.mark.parametrize("name", ["ViT", "DINOv3ViT"])
def test_a_file_of_version_4_names_loads(name, tmp_path):
    """transformers 5 still writes them."""
    theirs = MODELS[name]()
    theirs.save_pretrained(tmp_path)
    assert_features(load_vit(tmp_path / "model.safetensors"), theirs, sides=[(64, 64)])


def dinov2_weights(model):
    """timm's model with registers under DINOv2's names, in two chunks, its CLS token split into itself and its row."""
    weights = model.state_dict()
    row = torch.randn(1, 1, weights["pos_embed"].shape[2])
    special = {
        "cls_token": weights.pop("cls_token") - row,
        "pos_embed": torch.cat((row, weights.pop("pos_embed")), dim=1),
        "register_tokens": weights.pop("reg_token"),
        "mask_token": torch.randn(1, row.shape[2]),
    }
    names = {name: re.sub(r"^blocks\.(\d+)", r"blocks.\1.\1", name) for name in weights}
    names = {name: new.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3") for name, new in names.items()}
    return special | {names[name]: tensor for name, tensor in weights.items()}


def test_dinov2s_own_names():
    theirs = timm_vit(reg_tokens=4, no_embed_class=True, **SWIGLU, **LAYER_SCALE)
    assert_features(load_vit(dinov2_weights(theirs)), theirs)


def test_dinov2_without_registers_resamples_with_its_offset():
    weights = timm_vit().state_dict() | {"mask_token": torch.zeros(1, 128)}
    config = load_vit(weights).config
    assert (config.antialias, config.interpolate_offset, config.eps) == (False, 0.1, 1e-6)


def dinov3_weights(model):
    """Hugging Face's model with a gated MLP under DINOv3's names: a bias for the keys, masked; periods in bf16."""
    found, weights = model.state_dict(), {}
    for name, tensor in found.items():
        name = re.sub(r"^model\.layer\.", "blocks.", name).replace("embeddings.patch_embeddings", "patch_embed.proj")
        name = name.replace("embeddings.register_tokens", "storage_tokens").replace("embeddings.", "")
        name = re.sub(r"layer_scale(\d)\.lambda1", r"ls\1.gamma", name).replace("attention.o_proj", "attn.proj")
        for old, new in {"gate_proj": "w1", "up_proj": "w2", "down_proj": "w3"}.items():
            name = name.replace(old, new)
        weights[name] = tensor
    for i in range(2):
        q, k, v = (f"blocks.{i}.attention.{part}_proj" for part in "qkv")
        qkv = f"blocks.{i}.attn.qkv"
        weights[f"{qkv}.weight"] = torch.cat([weights.pop(f"{part}.weight") for part in (q, k, v)])
        q_bias, v_bias = weights.pop(f"{q}.bias"), weights.pop(f"{v}.bias")
        weights[f"{qkv}.bias"] = torch.cat((q_bias, torch.randn(len(q_bias)), v_bias))
        weights[f"{qkv}.bias_mask"] = torch.ones(3, len(q_bias)).index_fill(0, torch.tensor(1), 0).flatten()
    weights["local_cls_norm.weight"] = torch.randn(128)
    weights["rope_embed.periods"] = 100 ** torch.linspace(0, 1, 17)[:16].bfloat16().float()
    return weights


def test_dinov3s_own_names():
    theirs = hugging_face("DINOv3ViT", num_register_tokens=4, **GATED)
    ours = load_vit(dinov3_weights(theirs))
    assert_features(ours, theirs)
    assert (ours.config.rope_base, ours.config.num_heads) == (100.0, 2)


def test_the_periods_of_dinov3_tell_base_and_heads():
    weights = dinov3_weights(hugging_face("DINOv3ViT", **GATED))
    for periods, heads, base in ((10_000 ** (torch.arange(8) / 8), 4, 1e4), (100 ** (torch.arange(32) / 32), 1, 100)):
        config = load_vit(weights | {"rope_embed.periods": periods.bfloat16()}).config
        assert (config.num_heads, config.rope_base) == (heads, base)
    with pytest.raises(ValueError, match=r"rope_embed\.periods must be powers of one base, not \[1\.0, 7\.6"):
        load_vit(weights | {"rope_embed.periods": torch.linspace(1, 100, 16)})
    with pytest.raises(ValueError, match=r"num_heads=4 disagrees with the weights, which have num_heads=2"):
        load_vit(weights, num_heads=4)


@pytest.mark.parametrize(
    "name",
    [
        *("vit_tiny_patch16_224", "vit_huge_patch14_224", "vit_giant_patch14_224", "vit_gigantic_patch14_224"),
        *("vit_large_patch14_reg4_dinov2", "vit_giant_patch14_reg4_dinov2", "vit_so400m_patch14_reg1_tipsv2"),
        *("vit_huge_plus_patch16_dinov3", "vit_7b_patch16_dinov3"),
    ],
)
def test_the_heads_of_published_models(name):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=0)
    config, _ = configure(convert(model.state_dict()), {}, {}, None)
    assert (config.num_heads, config.depth) == (model.blocks[0].attn.num_heads, len(model.blocks))
    assert config.image_size in (model.patch_embed.img_size[0], 224)


@torch.no_grad()
def test_other_heads_are_named():
    theirs = timm_vit(num_heads=4)
    assert_features(load_vit(theirs.state_dict(), num_heads=4), theirs, sides=[(64, 64)])
    with pytest.raises(ValueError, match=r"the number of heads does not follow from dim=96: give num_heads"):
        load_vit(timm_vit(embed_dim=96).state_dict())


def test_two_cls_tokens():
    theirs = timm.create_model("deit_tiny_distilled_patch16_224", depth=1, img_size=64)
    ours = load_vit({name: x for name, x in theirs.state_dict().items() if "head" not in name})
    assert (ours.layout.num_cls_tokens, ours.config.position_rows) == (2, "cls")
    assert_features(ours, theirs.eval(), sides=[(64, 64)])


def test_heads_are_left_out_and_named():
    theirs = hugging_face("Dinov2", kind="ForImageClassification")
    with pytest.warns(UserWarning, match=r"^left out what RegisterViT has no place for: classifier$") as caught:
        ours = load_vit(theirs.state_dict(), num_heads=2, eps=1e-6, mlp="gelu")
    assert len(caught) == 1
    assert_features(ours, theirs.dinov2, sides=[(64, 64)])
    with pytest.warns(UserWarning, match=r": fc_norm, head$"):
        load_vit(timm_vit(num_classes=3).state_dict() | {"fc_norm.weight": torch.ones(128)})


@pytest.mark.parametrize("place", [("teacher",), ("model",), ("state_dict", "model"), ()])
def test_training_checkpoints(place):
    """Their state dict lies in a dict, their names begin with a prefix; the teacher's count."""
    theirs, other = timm_vit(), timm_vit(depth=1)
    checkpoint = {f"teacher.backbone.{name}": x for name, x in theirs.state_dict().items()}
    checkpoint |= {f"student.backbone.{name}": x for name, x in other.state_dict().items()}
    checkpoint["teacher.dino_head.mlp.weight"] = torch.ones(1)
    for key in place:
        checkpoint = {key: checkpoint, "epoch": 3}
    nest = "".join(f"{key}." for key in reversed(place))
    with (
        pytest.warns(UserWarning, match=r"^left out what RegisterViT has no place for: teacher\.dino_head$"),
        pytest.warns(UserWarning, match=f"^took {nest}teacher of the source, and not {nest}student: give load_vit"),
    ):
        ours = load_vit(checkpoint)
    assert_features(ours, theirs, sides=[(64, 64)])
    with pytest.warns(UserWarning, match="^took teacher of the source, and not model: give load_vit the state dict"):
        both = load_vit({"model": other.state_dict(), "teacher": theirs.state_dict()})
    assert_features(both, theirs, sides=[(64, 64)])


@torch.no_grad()
def test_registers_are_added_to_a_model_without():
    theirs = timm_vit()
    weights = theirs.state_dict()
    plain, ours = load_vit(weights), load_vit(weights, num_registers=3)
    assert load_vit(weights, num_registers=0).config == plain.config
    expected = patch_like_registers(weights["pos_embed"][:, 1:], weights["patch_embed.proj.bias"], 3)
    torch.testing.assert_close(ours.register_tokens, expected, rtol=0, atol=0)
    assert (ours.layout.num_registers, ours.config.position_rows) == (3, "cls")
    rest = ours.state_dict()
    del rest["register_tokens"]
    assert all(torch.equal(rest[name], tensor) for name, tensor in plain.state_dict().items())
    assert rest.keys() == plain.state_dict().keys()
    assert ours(torch.randn(1, 3, 64, 64)).registers.shape == (1, 3, 128)


def test_registers_that_are_there_stay():
    weights = timm_vit(reg_tokens=4).state_dict()
    assert load_vit(weights, num_registers=4).layout.num_registers == 4
    for count in (0, 2, 8):
        with pytest.raises(ValueError, match=f"num_registers={count} disagrees with the weights, which have 4 "):
            load_vit(weights, num_registers=count)
    with pytest.raises(ValueError, match=r"num_registers=4 new registers would be made from position rows"):
        load_vit(hugging_face("DINOv3ViT").state_dict(), num_registers=4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["timm registers, a row each", "Dinov2"])
def test_positions_are_resampled_once_for_a_size(name):
    theirs = MODELS[name]()
    ours = load_vit(theirs.state_dict(), image_size=96)
    assert (ours.config.image_size, ours.pos_embed.shape[1]) == (
        96,
        theirs.state_dict()["pos_embed" if "timm" in name else "embeddings.position_embeddings"].shape[1] + 36 - 16,
    )
    assert_features(ours, theirs, sides=[(96, 96)])
    with pytest.raises(ValueError, match=r"image_size=97 must be a multiple of patch_size=16"):
        load_vit(theirs.state_dict(), image_size=97)


def test_dtype_device_and_backend_are_the_models():
    weights = timm_vit(reg_tokens=4).state_dict()
    ours = load_vit(weights, dtype=torch.bfloat16, device="cpu", backend="reference")
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    assert all(p.requires_grad and p.device.type == "cpu" for p in ours.parameters())
    assert ours.blocks[0].attn.backend == "reference"


def test_the_source_is_left_alone():
    weights = timm_vit().state_dict()
    before = {name: tensor.clone() for name, tensor in weights.items()}
    ours = load_vit(weights)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    assert weights.keys() == before.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in before.items())


def test_files(tmp_path):
    theirs = timm_vit()
    for suffix in (".pt", ".pth", ".bin"):
        torch.save(theirs.state_dict(), tmp_path / f"vit{suffix}")
        assert_features(load_vit(tmp_path / f"vit{suffix}"), theirs, sides=[(64, 64)])
    torch.save({"model": theirs.state_dict(), "code": torch.nn.Linear(1, 1)}, tmp_path / "code.pth")
    message = (
        r"code\.pth holds objects of torch\.nn\.modules\.linear\.Linear, and is read with weights_only=True, .* save"
    )
    with pytest.raises(pickle.UnpicklingError, match=message):
        load_vit(str(tmp_path / "code.pth"))
    (tmp_path / "vit.npz").write_bytes(b"x")
    with pytest.raises(
        ValueError, match=r"vit\.npz must end in \.safetensors, \.pt, \.pth, \.bin, \.ckpt or \.pth\.tar, or"
    ):
        load_vit(tmp_path / "vit.npz")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="the source must hold a state dict, tensors by name, not a list"):
        load_vit(tmp_path / "list.pt")


def changed(weights, **changes):
    return {name: tensor for name, tensor in {**weights, **changes}.items() if tensor is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra.weight": torch.ones(1)}, r"RegisterViT has no place for extra\.weight, and would give other features"),
        ({"blocks.1.norm1.bias": None}, r"the weights lack blocks\.1\.norm1\.bias"),
        ({"blocks.1.mlp.fc1.bias": None}, r"the weights lack blocks\.1\.mlp\.fc1\.bias"),
        ({"blocks.0.mlp.fc2.weight": None}, r"the weights lack blocks\.0\.mlp\.fc2\.weight"),
        ({"norm.weight": torch.ones(3)}, r"norm\.weight must have the shape \(128,\), not \(3,\)"),
        ({"pos_embed": torch.ones(1, 15, 128)}, r"the 15 position rows are no square grid of patches"),
        ({"pos_embed": None}, r"the weights lack pos_embed"),
        ({"patch_embed.proj.weight": torch.ones(128, 768)}, r"patch_embed\.proj\.weight must have 4 dimensions"),
        ({"patch_embed.proj.weight": torch.ones(128, 3, 16, 8)}, r"patches must be square, and .* are 16 x 8"),
        (
            {"patch_embed.proj.weight": None},
            r"the weights, .* and \d+ more, are of no model known of transformers, dinov3",
        ),
        ({"register_tokens": torch.ones(1, 4, 128)}, r"those of a RegisterViT go into RegisterViT\(config\)"),
        ({"cls_token": None}, r"the weights have no cls_token: timm's models without one differ"),
        (
            {"norm.weight": None, "norm.bias": None, "fc_norm.weight": torch.ones(128)},
            r"the weights have fc_norm",
        ),
        ({"other.patch_embed.proj.weight": torch.ones(1)}, r"of several models, '', 'other\.': give those"),
    ],
)
def test_what_cannot_give_the_same_features_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        load_vit(changed(timm_vit().state_dict(), **changes))


@pytest.mark.filterwarnings("ignore:left out.*pooler")
@pytest.mark.parametrize("name", ["Dinov2", "ViT"])
def test_weights_that_lost_their_positions_are_not_taken_for_rope(name):
    weights = hugging_face(name).state_dict()
    with pytest.raises(ValueError, match="the weights lack pos_embed"):
        load_vit(changed(weights, **{"embeddings.position_embeddings": None}))


def test_evas_other_models_are_refused():
    """They may turn queries and keys by an angle that no weight tells."""
    from timm.models.eva import Eva

    model = Eva(img_size=64, embed_dim=128, depth=1, num_heads=2, num_classes=0, use_fc_norm=False)
    with pytest.raises(ValueError, match=r"no place for blocks\.0\.attn\.q_bias, blocks\.0\.attn\.v_bias"):
        load_vit(model.state_dict())


def test_nothing_is_warned_of_where_nothing_is_lost():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told = {"num_heads": 2, "eps": 1e-6, "mlp": "gelu"}
        load_vit(timm_vit().state_dict(), **told, grid=(4, 4), antialias=True, interpolate_offset=0.0)
        load_vit(hugging_face("Dinov2").state_dict(), **told)
        load_vit(dinov3_weights(hugging_face("DINOv3ViT", **GATED)), eps=1e-5)
