"""The picture shows every contender, every photograph and every map, and no writing covers another."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from benchmarks.features import Maps
from benchmarks.roofline import Roofline
from benchmarks.shapes import Case

matplotlib = pytest.importorskip("matplotlib", reason="the picture is drawn with matplotlib")

from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402

from benchmarks import picture  # noqa: E402

NAMES = ("astronaut", "cat")
CEILINGS = {"kind": "roofline", **Roofline({"fp32": 100.0, "bf16": 50.0}, 20.0)._asdict()}
MACHINE = {"device": "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "capability": "AVX2", "threads": 2}
CONTENDERS = ("vitreg:triton", "vitreg:sdpa", "vitreg:xformers", "vitreg:reference", "torch:math", "torch:flash")


@pytest.fixture(scope="module")
def rows():
    """One length is missing from one panel for one contender, as when a backend refuses it."""
    rows = [{**CEILINGS, "machine": MACHINE}]
    for tokens in (54, 261, 1374):
        for dtype in ("fp32", "bf16"):
            for mode in ("forward", "forward+backward"):
                case = Case(1, 6, tokens, dtype, mode)
                for i, variant in enumerate(CONTENDERS, 1):
                    gflops = 10.0 * i
                    ms = case.flops / gflops / 1e6
                    rows.append(
                        {
                            "kind": "attention",
                            "variant": variant,
                            "ours": variant.startswith("vitreg"),
                            "reason": "no" if (variant, dtype) == ("torch:flash", "fp32") else None,
                            "dtype": dtype,
                            "mode": mode,
                            "tokens": tokens,
                            "threads": None,
                            "flops": case.flops,
                            "gflops": gflops,
                            "p20_ms": 0.9 * ms,
                            "p80_ms": 1.1 * ms,
                            "machine": MACHINE,
                        }
                    )
    return rows


@pytest.fixture(scope="module")
def maps():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(len(NAMES), 3, 28, 28, generator=generator)
    return Maps("a model", NAMES, images, torch.rand(len(NAMES), 5, 2, 2, generator=generator))


@pytest.fixture(scope="module")
def figure(rows, maps):
    figure = picture.draw(rows, maps)
    figure.draw_without_rendering()
    return figure


def test_the_race_shows_every_contender_once(figure):
    above, _ = figure.subfigs
    (legend,) = above.legends
    assert [text.get_text() for text in legend.get_texts()] == [*CONTENDERS, "measured peak"]
    assert [panel.get_title() for panel in above.axes] == [
        "fp32 forward",
        "fp32 forward+backward",
        "bf16 forward",
        "bf16 forward+backward",
    ]
    assert all(panel.get_xlabel() and panel.get_ylabel() for panel in above.axes)


def test_the_maps_show_photographs_and_attention_unsmoothed_on_one_scale(figure, maps):
    _, below = figure.subfigs
    panels, colorbar = below.axes[:-1], below.axes[-1]
    assert "attention" in colorbar.get_ylabel()
    drawn = [panel.get_images()[0] for panel in panels]
    for row in range(len(NAMES)):
        photograph, *attention = drawn[6 * row : 6 * row + 6]
        assert torch.equal(torch.from_numpy(photograph.get_array()).permute(2, 0, 1), maps.images[row])
        assert panels[6 * row].get_ylabel() == NAMES[row]
        for image, expected in zip(attention, maps.attention[row], strict=True):
            assert torch.equal(torch.from_numpy(image.get_array().data), expected)
            assert image.get_interpolation() == "nearest"
    assert len({image.get_clim() for image in drawn if image.get_array().ndim == 2}) == 1
    boxes = [panel.get_window_extent() for panel in panels]
    assert all(box.width == pytest.approx(box.height, rel=0.01) for box in boxes)


def writing(figure):
    """Every text that is drawn: of tick labels, those within their axis's limits."""
    undrawn = set()
    for panel in (panel for part in figure.subfigs for panel in part.axes):
        for axis in (panel.xaxis, panel.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
            undrawn |= {label for at, label in ticks if not low <= at <= high}
    texts = figure.findobj(matplotlib.text.Text)
    return [text for text in texts if text.get_visible() and text.get_text().strip() and text not in undrawn]


def test_no_writing_covers_another_or_leaves_the_page(figure):
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in writing(figure)]
    assert len(boxes) > 50
    for (one, box), (other, other_box) in combinations(boxes, 2):
        assert not box.shrunk(0.9, 0.9).overlaps(other_box), f"{one!r} and {other!r} overlap"
    page = figure.bbox
    for text, box in boxes:
        assert page.x0 <= box.x0 <= box.x1 <= page.x1, f"{text!r} is cut"
        assert page.y0 <= box.y0 <= box.y1 <= page.y1, f"{text!r} is cut"


def test_save_writes_a_png(tmp_path, rows, maps):
    picture.save(tmp_path / "picture.png", rows, maps)
    pixels = matplotlib.image.imread(tmp_path / "picture.png")
    assert pixels.shape[1] == 1650
    assert pixels.shape[0] > 1000
