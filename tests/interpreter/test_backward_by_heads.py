"""The backward of sm_90 at the lengths of most ViTs, where one program computes all gradients of a head."""

from __future__ import annotations

import pytest
import torch
from harness import call, check, guarded_like, packed_bounds, random_rope, run
from torch import Tensor

from vitreg_kernels.measure.cases.attention import GRADIENTS
from vitreg_kernels.ops.attention.backends import triton as backend
from vitreg_kernels.ops.attention.backends.triton import plan
from vitreg_kernels.ops.attention.backends.triton import tiles as tuning
from vitreg_kernels.ops.attention.backends.triton.tiles import Tiles
from vitreg_kernels.ops.attention.types import AttentionInputs, Rope

ARCH = 90
F16 = torch.float16


@pytest.fixture(autouse=True)
def _few_heads_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(tuning, "_FEW_HEADS", 0)


def by_heads(tokens: int, prefix: int = 0, head_dim: int = 64, **changes: object) -> AttentionInputs:
    inputs = call(tokens, prefix, head_dim, F16, **changes)
    assert plan.backward_by_heads(inputs, ARCH)
    return inputs


def packed(lengths: tuple[int, ...], prefix: int, **changes: object) -> AttentionInputs:
    return by_heads(sum(lengths), prefix, cu_seqlens=packed_bounds(lengths), max_seqlen=max(lengths), **changes)


def gradients(inputs: AttentionInputs, grad_output: Tensor) -> dict[str, Tensor]:
    results = run(inputs, grad_output, ARCH)
    return {name: results[name] for name in GRADIENTS}


# Around the tiles of 64 and of 16 on both axes; the lengths of ViTs.
@pytest.mark.parametrize(
    ("tokens", "prefix"),
    [
        (1, 0),
        (1, 1),
        (16, 0),
        (54, 5),
        (64, 1),
        (65, 17),
        (113, 1),
        (201, 5),
        (207, 0),
        (261, 5),
        (271, 17),
        (272, 1),
    ],
)
def test_length(tokens: int, prefix: int) -> None:
    check(by_heads(tokens, prefix), arch=ARCH)


def test_longer_heads_take_two_kernels() -> None:
    inputs = call(273, 5, 64, F16)
    assert not plan.backward_by_heads(inputs, ARCH)
    check(inputs, arch=ARCH)


@pytest.mark.parametrize("tokens", [1, 16, 54, 64, 96, 192, 256])
def test_the_bits_are_those_of_two_kernels(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At lengths at which both cut the swept axis alike."""
    inputs = by_heads(tokens, attn_mask=torch.rand(1, 1, 1, tokens) < 0.8)
    grad_output = guarded_like(torch.randn(inputs.query.shape).to(F16))
    one = gradients(inputs, grad_output)
    monkeypatch.setattr(tuning, "backward_by_heads", lambda *_: False)
    for name, gradient in gradients(inputs, grad_output).items():
        assert torch.equal(gradient, one[name]), name


@pytest.mark.parametrize("head_dim", [16, 24, 48])
def test_head_dim(head_dim: int) -> None:
    check(by_heads(69, 5, head_dim, batch=2, heads=2), arch=ARCH)


@pytest.mark.parametrize("scale", [1.0, -0.3, 0.0])
@pytest.mark.parametrize("tokens", [54, 69])
def test_scale(tokens: int, scale: float) -> None:
    check(by_heads(tokens, 5, scale=scale, attn_mask=torch.rand(1, 1, 1, tokens) < 0.5), arch=ARCH)


@pytest.mark.parametrize(("tokens", "prefix"), [(1, 0), (54, 5), (100, 17)])
def test_key_padding(tokens: int, prefix: int) -> None:
    mask = torch.rand(3, 1, 1, tokens) < 0.6
    mask[1] = False
    actual = check(by_heads(tokens, prefix, batch=3, attn_mask=mask), arch=ARCH)
    padded = ~mask[:, 0, 0]
    for name in ("grad_key", "grad_value"):
        assert (actual[name].transpose(1, 2)[padded] == 0).all(), f"{name} of a padded key"
    assert (actual["grad_query"][1] == 0).all()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("tokens", "prefix"), [(54, 5), (133, 17)])
def test_rope(tokens: int, prefix: int, interleaved: bool) -> None:
    rope = random_rope(tokens - prefix, 64, interleaved=interleaved)
    check(by_heads(tokens, prefix, rope=rope), arch=ARCH)


def test_rope_by_image() -> None:
    check(by_heads(70, 2, batch=2, rope=random_rope(2, 68, 64, interleaved=False)), arch=ARCH)


@pytest.mark.parametrize("shape", [(), (2, 2, 69, 1), (1, 2, 1, 24)])
def test_expanded_gradient(shape: tuple[int, ...]) -> None:
    grad_output = torch.randn(shape).to(F16).expand(2, 2, 69, 24)
    check(by_heads(69, 1, 24, batch=2, heads=2), grad_output=grad_output, arch=ARCH)


# Images of one tile and of all; as long as the longest, ending in each of its tiles and at their ends.
@pytest.mark.parametrize(
    ("lengths", "prefix"),
    [((261, 54, 5, 200), 5), ((130, 128, 64, 65), 0), ((1, 70, 1), 1), ((54, 17, 54), 17)],
)
def test_packing(lengths: tuple[int, ...], prefix: int) -> None:
    check(packed(lengths, prefix), arch=ARCH)


@pytest.mark.parametrize("interleaved", [False, True])
def test_packing_with_rope_and_a_loose_bound(interleaved: bool) -> None:
    rope: Rope = random_rope(80 + 21, 64, interleaved=interleaved)
    check(packed((85, 26), 5, rope=rope)._replace(max_seqlen=250), arch=ARCH)


@pytest.mark.parametrize("lengths", [(20, 0, 30), (70, 0, 133)])
def test_an_empty_image_in_a_pack(lengths: tuple[int, ...]) -> None:
    inputs = packed(lengths, 0)
    grad_output = guarded_like(torch.randn(inputs.query.shape).to(F16))
    full = gradients(inputs._replace(cu_seqlens=packed_bounds((lengths[0], lengths[2]))), grad_output)
    for name, gradient in gradients(inputs, grad_output).items():
        assert torch.equal(gradient, full[name]), name


@pytest.mark.parametrize(
    ("arch", "dtype", "head_dim", "tokens", "heads", "whole"),
    [
        (90, torch.bfloat16, 64, 201, 513, True),
        (90, torch.bfloat16, 64, 201, 512, False),
        (90, F16, 16, 272, 513, True),
        (90, F16, 64, 273, 4096, False),
        (90, F16, 65, 201, 4096, False),
        (90, torch.float32, 64, 54, 4096, False),
        (90, F16, 64, 64, 1, True),
        (90, F16, 64, 65, 1, False),
        (100, F16, 64, 64, 1, True),
        (100, F16, 64, 65, 4096, False),
        (80, F16, 64, 54, 4096, False),
        (120, F16, 64, 54, 4096, False),
    ],
)
def test_which_calls_go_by_heads(
    arch: int,
    dtype: torch.dtype,
    head_dim: int,
    tokens: int,
    heads: int,
    whole: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    assert tuning.backward_by_heads(arch, dtype, head_dim, tokens, heads) is whole


def test_heads_of_all_images_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    inputs = AttentionInputs(*torch.empty(3, 65, 8, 201, 64, dtype=F16, device="meta"))
    *_, only = backend.launches(inputs, ARCH)
    assert (only.grid, len(backend.launches(inputs, ARCH))) == ((520,), 2)
    assert (
        len(backend.launches(inputs._replace(query=inputs.query[1:], key=inputs.key[1:], value=inputs.value[1:]), ARCH))
        == 3
    )
    pack = AttentionInputs(*torch.empty(3, 1, 8, 6400, 64, dtype=F16, device="meta"), max_seqlen=201)
    bounds = torch.empty(66, dtype=torch.int32, device="meta")
    assert plan.backward_by_heads(pack._replace(cu_seqlens=bounds), ARCH)
    assert not plan.backward_by_heads(pack._replace(cu_seqlens=bounds[1:]), ARCH)


@pytest.mark.parametrize("tokens", range(1, 273, 30))
def test_other_tiles(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tuning may find others better; a program owns a head with all of them."""
    rule = tuning.attention_tiles
    tiles = Tiles(32, 32, 4, 2)
    monkeypatch.setattr(
        tuning, "attention_tiles", lambda name, *size: tiles if name == "backward" else rule(name, *size)
    )
    check(by_heads(tokens, head_dim=16), arch=ARCH)


@pytest.mark.parametrize("tiles", [Tiles(64, 128, 4, 1), Tiles(128, 64, 8, 1), Tiles(32, 32, 4, 2)])
@pytest.mark.parametrize("lengths", [(80, 3, 70), (130, 128, 54)])
def test_packs_with_other_tiles(lengths: tuple[int, ...], tiles: Tiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """A length below their width is held in narrower ones."""
    rule = tuning.attention_tiles
    monkeypatch.setattr(
        tuning, "attention_tiles", lambda name, *size: tiles if name == "backward" else rule(name, *size)
    )
    check(packed(lengths, 1), arch=ARCH)
