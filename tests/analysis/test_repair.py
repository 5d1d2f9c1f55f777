"""A model with a test-time register beside its controls: the numbers, and that each control is what it is called."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from vit_cases import TINY, vit

from vitreg_kernels.analysis.outliers import Rule
from vitreg_kernels.analysis.planted import planted
from vitreg_kernels.analysis.registers import TestTimeRegisters as Register
from vitreg_kernels.analysis.registers import zeroed
from vitreg_kernels.analysis.repair import repairs

RULE = Rule.parse("3xmedian")
NEURONS = [(1, 3)]


@pytest.fixture(scope="module")
def images():
    return torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def before():
    return vit(replace(TINY, num_registers=2)).eval()


@pytest.fixture(scope="module")
def model(before, images):
    return planted(before, images, layer=1, neuron=3)


def tokens(model, images):
    """``[B, M, C]`` of the patches and ``[B, C]`` of the last register, behind the last block."""
    with torch.no_grad():
        (groups,) = model.intermediate_layers(images, 1, norm=False)
    return groups.patches, groups.registers[:, -1]


def test_the_numbers(model, images):
    found = repairs(model, [images[:4], images[4:]], NEURONS, rule=RULE)
    names = ["as it is", "empty token", "test-time register", "random neurons moved", "neurons zeroed, empty token"]
    assert [one.name for one in found] == names
    start, _ = tokens(model, images)
    normal = start.norm(dim=-1) <= 3 * start.norm(dim=-1).quantile(0.5)
    with Register(model, []):
        seen = {"as it is": (start, None), "empty token": tokens(model, images)}
        with zeroed(model, NEURONS):
            seen["neurons zeroed, empty token"] = tokens(model, images)
    with Register(model, NEURONS):
        seen["test-time register"] = tokens(model, images)
    for one in found:
        if one.name not in seen:
            continue
        patches, register = seen[one.name]
        norms = patches.norm(dim=-1)
        assert one.largest_ratio == pytest.approx((norms.max() / norms.quantile(0.5)).item(), rel=1e-5)
        assert one.outliers == pytest.approx((norms > 3 * norms.quantile(0.5)).double().mean().item())
        if register is None:
            assert (one.register_ratio, one.drift) == (None, None)
            continue
        ratio = (register.norm(dim=-1).mean() / norms.quantile(0.5)).item()
        assert one.register_ratio == pytest.approx(ratio, rel=1e-5)
        drift = ((patches - start).norm(dim=-1) / start.norm(dim=-1))[normal].quantile(0.5).item()
        assert one.drift == pytest.approx(drift, rel=1e-4)


def test_the_register_repairs_it_and_random_neurons_do_not(model, images):
    as_it_is, empty, register, random, without = repairs(model, [images], NEURONS, rule=RULE)
    assert as_it_is.largest_ratio > 20
    assert as_it_is.outliers > 0
    for one in (empty, random):
        assert one.largest_ratio == pytest.approx(as_it_is.largest_ratio, rel=0.1)
        assert one.register_ratio < 2
    for one in (register, without):
        assert one.largest_ratio < 3
        assert one.outliers == 0
    assert register.register_ratio > 5
    assert random != empty


def test_the_drift_from_the_model_without_what_was_planted(model, images):
    clean = planted(model, images, layer=1, neuron=3, gain=0.0)
    as_it_is, *_, without = repairs(model, [images], NEURONS, rule=RULE, reference=clean)
    assert as_it_is.drift > 0
    with Register(clean, []):
        patches, _ = tokens(clean, images)
    start, _ = tokens(clean, images)
    norms = tokens(model, images)[0].norm(dim=-1)
    drift = ((patches - start).norm(dim=-1) / start.norm(dim=-1))[norms <= RULE.threshold(norms.flatten())]
    assert without.drift == pytest.approx(drift.quantile(0.5).item(), rel=1e-4)


def test_random_neurons_are_others_and_the_same_every_time(model, images):
    first, again, other = (repairs(model, [images], NEURONS, rule=RULE, seed=seed)[3] for seed in (0, 0, 1))
    assert first == again != other
    everyone = [(1, i) for i in range(192) if i != 7]  # so that one is left
    with Register(model, [(1, 7)]):
        patches, _ = tokens(model, images)
    found = repairs(model, [images], everyone, rule=RULE)[3]
    norms = patches.norm(dim=-1)
    assert found.largest_ratio == pytest.approx((norms.max() / norms.quantile(0.5)).item())


def test_padding_has_no_say(model, images):
    """The numbers are those of the valid patches, however they are batched."""
    valid = torch.ones(6, 16, dtype=torch.bool)
    valid[:, 12:] = False
    found = repairs(model, [(images[:4], valid[:4]), (images[4:], valid[4:])], NEURONS, rule=RULE)[2]
    with Register(model, NEURONS):
        patches, register = tokens(model, images)
    start, _ = tokens(model, images)
    norms, before = patches.norm(dim=-1)[valid], start.norm(dim=-1)[valid]
    middle = norms.quantile(0.5)
    assert found.largest_ratio == pytest.approx((norms.max() / middle).item(), rel=1e-5)
    assert found.register_ratio == pytest.approx((register.norm(dim=-1).mean() / middle).item(), rel=1e-5)
    drift = ((patches - start).norm(dim=-1)[valid] / before)[before <= RULE.threshold(before)]
    assert found.drift == pytest.approx(drift.quantile(0.5).item(), rel=1e-4)


def test_a_rule_by_which_no_patch_is_normal(model, images):
    found = repairs(model, [images], NEURONS, rule=Rule.parse("0.001"))
    assert {(one.outliers, one.drift) for one in found} == {(1.0, None)}


def test_nothing_to_repair(model, images):
    with pytest.raises(ValueError, match="without register neurons there is nothing to repair"):
        repairs(model, [images], [], rule=RULE)
    with pytest.raises(ValueError, match="there is no batch of images"):
        repairs(model, [], NEURONS, rule=RULE)
