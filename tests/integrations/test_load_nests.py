"""State dicts in dicts, and names with wrappers' parts in them: the same model, or a refusal that names the choices."""

from __future__ import annotations

import argparse
import re
import warnings
from itertools import combinations

import pytest
import torch
from torch import nn

from vitreg_kernels import load_vit

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:assumed what", "ignore:left out.*pooler")

from tests.integrations.models import assert_features, assert_same, hugging_face, timm_vit  # noqa: E402

OF_TIMM = ("state_dict_ema", "model_ema", "state_dict", "model")  # in the order of timm's loader
TOLD = {"num_heads": 2, "mlp": "gelu", "eps": 1e-6, "antialias": True, "interpolate_offset": 0.0, "grid": (4, 4)}


@pytest.fixture(scope="module")
def theirs():
    return timm_vit(reg_tokens=2)


@pytest.fixture(scope="module")
def expected(theirs):
    ours = load_vit(theirs.state_dict(), **TOLD)
    assert_features(ours, theirs)
    return ours


def prefixed(prefix):
    return lambda name: prefix + name


def each_block(part):
    return lambda name: re.sub(r"^(blocks\.\d+)\.", rf"\1.{part}.", name)


WRAPPERS = {
    **{prefix: prefixed(prefix) for prefix in ("", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.")},
    **{prefix: prefixed(prefix) for prefix in ("model.", "net.", "backbone.", "encoder.", "student.", "teacher.")},
    **{
        prefix: prefixed(prefix) for prefix in ("encoder._orig_mod.", "backbone.module.", "model.vit._orig_mod.module.")
    },
    **{prefix: prefixed(prefix) for prefix in ("_fsdp_wrapped_module.", "module.backbone.", "model.module.teacher.")},
    **{
        f"each block: {part}": each_block(part)
        for part in (
            "_orig_mod",
            "_checkpoint_wrapped_module",
            "module",
            "_fsdp_wrapped_module._checkpoint_wrapped_module",
        )
    },
    "each attention": lambda name: "model." + name.replace(".attn.", "._orig_mod.attn._orig_mod."),
    "the patch embedding": lambda name: name.replace("patch_embed.", "patch_embed._orig_mod."),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_parts_of_names_are_no_part_of_them(wrapper, theirs, expected):
    weights = {WRAPPERS[wrapper](name): tensor for name, tensor in theirs.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(load_vit(weights, **TOLD), expected)
        assert_same(load_vit({"state_dict": weights, "epoch": 3}, **TOLD), expected)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_so_of_transformers_names(wrapper):
    names = hugging_face("Dinov2").state_dict()

    def outer(name):
        return WRAPPERS[wrapper](name.replace("encoder.layer.", "blocks.")).replace("blocks.", "encoder.layer.")

    told = {"num_heads": 2, "mlp": "gelu", "eps": 1e-6}
    assert_same(load_vit({outer(name): x for name, x in names.items()}, **told), load_vit(names, **told))


def test_the_wrappers_of_torch_themselves(theirs, expected):
    compiled_blocks = timm_vit(reg_tokens=2)
    compiled_blocks.blocks = nn.Sequential(*(torch.compile(block, backend="eager") for block in compiled_blocks.blocks))
    compiled = torch.compile(theirs, backend="eager")
    averaged = torch.optim.swa_utils.AveragedModel(theirs)
    wrapped = [compiled, nn.DataParallel(theirs), nn.DataParallel(compiled), compiled_blocks]
    for module in (
        *wrapped,
        averaged,
        nn.ModuleDict({"model": averaged}),
        nn.ModuleDict({"vit": compiled}),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert_same(load_vit(module.state_dict(), **TOLD), expected)


def test_a_name_with_a_wrapper_and_without_is_two_models(theirs):
    weights = theirs.state_dict()
    both = weights | {f"module.{name}": tensor for name, tensor in weights.items()}
    with pytest.raises(ValueError, match=r"the weights have \w+ twice, once within a wrapper: give those of one model"):
        load_vit(both, **TOLD)


def test_names_of_two_versions_are_two_models():
    weights = hugging_face("Dinov2").state_dict()
    old = {re.sub(r"^encoder\.layer\.", "layer.", name): tensor for name, tensor in weights.items()}
    with pytest.raises(
        ValueError, match=r"the weights have blocks\.0\.[\w.]+ twice, under two names: give those of one"
    ):
        load_vit(weights | old)


NESTS = [
    *[(key,) for key in ("state_dict", "model", "teacher", "student", "ema", "net", "module", "backbone", "encoder")],
    *[(key,) for key in ("ema_state_dict", "model_state_dict", "weights", "params", "target_encoder", *OF_TIMM[:2])],
    *[("state_dict", "model"), ("model", "module"), ("checkpoint", "nets", "vit"), ("model_ema", "module")],
]


@pytest.mark.parametrize("nest", NESTS, ids=".".join)
def test_one_state_dict_is_found_wherever_it_lies(nest, theirs, expected):
    trained = timm_vit(reg_tokens=2)
    optimizer = torch.optim.AdamW(trained.parameters())
    for parameter in trained.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    beside = {
        "epoch": 3,
        "optimizer": optimizer.state_dict(),
        "args": argparse.Namespace(lr=0.1),
        "loss": torch.ones(()),
    }
    beside |= {"hyper_parameters": {"patch": 16}, "callbacks": {"EarlyStopping{}": {"best": torch.ones(1)}}}
    content = theirs.state_dict()
    for key in reversed(nest):
        content = {**beside, key: content}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(load_vit(content, **TOLD), expected)


@pytest.mark.parametrize("keys", [keys for count in range(1, 5) for keys in combinations(OF_TIMM, count)], ids=",".join)
def test_of_several_what_timms_loader_takes(keys, tmp_path):
    """And it is said which, and which not."""
    from timm.models import load_state_dict

    models = {key: timm_vit(depth=1) for key in keys}
    for i, model in enumerate(models.values()):
        nn.init.constant_(model.norm.bias, float(i))
    path = tmp_path / "last.pth.tar"
    torch.save(
        {key: model.state_dict() for key, model in reversed(models.items())} | {"arch": "vit", "version": 2}, path
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = load_vit(path, **TOLD)
    timms = load_state_dict(str(path))
    assert_same(ours, load_vit(timms, **TOLD))
    assert torch.equal(ours.norm.bias, timms["norm.bias"])
    assert_features(ours, models[keys[0]], sides=[(64, 64)])
    said = [str(warning.message) for warning in caught]
    rest = ", ".join(sorted(keys[1:]))
    sentence = f"took {keys[0]} of the source, and not {rest}: give load_vit the state dict that you mean"
    assert said == ([sentence] if rest else [])


def test_a_checkpoint_that_timm_saved(tmp_path):
    from timm.utils import CheckpointSaver, ModelEmaV3

    model = timm_vit(depth=1)
    average = ModelEmaV3(model, decay=0.5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    args = argparse.Namespace(model="vit", lr=0.1, opt=None, input_size=(3, 64, 64))
    saver = CheckpointSaver(
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        args,
        average,
        checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path),
    )
    saver.save_checkpoint(0, metric=1.0)
    (path,) = tmp_path.glob("checkpoint-0*")
    with pytest.warns(UserWarning, match="^took state_dict_ema of the source, and not state_dict: give load_vit"):
        ours = load_vit(path, **TOLD)
    assert_features(ours, average.module, sides=[(64, 64)])


@pytest.mark.parametrize(
    "others", [("student",), ("model", "state_dict"), ("ema", "student", "optimizer")], ids=",".join
)
def test_the_teacher_is_what_a_self_distillation_is_for(others, theirs, expected):
    student = timm_vit(depth=1).state_dict()
    content = {other: {f"backbone.{name}": x for name, x in student.items()} for other in others}
    content["teacher"] = {f"backbone.{name}": x for name, x in theirs.state_dict().items()}
    rest = ", ".join(sorted(others))
    with pytest.warns(UserWarning, match=f"^took teacher of the source, and not {rest}: give load_vit"):
        assert_same(load_vit(content, **TOLD), expected)


def test_so_of_two_models_in_one_state_dict(theirs, expected):
    """And the student's names are not called what has no place."""
    student = timm_vit(depth=1).state_dict()
    for teacher, other, names in (
        ("teacher.", "student.", ("teacher", "student")),
        ("module.teacher.backbone.", "module.student.backbone.", ("teacher", "student")),
        ("model.teacher.", "model.student.vit.", ("model.teacher", "model.student")),
        ("teacher.", "", ("teacher", "the rest")),
    ):
        weights = {teacher + name: x for name, x in theirs.state_dict().items()}
        weights |= {other + name: x for name, x in student.items()}
        for content, path in ((weights, ""), ({"state_dict": weights, "epoch": 1}, "state_dict.")):
            rest = path.rstrip(".") if path and not other else path * bool(other) + names[1]
            sentence = (
                f"took {path}{names[0]} of the source, and not {rest}: give load_vit the state dict that you mean"
            )
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                assert_same(load_vit(content, **TOLD), expected)
            assert [str(warning.message) for warning in caught] == [sentence]


@pytest.mark.parametrize(
    ("better", "taken"), [("teacher", "student"), ("state_dict_ema", "state_dict"), ("model_ema", "model")]
)
def test_what_holds_no_vit_and_would_have_been_taken_is_said(better, taken, theirs, expected):
    sentence = (
        f"^took {taken} of the source, for {better} holds no ViT known: give load_vit the state dict that you mean"
    )
    with pytest.warns(UserWarning, match=sentence):
        assert_same(load_vit({better: {"fc.weight": torch.ones(2)}, taken: theirs.state_dict()}, **TOLD), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_vit({better: None, taken: theirs.state_dict()}, **TOLD)


def test_a_mapping_in_itself_is_read_once(theirs, expected):
    cyclic = dict(theirs.state_dict())
    cyclic["self"] = {"again": cyclic}
    assert_same(load_vit(cyclic, **TOLD), expected)
    nothing = {}
    nothing["self"] = nothing
    with pytest.raises(ValueError, match="the source must hold the state dict of a ViT, and there is none"):
        load_vit(nothing)


def test_arrays_are_not_tensors(theirs):
    arrays = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    for source, where in ((arrays, ""), ({"params": arrays}, " under params")):
        with pytest.raises(ValueError, match=f"^the values{where} are ndarrays, not tensors: .*with torch.from_numpy$"):
            load_vit(source)


@pytest.mark.parametrize(
    "keys",
    [
        *[("ema", "net"), ("ema", "model"), ("ema", "state_dict"), ("student", "model"), ("backbone", "encoder")],
        *[("state_dict", "optimizer"), ("state_dict_ema", "ema", "model"), ("generator", "discriminator")],
    ],
    ids=",".join,
)
def test_what_no_convention_chooses_from_is_a_question(keys, theirs, expected):
    content = {key: theirs.state_dict() for key in keys} | {"epoch": 1}
    names = ", ".join(sorted(keys))
    with pytest.raises(
        ValueError, match=f"^the source holds several state dicts, under {names}: give load_vit the one"
    ):
        load_vit(content, **TOLD)
    assert_same(load_vit(content[keys[0]], **TOLD), expected)


def test_several_within_one_key_and_beside_it(theirs):
    weights = theirs.state_dict()
    for content, names in (
        ({"state_dict": {"a": weights, "b": weights}}, r"state_dict\.a, state_dict\.b"),
        ({**weights, "ema": weights}, "the top, ema"),
        ({"state_dict": weights, "callbacks": {"EMA": {"weights": weights}}}, r"callbacks\.EMA\.weights, state_dict"),
    ):
        with pytest.raises(ValueError, match=f"several state dicts, under {names}: "):
            load_vit(content, **TOLD)


@pytest.mark.parametrize("pair", [("base_encoder.", "momentum_encoder."), ("online.", "target."), ("student.", "ema.")])
@pytest.mark.parametrize("other", ["timm", "transformers"])
def test_several_models_in_one_state_dict_are_a_question(pair, other, theirs):
    second = theirs if other == "timm" else hugging_face("Dinov2")
    weights = {f"module.{pair[0]}{name}": x for name, x in theirs.state_dict().items()}
    weights |= {f"module.{pair[1]}{name}": x for name, x in second.state_dict().items()}
    names = re.escape(", ".join(map(repr, sorted(pair))))
    with pytest.raises(ValueError, match=f"the weights are of several models, {names}: give those of one"):
        load_vit({"state_dict": weights}, **TOLD)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "the source must hold a state dict, tensors by name, not a NoneType"),
        (torch.ones(2), "the source must hold a state dict, tensors by name, not a Tensor"),
        ([{"a": 1}], "the source must hold a state dict, tensors by name, not a list"),
        ({}, "the source must hold the state dict of a ViT, and is empty"),
        (
            {"model": {"fc.weight": torch.ones(2)}, "epoch": 1},
            "must hold the state dict of a ViT, .* keys 'model', 'epoch'",
        ),
        ({"model": [1], 3: "x"}, "must hold the state dict of a ViT, and there is none under its keys 'model', 3"),
        (
            {"layer1.0.weight": torch.ones(2)},
            r"the weights, layer1\.0\.weight, are of no model known of transformers, dinov3",
        ),
    ],
)
def test_what_holds_no_vit_is_refused(content, message):
    with pytest.raises(ValueError, match=message):
        load_vit(content)


def test_quantised_weights_are_refused(theirs):
    weights = theirs.state_dict()
    weights["blocks.0.mlp.fc1.weight"] = weights["blocks.0.mlp.fc1.weight"].to(torch.int8)
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.fc1\.weight must be of a floating dtype, not torch\.int8"):
        load_vit(weights, **TOLD)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.to("meta"), "is on the meta device, and has no numbers"),
        (lambda x: x.to_sparse(), r"must be dense, not of the layout torch\.sparse_coo"),
        (
            lambda x: x.to(torch.float8_e4m3fn),
            r"is of torch\.float8_e4m3fn, which needs a scale: give .* fp32, fp16 or",
        ),
    ],
)
def test_tensors_without_numbers_of_their_own_are_refused(change, message, theirs):
    weights = theirs.state_dict()
    weights["blocks.0.mlp.fc1.weight"] = change(weights["blocks.0.mlp.fc1.weight"])
    with pytest.raises(ValueError, match=rf"^blocks\.0\.mlp\.fc1\.weight {message}"):
        load_vit(weights, **TOLD)


def test_on_the_meta_device_nothing_is_copied(theirs, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = load_vit(theirs.state_dict(), **TOLD, device="meta")
    assert ours.config == expected.config
    assert all(parameter.is_meta for parameter in ours.parameters())
