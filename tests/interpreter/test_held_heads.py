"""The forward of sm_90 at the lengths of most ViTs, where one program holds all keys and values of a head."""

from __future__ import annotations

import pytest
import torch
from harness import call, check, guarded_like, packed_bounds, random_rope, run

from vitreg_kernels.measure.cases.attention import MASSIVE_QUERY_AND_KEY
from vitreg_kernels.ops.attention.backends import triton as backend
from vitreg_kernels.ops.attention.backends.triton import tiles as tuning
from vitreg_kernels.ops.attention.backends.triton.plan import ForwardBuffers, launch_plan
from vitreg_kernels.ops.attention.backends.triton.tiles import Tiles, attention_tiles
from vitreg_kernels.ops.attention.types import OUTPUT_NAMES, AttentionInputs

ARCH = 90
F16 = torch.float16


@pytest.fixture(autouse=True)
def _few_heads_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(tuning, "_FEW_HEADS", 0)


def held(tokens: int, prefix: int = 0, head_dim: int = 64, **changes: object) -> AttentionInputs:
    """A call whose heads are held."""
    inputs = call(tokens, prefix, head_dim, F16, **changes)
    assert launch_plan(inputs, "forward", ARCH).resident_widths
    return inputs


def packed(lengths: tuple[int, ...], prefix: int, **changes: object) -> AttentionInputs:
    return held(sum(lengths), prefix, cu_seqlens=packed_bounds(lengths), max_seqlen=max(lengths), **changes)


def test_tiles_cover_all_keys() -> None:
    for tokens in range(1, 273):
        inputs = AttentionInputs(*torch.empty(3, 1, 1, tokens, 64, dtype=F16, device="meta"))
        tiles = launch_plan(inputs, "forward", ARCH).resident_widths
        assert sum(tiles[:-1]) < tokens <= sum(tiles)
        assert sum(tiles) - tokens < 48


# Around the tiles of 16, 64 and 128 keys; few queries left over (1 to 16), none, and more; prefixes that are the few, a
# part of them, more than them, and more than 16.
@pytest.mark.parametrize(
    ("tokens", "prefix"),
    [
        (1, 0),
        (1, 1),
        (16, 0),
        (17, 17),
        (53, 5),
        (54, 5),
        (64, 1),
        (65, 1),
        (69, 20),
        (80, 0),
        (81, 5),
        (129, 5),
        (201, 5),
        (201, 17),
        (207, 1),
        (256, 0),
        (256, 16),
        (261, 5),
        (271, 17),
        (272, 1),
    ],
)
def test_length(tokens: int, prefix: int) -> None:
    check(held(tokens, prefix), arch=ARCH)


def test_longer_heads_are_swept() -> None:
    inputs = call(273, 17, 64, F16)
    assert not launch_plan(inputs, "forward", ARCH).resident_widths
    check(inputs, arch=ARCH)


def test_few_heads_are_swept(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a program for each tile: a program a head would leave most of a GPU idle. One tile is held all the same."""
    monkeypatch.undo()
    many, few = (AttentionInputs(*torch.empty(3, images, 8, 201, 64, dtype=F16, device="meta")) for images in (65, 64))
    assert (launch_plan(many, "forward", ARCH).grid, launch_plan(few, "forward", ARCH).grid) == ((520,), (512 * 4,))
    inputs = call(201, 5, 64, F16)
    assert not launch_plan(inputs, "forward", ARCH).resident_widths
    check(inputs, arch=ARCH)
    check(held(64, 5), arch=ARCH)


@pytest.mark.parametrize("arch", [80, 100])
def test_a_head_in_one_tile_is_held_everywhere(arch: int) -> None:
    assert attention_tiles("forward", arch, F16, 64, 64).whole_head
    assert not attention_tiles("forward", arch, F16, 64, 65).whole_head
    check(held(64, 17), arch=arch)


@pytest.mark.parametrize("tiles", [Tiles(128, 64, 8, 1, whole_head=True), Tiles(32, 32, 4, 2, whole_head=True)])
@pytest.mark.parametrize(("tokens", "prefix"), [(54, 5), (69, 5), (137, 20), (201, 5)])
def test_other_tiles(tokens: int, prefix: int, tiles: Tiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tuning may find others better."""
    rule = tuning.attention_tiles
    monkeypatch.setattr(
        tuning, "attention_tiles", lambda name, *size: tiles if name == "forward" else rule(name, *size)
    )
    check(held(tokens, prefix), arch=ARCH)


@pytest.mark.parametrize("head_dim", [16, 24, 48])
def test_head_dim(head_dim: int) -> None:
    check(held(69, 5, head_dim, batch=2, heads=2), arch=ARCH)


@pytest.mark.parametrize("tokens", [54, 69])
@pytest.mark.parametrize("scale", [1.0, -0.3, 0.0])
def test_scale(scale: float, tokens: int) -> None:
    check(held(tokens, 5, scale=scale, attn_mask=torch.rand(1, 1, 1, tokens) < 0.5), arch=ARCH)


@pytest.mark.parametrize(("tokens", "prefix"), [(54, 5), (69, 5), (100, 17)])
def test_key_padding(tokens: int, prefix: int) -> None:
    mask = torch.rand(3, 1, 1, tokens) < 0.6
    mask[1] = False
    actual = check(held(tokens, prefix, batch=3, attn_mask=mask), arch=ARCH)
    assert (actual["output"][1] == 0).all()
    assert (actual["lse"][1] == -torch.inf).all()
    assert (actual["max_logit"][1] == -torch.inf).all()
    assert (actual["prefix_attention"][1] == 0).all()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("tokens", [54, 133])
def test_rope(tokens: int, interleaved: bool) -> None:
    check(held(tokens, 5, rope=random_rope(tokens - 5, 64, interleaved=interleaved)), arch=ARCH)


# Images of one tile and of more; as long as the longest, ending in each of its tiles and at their ends.
@pytest.mark.parametrize(
    ("lengths", "prefix"),
    [((261, 54, 5, 200), 5), ((130, 128, 64, 65), 0), ((1, 70, 1), 1), ((64, 17), 17), ((100, 36), 20)],
)
def test_packing(lengths: tuple[int, ...], prefix: int) -> None:
    check(packed(lengths, prefix), arch=ARCH)


def test_packing_with_rope_and_a_loose_bound() -> None:
    rope = random_rope(80 + 21, 64, interleaved=False)
    check(packed((85, 26), 5, rope=rope)._replace(max_seqlen=250), arch=ARCH)


@pytest.mark.parametrize("lengths", [(20, 0, 30), (70, 0, 133)])
def test_an_empty_image_in_a_pack(lengths: tuple[int, ...]) -> None:
    inputs = packed(lengths, 0)
    grad_output = guarded_like(torch.randn(inputs.query.shape).to(F16))
    actual = run(inputs, grad_output, ARCH)
    full = run(inputs._replace(cu_seqlens=packed_bounds((lengths[0], lengths[2]))), grad_output, ARCH)
    assert (actual.pop("max_logit")[1] == -torch.inf).all()
    full.pop("max_logit")
    for name, result in actual.items():
        assert torch.equal(result, full[name]), name


@pytest.mark.parametrize("massive", ["query", "key", "value", "query and key"])
@pytest.mark.parametrize("token", [2, 30])
def test_massive_activations(massive: str, token: int) -> None:
    """One token of norm 500 among tokens of norm 20, among the few or not."""
    inputs = held(69, 5, heads=4)
    for name in ("query", "key", "value"):
        x = getattr(inputs, name)
        x.copy_(x.float() / x.float().norm(dim=-1, keepdim=True) * 20)
        if name == massive:
            x[:, :, token] *= 25
    if massive == "query and key":
        inputs.query[:, :, token], inputs.key[:, :, token] = MASSIVE_QUERY_AND_KEY
    check(inputs, arch=ARCH)


@pytest.mark.parametrize("offset", [300.0, -300.0])
def test_large_logits(offset: float) -> None:
    inputs = held(69, 5)
    inputs.query[..., 0] = offset
    inputs.key[..., 0] = 8.0
    check(inputs._replace(scale=1.0), arch=ARCH)


@pytest.mark.parametrize("token", [2, 30])
def test_a_nan_query_shows_and_stays_where_it_is(token: int) -> None:
    """Among the few, which the prefix is a part of, and among the others."""
    inputs = held(69, 5, heads=2)._replace(outputs=OUTPUT_NAMES)

    def forward() -> ForwardBuffers:
        buffers = backend._allocate(inputs, ARCH)
        for launch in backend._forward_launches(inputs, buffers, ARCH):
            launch.run()
        return buffers

    clean = forward()
    inputs.query[0, 0, token, 0] = torch.nan
    actual = forward()
    for name in ("output", "lse", "square_norm", "prefix_attention"):
        expected = getattr(clean, name).clone()
        if name != "prefix_attention" or token < 5:
            expected[0, 0, token] = torch.nan
        torch.testing.assert_close(getattr(actual, name), expected, rtol=0, atol=0, equal_nan=True, msg=name)
    assert actual.max_logit.amax(-1).isnan().tolist() == [[True, False]]
    assert actual.received_attention.isnan().all(-1).tolist() == [[True, False]]


def test_image_does_not_depend_on_its_batch() -> None:
    inputs = held(69, 5, batch=2, heads=2)
    grad_output = torch.randn(inputs.query.shape).to(F16)
    together = check(inputs, grad_output=grad_output, arch=ARCH)
    second = {"query": inputs.query[1:2], "key": inputs.key[1:2], "value": inputs.value[1:2]}
    alone = check(inputs._replace(**second), grad_output=grad_output[1:2], arch=ARCH)
    for name, result in alone.items():
        assert torch.equal(result[0], together[name][1]), name


@pytest.mark.parametrize("kernel", ["grad_query", "grad_key_value", "statistics"])
def test_kernels_that_own_a_tile_never_own_a_head(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a table of tiles says: they would leave out all tiles but the first."""
    rule = tuning.attention_tiles
    tiles = Tiles(64, 64, 4, 2, whole_head=True)
    monkeypatch.setattr(tuning, "attention_tiles", lambda name, *size: tiles if name == kernel else rule(name, *size))
    check(held(137, 5), arch=ARCH)
