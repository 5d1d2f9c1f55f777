"""Position rows of any grid and any prefix are read right, or refused with the arguments that decide."""

from __future__ import annotations

import math
import re
import warnings
from itertools import product

import pytest
import torch

from vitreg_kernels import ViTConfig, load_vit
from vitreg_kernels.integrations.positions import read_rows

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:assumed what", "ignore:left out.*pooler")

from tests.integrations.models import assert_features, hugging_face, timm_dinov3, timm_vit  # noqa: E402

# One block of one head: the rows are what these tests are about.
SMALL = {"embed_dim": 64, "depth": 1, "num_heads": 1}
KINDS = ("patches", "cls", "prefix")
GRIDS = [(1, 1), (1, 4), (4, 1), (2, 3), (4, 4), (2, 8), (9, 16), (18, 32), (7, 7), (5, 20)]
COUNTS = [(tokens, registers) for tokens in (0, 1, 2) for registers in range(17)]


def prefixes(tokens, registers):
    return dict(zip(KINDS, (0, tokens, tokens + registers), strict=True))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_grid_that_is_given_leaves_one_reading(grid):
    for (tokens, registers), kind in product(COUNTS, KINDS):
        rows = prefixes(tokens, registers)
        reading = read_rows(math.prod(grid) + rows[kind], rows, grid=grid)
        assert (rows[reading.position_rows], reading.grid, reading.assumed) == (rows[kind], grid, False)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_without_one_there_is_one_square_or_a_question(grid):
    for (tokens, registers), kind in product(COUNTS, KINDS):
        rows = prefixes(tokens, registers)
        count = math.prod(grid) + rows[kind]
        squares = {(prefix, side) for prefix in rows.values() for side in range(1, 40) if side * side + prefix == count}
        if len(squares) == 1:
            ((prefix, side),) = squares
            reading = read_rows(count, rows)
            assert (rows[reading.position_rows], reading.grid, reading.assumed) == (prefix, (side, side), True)
        else:
            with pytest.raises(ValueError, match="give grid"):
                read_rows(count, rows)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_images_that_are_wanted_may_be_those_of_the_rows(grid):
    """Alone they decide; beside a square they do not."""
    for (tokens, registers), kind in product(COUNTS, KINDS):
        rows = prefixes(tokens, registers)
        count = math.prod(grid) + rows[kind]
        readings = {(prefix, grid) for prefix in rows.values() if math.prod(grid) + prefix == count}
        readings |= {(p, (s, s)) for p in rows.values() for s in range(1, 40) if s * s + p == count}
        if len(readings) == 1:
            reading = read_rows(count, rows, image_grid=grid)
            assert (rows[reading.position_rows], reading.grid, reading.assumed) == (rows[kind], grid, False)
        else:
            with pytest.raises(ValueError, match="give grid"):
                read_rows(count, rows, image_grid=grid)


@pytest.mark.parametrize(
    ("size", "patch", "options"),
    [
        ((288, 512), 16, {}),
        ((36, 64), 4, {"reg_tokens": 4}),
        ((36, 64), 4, {"no_embed_class": True}),
        ((8, 32), 8, {"reg_tokens": 1, "no_embed_class": True}),
        ((64, 16), 8, {"reg_tokens": 7}),
        ((12, 20), 4, {"reg_tokens": 3}),
        ((16, 16), 8, {"reg_tokens": 2}),
        ((4, 40), 4, {}),
    ],
    ids=str,
)
def test_the_features_are_timms_on_any_grid(size, patch, options):
    theirs = timm_vit(img_size=size, patch_size=patch, **SMALL, **options)
    grid = (size[0] // patch, size[1] // patch)
    ours = load_vit(theirs.state_dict(), grid=grid, num_heads=1)
    assert ours.config.grid == grid
    assert ours.config.image_size == (size if size[0] != size[1] else size[0])
    assert_features(ours, theirs, sides=[size, (5 * patch, 3 * patch)])
    with pytest.raises(ValueError, match=r"the \d+ position rows are no grid of 40 x 1 patches with 0 or "):
        load_vit(theirs.state_dict(), grid=(40, 1), num_heads=1)


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_every_grid_of_16_to_9_is_a_perfect_square(factor):
    theirs = timm_vit(img_size=(9 * factor * 4, 16 * factor * 4), patch_size=4, **SMALL)
    side, size, grid = 12 * factor, theirs.patch_embed.img_size, theirs.patch_embed.grid_size
    with pytest.warns(UserWarning, match=rf"assumed what the weights do not tell: .*grid=\({side}, {side}\)"):
        load_vit(theirs.state_dict())
    message = rf"those of {side} x {side} \(.*\) or of {grid[0]} x {grid[1]} \(.*\) patches, .* which: give grid$"
    with pytest.raises(ValueError, match=message):
        load_vit(theirs.state_dict(), image_size=size)
    assert_features(load_vit(theirs.state_dict(), image_size=size, grid=grid), theirs, sides=[size])


@pytest.mark.parametrize("side", range(1, 9))
def test_registers_with_rows_that_make_a_larger_square_are_a_question(side):
    """side^2 + 1 + 2 side = (side + 1)^2, and timm gives registers rows unless told otherwise."""
    theirs = timm_vit(img_size=4 * side, patch_size=4, reg_tokens=2 * side, **SMALL)
    weights, more = theirs.state_dict(), side + 1
    message = re.escape(
        f"may be those of {more} x {more} (position_rows='patches') or of {side} x {side} (position_rows='prefix') "
        "patches, and no weight tells which: give grid or position_rows"
    )
    for changes in ({}, {"image_size": 4 * side}, {"image_size": 4 * side + 4}, {"image_size": 80}):
        with pytest.raises(ValueError, match=message):
            load_vit(weights, **changes)
    for choice in ({"grid": (side, side)}, {"position_rows": "prefix"}):
        assert_features(load_vit(weights, **choice), theirs, sides=[(4 * side, 4 * side), (12, 20)])
    larger = timm_vit(img_size=4 * more, patch_size=4, reg_tokens=2 * side, no_embed_class=True, **SMALL)
    assert_features(load_vit(larger.state_dict(), position_rows="patches"), larger, sides=[(4 * more, 4 * more)])


def test_a_size_without_a_square_tells_the_grid():
    theirs = timm_vit(img_size=(32, 48), reg_tokens=2, **SMALL)
    with pytest.raises(ValueError, match=r"the 9 position rows may be|the 9 position rows are no square"):
        load_vit(theirs.state_dict(), position_rows="prefix")
    ours = load_vit(theirs.state_dict(), image_size=(32, 48), position_rows="prefix")
    assert_features(ours, theirs, sides=[(32, 48), (64, 64)])
    with pytest.raises(ValueError, match=r"the 9 position rows are no square grid of patches with 3 rows of prefix"):
        load_vit(theirs.state_dict(), image_size=64, position_rows="prefix")


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 3}, {"reg_tokens": 3, "no_embed_class": True}], ids=str)
@pytest.mark.parametrize(("size", "wanted"), [((32, 96), (80, 48)), ((64, 64), (32, 96)), ((32, 96), (96, 32))])
def test_resampled_once_as_timm_does(size, wanted, options):
    theirs = timm_vit(img_size=size, **SMALL, **options)
    grid = theirs.patch_embed.grid_size
    ours = load_vit(theirs.state_dict(), grid=grid, image_size=wanted)
    assert (ours.config.image_size, ours.pos_embed.shape[1]) == (wanted, ours.config.num_position_rows)
    theirs.set_input_size(img_size=wanted)
    assert_features(ours, theirs, sides=[wanted])


def test_registers_added_to_a_grid_that_is_not_square():
    theirs = timm_vit(img_size=(32, 96), **SMALL)
    ours = load_vit(theirs.state_dict(), grid=(2, 6), num_registers=4, image_size=(48, 48))
    assert (ours.config.num_registers, ours.config.grid) == (4, (3, 3))
    with pytest.raises(ValueError, match=r"position_rows='prefix' would be of num_registers=4 new registers too"):
        load_vit(theirs.state_dict(), grid=(2, 6), num_registers=4, position_rows="prefix")


@torch.no_grad()
def test_transformers_vit_adds_its_rows_as_they_are():
    theirs = hugging_face("ViT", image_size=[32, 96])
    ours, images = load_vit(theirs.state_dict(), grid=(2, 6), num_heads=2).eval(), torch.randn(2, 3, 32, 96)
    torch.testing.assert_close(ours.forward_features(images), theirs(pixel_values=images).last_hidden_state)


@torch.no_grad()
def test_transformers_dinov2_takes_any_rows_for_a_square():
    """Its code looks at their number alone: 4 x 9 rows are 6 x 6, also on images of 4 x 9 patches."""
    theirs = hugging_face("Dinov2", image_size=[64, 144])
    ours = load_vit(theirs.state_dict(), num_heads=2)
    assert ours.config.grid == (6, 6)
    assert_features(ours, theirs, sides=[(64, 144), (96, 96)])
    with pytest.raises(ValueError, match="the 33 position rows are no square grid of patches with 1 rows of prefix"):
        load_vit(hugging_face("Dinov2", image_size=[64, 128]).state_dict())


@pytest.mark.parametrize("grid", [(4,), [4, 4], (4, 0), (4.0, 4), 4, (True, 16), (16, True)])
def test_a_grid_is_two_positive_ints(grid):
    with pytest.raises(ValueError, match="grid must be a tuple of two positive ints, rows and columns of patches, not"):
        load_vit(timm_vit().state_dict(), grid=grid)


def test_rope_has_no_grid():
    with pytest.raises(
        ValueError, match=r"grid=\(4, 4\) is of position rows, of which the weights, with rope, have none"
    ):
        load_vit(timm_dinov3(qkv_bias=False).state_dict(), grid=(4, 4))


TAKEN = {
    **{"num_heads": 4, "eps": 1e-3, "antialias": False, "interpolate_offset": 0.1, "position_rows": "cls"},
    **{"drop_path": 0.3, "attn_drop": 0.2, "proj_drop": 0.1, "rope_base": 10.0, "layer_scale": 0.5},
    **{"num_registers": 3, "image_size": 96},
}
TOLD = {
    **{"patch_size": 16, "in_channels": 3, "dim": 128, "depth": 2, "num_cls_tokens": 1, "mlp": "gelu"},
    **{"hidden_dim": 512, "qkv_bias": True, "proj_bias": True, "qk_norm": False, "position": "absolute"},
}
OTHERS = {
    **{"patch_size": 8, "in_channels": 1, "dim": 64, "depth": 3, "num_cls_tokens": 2, "mlp": "swiglu"},
    **{"hidden_dim": 256, "qkv_bias": False, "proj_bias": False, "qk_norm": True, "position": "rope"},
    "layer_scale": None,
}


def test_every_field_is_taken_or_must_agree():
    assert {*TAKEN, *TOLD} == set(ViTConfig.__dataclass_fields__)
    weights = timm_vit(init_values=1.0).state_dict()
    changed = load_vit(weights, **TAKEN, **TOLD).config
    assert {name: getattr(changed, name) for name in {**TAKEN, **TOLD}} == {**TAKEN, **TOLD}
    plain = load_vit(weights, grid=(4, 4), **TOLD).config
    for name, value in TAKEN.items():
        config = load_vit(weights, grid=(4, 4), **{name: value}).config
        assert {n for n in ViTConfig.__dataclass_fields__ if getattr(config, n) != getattr(plain, n)} <= {name}
        assert getattr(config, name) == value
    for name, value in OTHERS.items():
        with pytest.raises(ValueError, match=rf"^{name}={value!r} disagrees with the weights, which have {name}="):
            load_vit(weights, **{name: value})
    assert load_vit(weights, hidden_dim=None).config.hidden_dim is None  # 4 * dim, as these have it
    with pytest.raises(ValueError, match=r"layer_scale=0\.1 disagrees with the weights, which have layer_scale=None"):
        load_vit(timm_vit().state_dict(), layer_scale=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "dim=128 must be a multiple of num_heads=3"),
        ({"num_heads": None}, "num_heads must be a positive int, not None"),
        ({"position_rows": "all"}, "position_rows must be one of 'patches', 'cls', 'prefix', not 'all'"),
        ({"position_rows": "patches"}, "the 17 position rows are no square grid of patches with 0 rows of prefix"),
        ({"image_size": [64, 64]}, "image_size must be a positive int, or a tuple of two, height and width, not"),
        ({"image_size": (64, 72)}, r"image_size=\(64, 72\) must be a multiple of patch_size=16"),
        ({"num_registers": -1}, "num_registers must be a positive int, not -1"),
        ({"drop_path": 2.0}, "drop_path must be at least 0 and below 1, not 2.0"),
        ({"eps": "1e-6"}, "eps must be a positive finite number, not '1e-6'"),
        ({"antialias": "no"}, "antialias must be True or False, not 'no'"),
    ],
)
def test_bad_values_are_one_sentence(changes, message):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is said of a model that there will not be
        with pytest.raises(ValueError, match=message):
            load_vit(timm_vit().state_dict(), **changes)


def test_what_is_no_field_is_named():
    with pytest.raises(
        TypeError, match=r"^heads, img_size is no field of ViTConfig, which has image_size, patch_size, "
    ):
        load_vit(timm_vit().state_dict(), heads=2, img_size=32)
