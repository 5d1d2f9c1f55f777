"""Files and folders as libraries and training codes write them: the same features, or one plain sentence."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import pickle
import tarfile
import warnings

import numpy
import pytest
import torch

from vitreg_kernels import load_vit

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

from safetensors.torch import save_file  # noqa: E402

from tests.integrations.models import assert_features, assert_same, hugging_face, scramble, timm_vit  # noqa: E402
from tests.integrations.test_checkpoints import GATED, dinov3_weights  # noqa: E402

TOLD = {"num_heads": 2, "mlp": "gelu", "eps": 1e-6, "antialias": True, "interpolate_offset": 0.0, "grid": (4, 4)}


@pytest.fixture
def silence():
    """A warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture(scope="module")
def theirs():
    return timm_vit(depth=1)


class TestFiles:
    @pytest.mark.parametrize("zipped", [True, False])
    @pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ".pth.tar", ".tar"])
    def test_of_torch(self, suffix, zipped, theirs, tmp_path, silence):
        """With what a training puts beside the weights; as torch writes it since 1.6, and as it did before."""
        path = tmp_path / f"vit{suffix}"
        args = argparse.Namespace(lr=0.1, betas=(0.9, 0.95), name=None, nested=argparse.Namespace(depth=1))
        content = {"state_dict": theirs.state_dict(), "args": args, "epoch": 3, "optimizer": {"state": {}}}
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        for source in (path, str(path)):
            assert_same(load_vit(source, **TOLD), load_vit(theirs.state_dict(), **TOLD))

    def test_of_safetensors(self, theirs, tmp_path, silence):
        save_file(theirs.state_dict(), tmp_path / "vit.safetensors")
        assert_same(load_vit(tmp_path / "vit.safetensors", **TOLD), load_vit(theirs.state_dict(), **TOLD))

    @pytest.mark.parametrize("known", [True, False])
    def test_what_torch_calls_safe_is_left_as_it_was(self, known, theirs, tmp_path):
        torch.save({"model": theirs.state_dict(), "args": argparse.Namespace()}, tmp_path / "vit.pth")
        torch.save({"model": theirs.state_dict(), "args": pathlib.PurePosixPath("a")}, tmp_path / "path.pth")
        with torch.serialization.safe_globals([argparse.Namespace] if known else []):
            before = set(torch.serialization.get_safe_globals())
            assert (argparse.Namespace in before) == known
            load_vit(tmp_path / "vit.pth", **TOLD)
            assert set(torch.serialization.get_safe_globals()) == before
            with pytest.raises(pickle.UnpicklingError, match="PurePosixPath"):
                load_vit(tmp_path / "path.pth", **TOLD)
            assert set(torch.serialization.get_safe_globals()) == before

    @pytest.mark.parametrize("zipped", [True, False])
    @pytest.mark.parametrize(
        ("thing", "name"),
        [
            (torch.nn.Linear(1, 1), r"torch\.nn\.modules\.linear\.Linear"),
            (numpy.float64(3.0), r"numpy\.\w+\.multiarray\.scalar"),
            (pathlib.PurePosixPath("data"), r"pathlib\.PurePosixPath"),
            (argparse.Namespace(parser=argparse.ArgumentParser), r"argparse\.ArgumentParser"),
        ],
        ids=lambda thing: type(thing).__name__,
    )
    def test_objects_of_other_classes_are_refused_by_name(self, thing, name, zipped, theirs, tmp_path):
        path = tmp_path / "vit.ckpt"
        torch.save({"state_dict": theirs.state_dict(), "thing": thing}, path, _use_new_zipfile_serialization=zipped)
        message = (
            rf"vit\.ckpt holds objects of {name}, and is read with weights_only=True, .* save its state dict alone"
        )
        with pytest.raises(pickle.UnpicklingError, match=message):
            load_vit(path, **TOLD)

    def test_a_files_code_is_not_run(self, theirs, tmp_path):
        class Evil:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "made"),)

        torch.save({"state_dict": theirs.state_dict(), "x": Evil()}, tmp_path / "vit.pth")
        with pytest.raises(pickle.UnpicklingError, match=r"holds objects of posix\.mkdir, "):
            load_vit(tmp_path / "vit.pth", **TOLD)
        assert not (tmp_path / "made").exists()

    @pytest.mark.parametrize("suffix", [".npz", ".h5", ".onnx", ".msgpack", ""])
    def test_files_of_another_kind(self, suffix, tmp_path):
        (tmp_path / f"vit{suffix}").write_bytes(b"x")
        message = rf"vit{suffix} must end in \.safetensors, \.pt, \.pth, \.bin, \.ckpt or \.pth\.tar, or be a folder"
        with pytest.raises(ValueError, match=message):
            load_vit(tmp_path / f"vit{suffix}")

    def test_a_name_on_a_hub_is_no_file(self):
        with pytest.raises(FileNotFoundError, match=r"^there is no file or folder facebook/dinov2-base$"):
            load_vit("facebook/dinov2-base")

    def test_the_case_of_a_suffix_is_no_matter(self, theirs, tmp_path, silence):
        torch.save(theirs.state_dict(), tmp_path / "vit.PTH")
        assert_same(load_vit(tmp_path / "vit.PTH", **TOLD), load_vit(theirs.state_dict(), **TOLD))

    @pytest.mark.parametrize("suffix", [".pth", ".safetensors", ""])
    def test_a_file_that_is_not_there(self, suffix, tmp_path):
        with pytest.raises(FileNotFoundError, match=rf"^there is no file or folder .*vit{suffix}$"):
            load_vit(tmp_path / f"vit{suffix}")

    @pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore:'torch.load' received a zip file")
    def test_torchscript(self, tmp_path):
        torch.jit.trace(torch.nn.Linear(1, 1), torch.ones(1, 1)).save(str(tmp_path / "vit.pt"))
        with pytest.raises(
            ValueError, match=r"^\S*vit\.pt is a TorchScript archive, which is code: save its state_dict\(\) alone$"
        ):
            load_vit(tmp_path / "vit.pt")

    @pytest.mark.filterwarnings("ignore:Detected pickle protocol")
    @pytest.mark.parametrize("suffix", [".pth", ".bin", ".safetensors"])
    @pytest.mark.parametrize("content", [b"", b"hello world" * 10, b"PK\x03\x04", b"\x80\x05", b"<html>404</html>"])
    def test_garbage(self, content, suffix, tmp_path):
        (tmp_path / f"vit{suffix}").write_bytes(content)
        writer = "safetensors" if suffix == ".safetensors" else "torch.save"
        with pytest.raises(ValueError, match=rf"vit\{suffix} cannot be read as what {writer} wrote: \w.*\w$"):
            load_vit(tmp_path / f"vit{suffix}")

    @pytest.mark.parametrize("suffix", [".pth", ".bin", ".safetensors"])
    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"", "it is empty"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1\n", "it is a Git LFS pointer to the"),
            (b"<!DOCTYPE html><html>", "it is a page of HTML or XML"),
            (b"\n  <html>404</html>", "it is a page of HTML or XML"),
        ],
        ids=str,
    )
    def test_what_a_download_leaves_in_place_of_a_file(self, content, reason, suffix, tmp_path):
        (tmp_path / f"vit{suffix}").write_bytes(content)
        with pytest.raises(ValueError, match=f"cannot be read as what .* wrote: {reason}"):
            load_vit(tmp_path / f"vit{suffix}")

    @pytest.mark.filterwarnings("ignore:Detected pickle protocol")
    @pytest.mark.parametrize("protocol", [4, 5])
    def test_a_later_pickle_protocol(self, protocol, theirs, tmp_path):
        torch.save(theirs.state_dict(), tmp_path / "vit.bin", pickle_protocol=protocol)
        (tmp_path / "other.bin").write_bytes(pickle.dumps({"a": 1}, protocol=protocol))
        for name in ("vit.bin", "other.bin"):
            with pytest.raises(
                ValueError, match=r"cannot be read as what torch\.save wrote: it was pickled with protocol"
            ):
                load_vit(tmp_path / name)

    def test_a_tar_that_is_one(self, tmp_path):
        (tmp_path / "a").write_bytes(b"x")
        with tarfile.open(tmp_path / "vit.pth.tar", "w") as tar:
            tar.add(tmp_path / "a")
        with pytest.raises(ValueError, match=r"vit\.pth\.tar cannot be read as what torch\.save wrote: "):
            load_vit(tmp_path / "vit.pth.tar")


# Options that the weights do not tell, none of them the default.
TRANSFORMERS = {
    "ViT": {"layer_norm_eps": 1e-3, "num_attention_heads": 4},
    "Dinov2": {"layer_norm_eps": 1e-3, "num_attention_heads": 8},
    "Dinov2, SwiGLU": {"layer_norm_eps": 1e-3, "num_attention_heads": 4, "use_swiglu_ffn": True, "hidden_act": "relu"},
    "Dinov2WithRegisters": {"layer_norm_eps": 1e-3, "num_attention_heads": 4, "num_register_tokens": 3},
    "DINOv3ViT": {"layer_norm_eps": 1e-3, "num_attention_heads": 4, "num_register_tokens": 2, "rope_theta": 30.0},
    "DINOv3ViT, gated": {"layer_norm_eps": 1e-2, "num_attention_heads": 1, **GATED},
}


def saved(kind, folder, **options):
    """A model of transformers, without the pooler that ViT has, in a folder that it wrote."""
    model = hugging_face(kind.partition(",")[0], **TRANSFORMERS[kind])
    if kind == "ViT":
        model = scramble(type(model)(model.config, add_pooling_layer=False))
    model.save_pretrained(folder, **options)
    return model


def as_pickles(folder, *, split):
    """The weights of a folder of safetensors under the names of earlier versions."""
    weights = transformers.modeling_utils.load_state_dict(str(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    if not split:
        torch.save(weights, folder / "pytorch_model.bin")
        return
    parts = {f"pytorch_model-0000{i + 1}-of-00002.bin": dict(list(weights.items())[i::2]) for i in range(2)}
    for name, part in parts.items():
        torch.save(part, folder / name)
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


class TestFoldersOfTransformers:
    @pytest.mark.parametrize("kind", TRANSFORMERS)
    def test_the_configuration_is_read(self, kind, tmp_path, silence):
        theirs = saved(kind, tmp_path)
        ours = load_vit(tmp_path)
        assert ours.config.eps == TRANSFORMERS[kind]["layer_norm_eps"]
        assert_features(ours, theirs, sides=[(64, 64), (48, 80)])

    @pytest.mark.parametrize("layout", ["split", "pickled", "pickled, split"])
    @pytest.mark.parametrize("kind", ["ViT", "DINOv3ViT"])
    def test_however_the_weights_lie(self, kind, layout, tmp_path, silence):
        theirs = saved(kind, tmp_path, **({"max_shard_size": "100KB"} if layout == "split" else {}))
        if layout == "split":
            assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
            assert not (tmp_path / "model.safetensors").exists()
        else:
            as_pickles(tmp_path, split=layout == "pickled, split")
        assert_features(load_vit(str(tmp_path)), theirs, sides=[(64, 64)])

    @torch.no_grad()
    def test_a_vit_of_images_that_are_not_square(self, tmp_path, silence):
        """Which transformers adds to them as they are, and cannot resample."""
        config = transformers.ViTConfig(
            hidden_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=[36, 64],
            patch_size=4,
        )
        theirs = scramble(transformers.ViTModel(config, add_pooling_layer=False))
        theirs.save_pretrained(tmp_path)
        ours, images = load_vit(tmp_path).eval(), torch.randn(2, 3, 36, 64)
        assert (ours.config.grid, ours.config.image_size) == ((9, 16), (36, 64))
        torch.testing.assert_close(ours.forward_features(images), theirs(pixel_values=images).last_hidden_state)
        with pytest.raises(
            ValueError, match=r"grid=\(12, 12\) disagrees with config\.json, whose images of 36 x 64 have"
        ):
            load_vit(tmp_path, grid=(12, 12))
        assert load_vit(tmp_path, image_size=32).config.grid == (8, 8)

    def test_the_size_of_a_model_with_rope_is_no_matter(self, tmp_path, silence):
        theirs = saved("DINOv3ViT", tmp_path)
        for size, config_size in ((70, 64), ([48, 80], (48, 80))):
            changed(tmp_path, image_size=size)
            ours = load_vit(tmp_path)
            assert ours.config.image_size == config_size
            assert_features(ours, theirs, sides=[(64, 64)])

    def test_a_dinov2_of_images_that_are_not_square(self, tmp_path, silence):
        """Whose rows transformers takes for a square's nevertheless."""
        model = hugging_face("Dinov2", image_size=[36, 64], patch_size=4)
        model.save_pretrained(tmp_path)
        assert_features(load_vit(tmp_path), model, sides=[(36, 64), (48, 48)])

    def test_a_classifier_is_left_out(self, tmp_path):
        theirs = hugging_face("Dinov2", kind="ForImageClassification", layer_norm_eps=1e-3)
        theirs.save_pretrained(tmp_path)
        with pytest.warns(UserWarning, match="^left out what RegisterViT has no place for: classifier$") as caught:
            ours = load_vit(tmp_path)
        assert len(caught) == 1
        assert_features(ours, theirs.dinov2, sides=[(64, 64)])

    def test_without_a_configuration_the_guesses_are_said(self, tmp_path):
        theirs = saved("Dinov2", tmp_path)
        (tmp_path / "config.json").unlink()
        with pytest.warns(
            UserWarning, match=r"^assumed what the weights do not tell: num_heads=2, mlp='gelu', eps=1e-06;"
        ):
            load_vit(tmp_path)
        assert_features(load_vit(tmp_path, num_heads=8, eps=1e-3, mlp="gelu"), theirs, sides=[(64, 64)])

    def test_a_configuration_that_leaves_something_out(self, tmp_path):
        saved("ViT", tmp_path)
        changed(tmp_path, layer_norm_eps=None)
        with pytest.warns(
            UserWarning, match=r"^assumed what neither the weights nor config.json tell: eps=1e-12; give"
        ):
            load_vit(tmp_path)

    @pytest.mark.parametrize(
        ("kind", "changes", "message"),
        [
            (
                "ViT",
                {"model_type": "clip"},
                "says model_type='clip', and RegisterViT computes vit, dinov2, dinov2_with",
            ),
            ("ViT", {"model_type": "vit_mae"}, "says model_type='vit_mae', and"),
            ("ViT", {"model_type": None}, "says model_type=None, and"),
            (
                "ViT",
                {"hidden_act": "quick_gelu"},
                "says hidden_act='quick_gelu', and RegisterViT computes 'gelu' there",
            ),
            ("Dinov2", {"hidden_act": "gelu_new"}, "says hidden_act='gelu_new', and"),
            (
                "DINOv3ViT, gated",
                {"hidden_act": "gelu"},
                "says hidden_act='gelu', and RegisterViT computes 'silu' there",
            ),
            ("ViT", {"quantization_config": {"bits": 4}}, "says that the weights are quantised"),
            ("ViT", {"model_type": "dinov3_vit"}, "says model_type='dinov3_vit', and the weights are of vit"),
            ("ViT", {"model_type": "dinov2"}, "says model_type='dinov2', and the weights are of vit"),
            ("DINOv3ViT", {"model_type": "vit"}, "says model_type='vit', and the weights are of dinov3_vit"),
            ("Dinov2", {"model_type": "vit"}, "says model_type='vit', and the weights are of dinov2 or dinov2_with"),
            (
                "Dinov2WithRegisters",
                {"model_type": "dinov2"},
                "says model_type='dinov2', and the weights are of dinov2_w",
            ),
            ("ViT", {"intermediate_size": 77}, "says hidden_dim=77, and the weights have 256"),
            ("ViT", {"qkv_bias": False}, "says qkv_bias=False, and the weights have True"),
            ("ViT", {"image_size": "32"}, "says image_size='32', which must be a positive int, or a list of two"),
            ("ViT", {"image_size": {"height": 32}}, "says image_size={'height': 32}, which must be"),
            ("ViT", {"image_size": [32, 32, 3]}, r"says image_size=\(32, 32, 3\), which must be"),
            ("DINOv3ViT", {"image_size": True}, "says image_size=True, which must be"),
            ("ViT", {"num_hidden_layers": 3}, "says depth=3, and the weights have 2"),
            ("ViT", {"hidden_size": 64}, "says dim=64, and the weights have 128"),
            ("ViT", {"patch_size": [8, 8]}, "says patch_size=8, and the weights have 16"),
            ("ViT", {"num_channels": 1}, "says in_channels=1, and the weights have 3"),
            ("Dinov2WithRegisters", {"num_register_tokens": 4}, "says num_registers=4, and the weights have 3"),
            (
                "DINOv3ViT, gated",
                {"use_gated_mlp": False, "hidden_act": "gelu"},
                "says mlp='gelu', and the weights have",
            ),
        ],
        ids=str,
    )
    def test_what_would_be_other_features_is_refused(self, kind, changes, message, tmp_path):
        saved(kind, tmp_path)
        changed(tmp_path, **changes)
        with pytest.raises(ValueError, match=f"config.json {message}"):
            load_vit(tmp_path)

    @pytest.mark.parametrize("field", ["num_heads", "eps", "rope_base"])
    def test_a_change_must_agree_with_it(self, field, tmp_path):
        saved("DINOv3ViT", tmp_path)
        message = (
            rf"^{field}=2 disagrees with config\.json, which says \d.*: give the file of the weights alone to say other"
        )
        with pytest.raises(ValueError, match=message):
            load_vit(tmp_path, **{field: 2})
        assert getattr(load_vit(tmp_path / "model.safetensors", **FOR_DINOV3 | {field: 2}).config, field) == 2
        said = getattr(load_vit(tmp_path).config, field)
        assert getattr(load_vit(tmp_path, **{field: said}).config, field) == said

    def test_a_patch_of_two_equal_sides_is_a_patch(self, tmp_path, silence):
        theirs = saved("ViT", tmp_path)
        changed(tmp_path, patch_size=[16, 16], image_size=[64, 64])
        assert_features(load_vit(tmp_path), theirs, sides=[(64, 64)])


FOR_DINOV3 = {"num_heads": 4, "mlp": "gelu", "eps": 1e-3, "rope_base": 30.0}


def changed(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


class TestFoldersOfTimm:
    def saved(self, folder, **options):
        from timm.models._hub import save_for_hf

        sizes = {"depth": 2, "embed_dim": 64, "num_heads": 4, "num_classes": 0}
        model = scramble(timm.create_model("vit_tiny_patch16_224", **{**sizes, **options}))
        save_for_hf(model, str(folder), safe_serialization=options.get("num_heads") != 2)
        return model

    @pytest.mark.parametrize(
        "options",
        [
            {"img_size": (64, 96), "reg_tokens": 2},
            {"img_size": (36, 64), "patch_size": 4, "act_layer": "gelu"},
            {"img_size": 64, "num_heads": 2, "dynamic_img_size": True},
            {"img_size": 32, "patch_size": 4, "reg_tokens": 16},
            {"img_size": 36, "patch_size": 4, "reg_tokens": 16, "no_embed_class": True},
            {},
        ],
        ids=str,
    )
    def test_the_arguments_are_read(self, options, tmp_path):
        """What its architecture has of itself, the file does not say, and it is said."""
        theirs = self.saved(tmp_path, **options)
        assumed = "eps=1e-06" if "act_layer" in options else "mlp='gelu', eps=1e-06"
        with pytest.warns(UserWarning, match=f"^assumed what neither the weights nor config.json tell: {assumed}; "):
            ours = load_vit(tmp_path)
        assert (ours.config.num_heads, ours.config.grid) == (options.get("num_heads", 4), theirs.patch_embed.grid_size)
        assert_features(ours, theirs, sides=[theirs.patch_embed.img_size])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load_vit(tmp_path, mlp="gelu", eps=1e-6)

    @pytest.mark.parametrize("no_embed_class", [True, False])
    def test_rows_of_registers_are_read_where_no_size_is(self, no_embed_class, tmp_path):
        """81 rows are 9 x 9, or 8 x 8 and those of CLS and 16 registers."""
        side = 9 if no_embed_class else 8
        options = {"patch_size": 4, "reg_tokens": 16, "no_embed_class": no_embed_class}
        theirs = self.saved(tmp_path, img_size=4 * side, **options)
        changed(tmp_path, model_args={"num_heads": 4, **options}, pretrained_cfg=None)
        with pytest.warns(UserWarning, match=rf"mlp='gelu', eps=1e-06, grid=\({side}, {side}\); give load_vit any"):
            ours = load_vit(tmp_path)
        assert_features(ours, theirs, sides=[(4 * side, 4 * side)])

    @pytest.mark.parametrize("fixed", [True, False])
    def test_the_size_of_a_model_that_takes_no_other_is_that_of_its_rows(self, fixed, tmp_path):
        theirs = self.saved(tmp_path, img_size=(36, 64), patch_size=4)
        described = {"input_size": [3, 36, 64], "fixed_input_size": fixed}
        changed(tmp_path, model_args={"num_heads": 4}, pretrained_cfg=described)
        with pytest.warns(
            UserWarning, match="mlp='gelu', eps=1e-06" + ("; give" if fixed else r", grid=\(12, 12\); give")
        ):
            ours = load_vit(tmp_path)
        assert ours.config.grid == ((9, 16) if fixed else (12, 12))
        if fixed:
            assert_features(ours, theirs, sides=[(36, 64)])

    def test_an_architecture_alone_is_not_looked_up(self, tmp_path):
        weights = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0).state_dict()
        torch.save(weights, tmp_path / "pytorch_model.bin")
        (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224"}))
        with pytest.warns(UserWarning, match=r"num_heads=3, mlp='gelu', eps=1e-06, grid=\(14, 14\); give load_vit any"):
            load_vit(tmp_path)

    def test_as_transformers_wraps_it(self, tmp_path):
        theirs = self.saved(tmp_path / "timm", img_size=64)
        config = json.loads((tmp_path / "timm" / "config.json").read_text())
        wrapper = {f"timm_model.{name}": x for name, x in theirs.state_dict().items()}
        save_file(wrapper, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "timm_wrapper"}))
        assert_features(load_vit(tmp_path, mlp="gelu", eps=1e-6), theirs, sides=[(64, 64)])

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"model_args": {"act_layer": "gelu_tanh"}},
                "config.json says act_layer='gelu_tanh', and RegisterViT computes",
            ),
            (
                {"architecture": "vit_base_patch16_rpn_224"},
                "config.json says architecture='vit_base_patch16_rpn_224', whose",
            ),
            (
                {"architecture": "vit_small_patch16_rope_ape_224"},
                "says architecture='vit_small_patch16_rope_ape_224', whose",
            ),
            ({"architecture": "eva02_tiny_patch14_224"}, "says architecture='eva02_tiny_patch14_224', whose blocks"),
            (
                {"architecture": "vit_small_patch16_dinov3"},
                "says architecture='vit_small_patch16_dinov3', whose blocks",
            ),
            (
                {"model_args": {"block_fn": "ResPostBlock"}},
                "says block_fn='ResPostBlock', which RegisterViT has no place",
            ),
            ({"model_args": {"attn_layer": "diff"}}, "says attn_layer='diff', which RegisterViT has no place for"),
            ({"model_args": {"pos_embed": "none"}}, "says pos_embed='none', and RegisterViT computes 'learn' alone"),
            (
                {"model_args": {"norm_layer": "rmsnorm"}},
                "says norm_layer='rmsnorm', and RegisterViT computes 'layernorm'",
            ),
            ({"model_args": {"hitherto_unknown": 1}}, "says hitherto_unknown=1, which RegisterViT has no place for"),
            ({"model_args": [1]}, "config.json must have objects for model_args and pretrained_cfg"),
            ({"architecture": None}, "config.json, beside weights under timm's names, names no architecture as timm's"),
            (
                {"architecture": None, "model_type": "vit"},
                "config.json, beside weights under timm's names, names no arch",
            ),
            ({"model_args": {"depth": 3}}, "config.json says depth=3, and the weights have 2"),
            ({"model_args": {"reg_tokens": 4}}, "config.json says num_registers=4, and the weights have 0"),
            ({"model_args": {"img_size": 96}}, "the 17 position rows are no grid of 6 x 6 patches with 0 or 1 rows"),
        ],
        ids=str,
    )
    def test_what_would_be_other_features_is_refused(self, changes, message, tmp_path):
        self.saved(tmp_path, img_size=64)
        changed(tmp_path, **changes)
        with pytest.raises(ValueError, match=message):
            load_vit(tmp_path)

    def saved_dinov3(self, folder, architecture="vit_small_patch16_dinov3", **options):
        from timm.models._hub import save_for_hf

        arguments = {"depth": 1, "embed_dim": 64, "num_heads": 2, "img_size": 64, "num_classes": 0, **options}
        model = scramble(timm.create_model(architecture, **arguments))
        save_for_hf(model, str(folder), model_args=arguments, safe_serialization=True)
        return model

    def test_the_rotation_is_read(self, tmp_path):
        own = {"rope_type": "dinov3", "rope_rotate_half": True, "rope_grid_indexing": "ij", "rope_grid_offset": 0.0}
        theirs = self.saved_dinov3(tmp_path, **own, rope_temperature=50.0)
        with pytest.warns(UserWarning, match="neither the weights nor config.json tell: mlp='gelu', eps=1e-05"):
            ours = load_vit(tmp_path)
        assert ours.config.rope_base == 50.0
        assert_features(ours, theirs)

    @pytest.mark.parametrize(
        "argument",
        [
            {"rope_type": "cat"},
            {"rope_rotate_half": False},
            {"rope_grid_indexing": "xy"},
            {"rope_grid_offset": 0.5},
            {"rope_shift_coords": 0.1},
            {"attn_type": "rope"},
        ],
        ids=str,
    )
    def test_another_rotation_is_refused(self, argument, tmp_path):
        self.saved_dinov3(tmp_path, **argument)
        ((name, value),) = argument.items()
        with pytest.raises(ValueError, match=f"^config.json says {name}={value!r}, (and|which) RegisterViT"):
            load_vit(tmp_path)

    def test_another_rotation_by_its_architecture(self, tmp_path):
        self.saved_dinov3(tmp_path, "vit_small_patch16_rope_224", num_reg_tokens=2)
        with pytest.raises(
            ValueError, match="says architecture='vit_small_patch16_rope_224', whose blocks RegisterViT"
        ):
            load_vit(tmp_path)

    def test_every_argument_of_timms_models_is_known_or_refused_on_purpose(self):
        """A new one is to be looked at: it is refused until then."""
        import inspect

        from timm.models.eva import Eva
        from timm.models.vision_transformer import VisionTransformer

        from vitreg_kernels.integrations.timm import _ARGUMENTS, _HARMLESS, _ONLY

        refused = {"embed_layer", "embed_norm_layer", "block_fn", "mlp_layer", "attn_layer", "num_kv_heads"}
        refused |= {"ref_feat_shape", "rope_mrope_section", "rope_shift_coords", "rope_jitter_coords"}
        refused |= {"rope_rescale_coords"}
        arguments = {name for cls in (VisionTransformer, Eva) for name in inspect.signature(cls).parameters}
        known = {*_ARGUMENTS, *_HARMLESS, *_ONLY, "act_layer", "no_embed_class"}
        assert arguments - known <= refused
        assert not refused & known


class TestFolders:
    def test_without_weights(self, tmp_path):
        (tmp_path / "model.fp16.safetensors").write_bytes(b"x")
        with pytest.raises(
            ValueError, match=r"has no weights: none of model\.safetensors, model\.safetensors\.index\.json"
        ):
            load_vit(tmp_path)

    @pytest.mark.parametrize("content", ["", "{", "[1]", "\x00"])
    def test_a_configuration_that_is_none(self, content, tmp_path):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=r"config\.json (is no JSON|must hold a JSON object)"):
            load_vit(tmp_path)

    @pytest.mark.parametrize(
        ("index", "message"),
        [
            ({}, r"index\.json is no index: it must have a weight_map to names of files beside it"),
            ({"weight_map": {"a": "../vit.safetensors"}}, r"index\.json is no index"),
            ({"weight_map": {"a": "/vit.safetensors"}}, r"index\.json is no index"),
            ({"weight_map": {"a": 3}}, r"index\.json is no index"),
            ({"weight_map": {"a": "b.npz"}}, r"b\.npz must end in"),
            ({"weight_map": {"a": "list.pt"}}, r"list\.pt must hold tensors by name, not a list"),
            (
                {"weight_map": {"norm.weight": "vit.pt", "z": "vit.pt"}},
                r"index\.json names z, which vit\.pt does not hold",
            ),
        ],
        ids=str,
    )
    def test_an_index_that_is_none(self, index, message, tmp_path):
        (tmp_path / "b.npz").write_bytes(b"x")
        torch.save([1], tmp_path / "list.pt")
        torch.save(timm_vit().state_dict(), tmp_path / "vit.pt")
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=message):
            load_vit(tmp_path)

    def test_an_index_of_a_file_that_is_not_there(self, tmp_path):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "b.safetensors"}}))
        with pytest.raises(FileNotFoundError, match=r"there is no file or folder .*b\.safetensors"):
            load_vit(tmp_path)

    def test_a_library_that_writes_no_configuration(self, tmp_path):
        torch.save(dinov3_weights(hugging_face("DINOv3ViT", **GATED)), tmp_path / "pytorch_model.bin")
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(
            ValueError, match=r"dinov3 writes no config\.json, and one lies beside its weights: give the file"
        ):
            load_vit(tmp_path)
