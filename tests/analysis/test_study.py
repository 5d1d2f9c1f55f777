"""What the parts of a survey say together: numbers that are known, since the parts are made by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.vit_cases import lively
from vitreg_kernels import RegisterViT, TokenLayout, ViTConfig
from vitreg_kernels.analysis.findings import Report, from_json, to_json
from vitreg_kernels.analysis.images import ImageFolder
from vitreg_kernels.analysis.lost import LostOptions
from vitreg_kernels.analysis.options import Options
from vitreg_kernels.analysis.record import record
from vitreg_kernels.analysis.study import Study
from vitreg_kernels.analysis.survey import Part, Survey, placements_of, read, write

LAYOUT = TokenLayout(num_registers=1)  # two tokens before the patches
OPTIONS = Options(models=("by hand",))
LAYERS = 4


def part(first: int, count: int, grid: tuple[int, int], large: dict[tuple[int, int, int], float]) -> Part:
    """Norms of 1 for patches, 5 for CLS, 9 for the register; ``large`` gives others by layer, image and patch.

    Each image is 100 x 50 pixels on disk, of which the model sees the right half as 40 x 40. CLS gives a fifth of its
    attention to the prefix in the images of the first part and two fifths in those of others, the rest to all patches
    alike; cosines are 0.5.
    """
    patches = grid[0] * grid[1]
    norms = np.ones((LAYERS, count, 2 + patches), np.float32)
    norms[:, :, 0], norms[:, :, 1] = 5, 9
    for (layer, image, patch), norm in large.items():
        norms[layer, image, 2 + patch] = norm
    on_prefix = 0.4 if first else 0.2
    attention = np.full((count, 2, 2 + patches), (1 - on_prefix) / patches, np.float32)
    attention[:, :, :2] = on_prefix / 2
    boxes = np.full((1, count, 4), -1)
    boxes[0, 0] = (50, 0, 100, 50)
    shown = np.full((1, count, 4), -1)
    shown[0, 0] = (0, 0, 40, 40)
    pictures = {
        "photo": np.zeros((40, 40, 3), np.uint8),
        "tokens": np.random.default_rng(first).normal(size=(*grid, 8)).astype(np.float32),
    }
    return Part(
        paths=[f"{first + i}.png" for i in range(count)],
        norms=norms,
        valid=np.ones((count, patches), bool),
        finite=np.isfinite(norms).all((0, 2)),
        cosine=np.full((count, patches), 0.5, np.float32),
        cls_cosine=np.full((count, patches), 0.25, np.float32),
        sinks=np.zeros((2, LAYERS, count, 2 + patches), np.uint8),
        heads=np.full(LAYERS, 3),
        attention=attention,
        boxes=boxes,
        shown_boxes=shown,
        positive_share=np.full((1, count), 0.25 if first else 0.75),
        placements=np.array(count * [(50, 0, 100, 50, 40, 40)]),
        grid=np.array(grid),
        pictures={f"{first}/{name}": each for name, each in pictures.items()},
    )


@pytest.fixture
def study() -> Study:
    """Three images of 4 x 4 patches and one of 4 x 6: one patch is large from layer 2 on, in image 1, another in 3."""
    place = {(layer, 1, 7): 50.0 for layer in (2, 3)}
    parts = [
        part(0, 3, (4, 4), {(1, 0, 0): 3.5} | place),
        part(3, 1, (4, 6), {(layer, 0, 23): 60.0 for layer in (2, 3)}),
    ]
    return Study.of(parts, LAYOUT, OPTIONS)


def test_norms_by_layer_and_kind(study):
    findings = study.findings(OPTIONS, name="x", title="x", planted=False, facts={})
    rows = {(row.layer, row.tokens): row for row in findings.norms}
    assert len(rows) == LAYERS * 3
    assert [rows[layer, "patches"].outliers for layer in range(LAYERS)] == [0.0, 1 / 72, 2 / 72, 2 / 72]
    assert [rows[layer, "patches"].largest for layer in range(LAYERS)] == [1.0, 3.5, 60.0, 60.0]
    assert {rows[layer, "patches"].threshold for layer in range(LAYERS)} == {3.0}
    assert {(rows[layer, "cls"].median, rows[layer, "register 0"].largest) for layer in range(LAYERS)} == {(5.0, 9.0)}
    assert (rows[0, "patches"].count, rows[0, "cls"].count, rows[0, "cls"].outliers) == (72, 4, None)


def test_what_the_verdict_is_about(study):
    findings = study.findings(OPTIONS, name="x", title="x", planted=False, facts={})
    assert (findings.word, findings.first_layer, findings.layer) == ("artifacts", 2, 3)
    assert (findings.images, findings.images_with_outliers, findings.grid) == (4, 2, (4, 4))
    assert findings.prefix == ["cls", "register 0"]


def test_outliers_that_end_before_the_last_block_are_looked_at_where_they_are():
    large = {(layer, 0, 3): 50.0 for layer in (1, 2)} | {(1, 0, 4): 50.0}
    assert Study.of([part(0, 2, (4, 4), large)], LAYOUT, OPTIONS).layer == 1
    assert Study.of([part(0, 2, (4, 4), {})], LAYOUT, OPTIONS).layer == 3


def test_every_patch_is_in_the_histogram(study):
    histogram = study.histogram(3.0)
    assert {kind: sum(counts) for kind, counts in histogram.counts.items()} == {
        "patches": 72,
        "cls": 4,
        "register 0": 4,
    }
    above = sum(n for n, edge in zip(histogram.counts["patches"], histogram.edges, strict=False) if edge > 3.0)
    assert above == 2


def test_masks_are_put_back_where_their_patches_are(study):
    for layer, places in ((0, set()), (1, {(0, 0)}), (3, {(1, 7), (3, 23)})):
        found, first = set(), 0
        for mask in study.outlier_maps(layer):
            found |= {(first + image, patch) for image, patch in mask.nonzero().tolist()}
            first += len(mask)
        assert found == places
    for patches in ([], [5, 6]):  # padding before a patch moves it in the pack, not in the map
        one = part(0, 2, (4, 4), {(layer, 1, 7): 50.0 for layer in (2, 3)})
        one.valid[:, patches] = False
        (mask,) = Study.of([one], LAYOUT, OPTIONS).outlier_maps()
        assert mask.nonzero().tolist() == [[1, 7]]


def test_where_outliers_are(study):
    frequency = study.findings(OPTIONS, name="x", title="x", planted=False, facts={}).frequency
    assert frequency[1][3] == pytest.approx(1 / 4)  # patch 7 of 4 columns
    assert frequency[3][3] == pytest.approx(1 / 4)  # patch 23 of 6 columns, the last corner
    assert sum(map(sum, frequency)) == pytest.approx(2 / 4)


def test_similarity_is_of_the_kinds_of_patches(study):
    study.parts[0].cosine[1, 7] = study.parts[1].cosine[0, 23] = 0.9
    similarity = study.similarity()
    assert similarity.counts == {"normal": 70, "outlier": 2}
    assert similarity.means == pytest.approx({"normal": 0.5, "outlier": 0.9})
    assert study.similarity("cls_cosine").means == pytest.approx({"normal": 0.25, "outlier": 0.25})
    without = part(0, 2, (4, 4), {})._replace(cls_cosine=np.empty((2, 0), np.float32))
    assert Study.of([without], LAYOUT, OPTIONS).similarity("cls_cosine") is None


def test_attention_is_averaged_over_images(study):
    cls, register = study.attention()
    assert (cls.layer, cls.tokens, register.tokens) == (3, "cls", "register 0")
    assert cls.on_prefix == pytest.approx((3 * 0.2 + 0.4) / 4)
    assert cls.on_outliers == pytest.approx((0.8 / 16 + 0.6 / 24) / 4)  # images 1 and 3 of 4
    assert cls.outliers == pytest.approx(2 / 72)


def test_sinks_by_kind(study):
    first, last = study.parts
    first.sinks[:, 2, :, 1] = 3  # the register, in all heads of three of four images
    first.sinks[1, 3, 1, 2 + 7] = 2  # an outlier, at most
    first.sinks[1, 3, 1, 2 + 8], last.sinks[:, 3, 0, 2 + 22] = 1, 1  # other patches
    last.sinks[1, 3, 0, 2 + 3 : 2 + 9] = 1  # as many as six may be, of three heads
    found = {(row.layer, row.tokens): (row.at_least, row.at_most) for row in study.sinks() if row.at_most}
    assert found == {
        (2, "register 0"): (9 / 4, 9 / 4),
        (3, "outlier"): (0, 2 / 4),
        (3, "normal"): (1 / 4, (1 + 3) / 4),
    }
    assert {row.heads for row in study.sinks()} == {3}
    assert len(study.sinks()) == LAYERS * 4
    assert {row.tokens for row in Study.of([part(0, 2, (4, 4), {})], LAYOUT, OPTIONS).sinks()} == {
        "cls",
        "register 0",
        "normal",
    }


def test_images_whose_norms_are_not_finite_have_no_say(study):
    """Nor does what they show keep the others from being shown."""
    before = study.attention()
    for wrong in (np.nan, np.inf):
        bad = part(4, 1, (4, 4), {(2, 0, 3): wrong})
        for name in ("attention", "cosine", "cls_cosine"):
            getattr(bad, name)[:] = np.nan
        bad.pictures["4/tokens"][0, 0] = np.nan
        bad.positive_share[:] = np.nan
        bad.sinks[:] = 3
        with_bad = Study.of([*study.parts, bad], LAYOUT, OPTIONS)
        findings = with_bad.findings(OPTIONS, name="x", title="x", planted=False, facts={})
        assert (findings.word, findings.images) == ("unclear", 5)
        assert [row.on_prefix for row in findings.attention] == [row.on_prefix for row in before]
        assert sum(findings.cls_similarity.counts.values()) == 72
        assert not any(row.at_most for row in findings.sinks)
        (row,) = with_bad.discovery([LostOptions.OFFICIAL], None)
        assert row.positive_share == pytest.approx((3 * 0.75 + 0.25) / 4)
        assert {name for name in with_bad.pictures(pca=True) if "pca" in name} == {"0/pca", "3/pca"}
        report = Report([findings], {}, {})
        assert from_json(to_json(report)) == report


def test_boxes_are_judged_on_disk_against_what_was_seen(study):
    truths = [[(50, 0, 100, 50)], [(60, 0, 70, 10)], None, [(0, 0, 30, 30)]]
    (row,) = study.discovery([LostOptions.OFFICIAL], truths)
    assert (row.images, row.missing, row.whole_image_share) == (4, 2, 0.5)
    assert row.positive_share == pytest.approx((3 * 0.75 + 0.25) / 4)
    assert row.corloc == row.whole_image_corloc == pytest.approx(1 / 3)  # of three images that are annotated
    assert row.warning == ""


def test_a_way_that_finds_nothing_or_everything_says_so(study):
    for box, words in ((-1, "no box on any image"), ((50, 0, 100, 50), "most boxes are the whole image")):
        for each in study.parts:
            each.boxes[:] = box
        (row,) = study.discovery([LostOptions.OFFICIAL], None)
        assert row.warning.startswith(words)
        assert row.corloc is None


def test_pictures_of_each_layer(study):
    pictures = study.pictures(pca=True)
    assert pictures.keys() == {f"{image}/{name}" for image in (0, 3) for name in ("photo", "pca", "outliers")}
    assert pictures["0/pca"].shape == (4, 4, 3)
    assert np.argwhere(pictures["0/outliers"]).tolist() == [[1, 0, 0]]
    assert np.argwhere(pictures["3/outliers"]).tolist() == [[2, 3, 5], [3, 3, 5]]
    assert "0/pca" not in study.pictures(pca=False)


def test_boxes_shown_are_those_in_pixels_that_the_model_saw(study):
    first, last = study.shown([LostOptions.OFFICIAL], [[(1, 2, 3, 4)], [], [], [(5, 6, 7, 8)]])
    assert (first.path, last.path) == ("0.png", "3.png")
    assert (first.boxes[0].box, first.shown[0].box) == ((50, 0, 100, 50), (0, 0, 40, 40))
    assert last.truths == [(5, 6, 7, 8)]


def test_a_part_is_read_as_it_was_written(tmp_path: Path, study):
    write(tmp_path / "parts" / "0.npz", study.parts[1])
    again = read(tmp_path / "parts" / "0.npz")
    assert again.paths == study.parts[1].paths
    for name, value in study.parts[1]._asdict().items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(getattr(again, name), value)
    assert placements_of(again) == placements_of(study.parts[1])
    assert again.pictures.keys() == study.parts[1].pictures.keys()


def test_a_survey_of_real_images():
    """Pictures are of their own image, and boxes are whole patches that are mapped to the image on disk."""
    model = lively(RegisterViT(ViTConfig(image_size=32, patch_size=8, dim=32, depth=2, num_heads=2)).eval())
    noise = np.random.default_rng(0)
    arrays = [(f"{i}", noise.integers(0, 255, (60, 100, 3), dtype=np.uint8)) for i in range(3)]
    images = ImageFolder(arrays, size=32, patch=8, fit="pad")
    survey = Survey(model, model.layout, 8, True, True, [LostOptions.CENTRED], 2, None)
    (one,) = survey.parts(images, 8)
    assert {name.partition("/")[0] for name in one.pictures} == {"0", "1"}
    for i in range(2):
        prefix = model.layout.num_prefix_tokens
        np.testing.assert_array_equal(one.pictures[f"{i}/norms"].reshape(2, 16), one.norms[:, i, prefix:])
    for i, placement in enumerate(placements_of(one)):
        left, top, right, bottom = seen = tuple(one.shown_boxes[0, i].tolist())
        assert 0 <= left < right <= 32
        assert 0 <= top < bottom <= placement.height == 19  # of 32, the rest is padding
        assert tuple(one.boxes[0, i].tolist()) == placement.to_image(seen)
    torch.testing.assert_close(torch.from_numpy(one.attention.sum(-1)), torch.ones(3, 5))
    (batch,) = images.batches(8)
    with torch.no_grad():
        (groups,) = model.intermediate_layers(batch.pixels, 1, norm=False)
    expected = torch.cosine_similarity(groups.patches, groups.cls[:, :1], dim=-1)
    valid = batch.valid
    torch.testing.assert_close(torch.from_numpy(one.cls_cosine)[valid], expected[valid], rtol=1e-4, atol=1e-5)
    assert np.isnan(one.cls_cosine[~valid.numpy()]).all()


def test_sinks_lie_between_their_bounds():
    """Of a model of which every query is the same, in block 1 a large one, so that each head has a sink; against all
    N x N."""
    model = lively(RegisterViT(ViTConfig(image_size=32, patch_size=8, dim=32, depth=2, num_heads=2)).eval())
    with torch.no_grad():
        for block, length in zip(model.blocks, (8, 50), strict=True):
            qkv, generator = block.attn.qkv, torch.Generator().manual_seed(0)
            qkv.weight[:32], qkv.bias[:32] = 0, length * torch.randn(32, generator=generator)
    noise = np.random.default_rng(0)
    arrays = [(f"{i}", noise.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for i in range(3)]
    images = ImageFolder(arrays, size=32, patch=8)
    (one,) = Survey(model, model.layout, 8, False, True, [], 0, None).parts(images, 8)
    (batch,) = images.batches(8)
    recording = record(model, batch.pixels, features=[(i, kind) for i in (0, 1) for kind in ("query", "key")])
    for layer in (0, 1):
        query, key = (recording.features[layer, kind].unflatten(2, (2, 16)).double() for kind in ("query", "key"))
        attention = torch.einsum("bqhd,bkhd->bhqk", query, key).mul(16**-0.5).softmax(-1)
        literal = ((attention >= 0.5).double().mean(2) >= 0.9).sum(1).numpy()  # heads, [B, N]
        least, most = one.sinks[:, layer]
        assert (least <= literal).all()
        assert (literal <= most).all()
    assert one.heads.tolist() == [2, 2]
    assert literal.sum() == least.sum() == 3 * 2
    assert one.sinks[0, 0].sum() < one.sinks[1, 0].sum()  # where the bounds differ


def test_a_model_without_a_prefix_has_sinks_among_its_patches_alone():
    config = ViTConfig(image_size=32, patch_size=8, dim=32, depth=2, num_heads=2, num_registers=0, num_cls_tokens=0)
    model = lively(RegisterViT(config).eval())
    arrays = [("grey", np.full((32, 32, 3), 128, np.uint8))]
    survey = Survey(model, model.layout, 8, True, True, [], 1, None)
    study = Study.of(list(survey.parts(ImageFolder(arrays, size=32, patch=8), 8)), model.layout, OPTIONS)
    assert (study.attention(), study.similarity("cls_cosine")) == ([], None)
    assert {row.tokens for row in study.sinks()} == {"normal"}
