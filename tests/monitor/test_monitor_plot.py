"""The picture shows every layer, every group and every step, and no writing covers another."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from test_monitor_report import report_of

from vitreg_kernels import TokenLayout

matplotlib = pytest.importorskip("matplotlib", reason="the picture is drawn with matplotlib")

from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402

from vitreg_kernels.monitor import plot  # noqa: E402

STEPS = (0, 100, 200, 300)
LAYOUT = TokenLayout(num_registers=4)


def report(layers, outliers=0):
    """Norms that grow from layer to layer, CLS and registers above the patches; outliers in the second half."""
    norms = torch.linspace(0.0, 1.0, 4 * 105).view(4, 105).exp()
    norms[:, LAYOUT.cls] *= 4.0
    norms[:, LAYOUT.registers] *= 2.0
    high = norms.clone()
    high[0, 10 : 10 + outliers] *= 16.0
    return report_of(*((high if i >= layers // 2 else norms) * 1.2**i for i in range(layers)), layout=LAYOUT)


def history(layers):
    return [(step, row) for step in STEPS for row in report(layers, step // 100).rows()]


def drawn(*args, **rule):
    figure = plot.draw(*args, **rule)
    figure.draw_without_rendering()
    return figure


@pytest.mark.parametrize("layers", [4, 41])
def test_norms_and_history_are_drawn(layers):
    figure = drawn(report(layers, 3), history(layers))
    norms, steps, *_ = figure.axes
    (mesh,) = norms.collections[:1]
    shares = mesh.get_array()
    assert shares.shape[1] == layers
    assert shares.sum(0).tolist() == pytest.approx([100.0] * layers)
    legend = [text.get_text() for text in norms.get_legend().get_texts()]
    assert sorted(legend) == ["CLS", "outliers from here on", "registers"]
    assert norms.get_yscale() == "log"
    assert len(steps.lines) == layers
    for i, line in enumerate(steps.lines):
        assert line.get_xdata() == pytest.approx(STEPS)
        expected = [step / 100 if i >= layers // 2 else 0.0 for step in STEPS]
        assert line.get_ydata() == pytest.approx([x / 4.0 for x in expected])  # of 400 patches, in percent
    assert len({line.get_color() for line in steps.lines}) == layers


def test_marks_stand_where_the_rows_say():
    of = report(4, 3)
    norms = drawn(of, norm=20.0).axes[0]
    marks = {container.get_label(): container.lines[0].get_ydata() for container in norms.containers}
    for group, label in (("cls", "CLS"), ("registers", "registers")):
        assert marks[label] == pytest.approx([row.median for row in of.rows() if row.group == group])
    (lines,) = (c for c in norms.collections if c.get_label() == "outliers from here on")
    assert [segment[0][1] for segment in lines.get_segments()] == [20.0] * 4


def test_groups_without_tokens_are_not_in_the_legend():
    of = report_of(torch.ones(2, 9), layout=TokenLayout(num_registers=0, num_cls_tokens=0))
    assert [text.get_text() for text in drawn(of).axes[0].get_legend().get_texts()] == ["outliers from here on"]


def test_no_outliers_are_drawn_as_none():
    steps = drawn(report(4), [(step, row) for step in STEPS for row in report(4).rows()]).axes[1]
    assert steps.get_ylim() == (0.0, 1.0)


def test_one_outlier_can_be_seen():
    """The color of the smallest share is not the page's."""
    mesh = drawn(report(4, 1)).axes[0].collections[0]
    assert mesh.cmap(mesh.norm(mesh.get_array().min()))[0] < 0.8


def test_without_patches_there_is_nothing_to_draw():
    with pytest.raises(ValueError, match="nothing to draw"):
        plot.draw(report_of(torch.full((1, 105), torch.nan)))


@pytest.mark.parametrize("layers", [4, 41])
def test_no_writing_covers_another_or_leaves_the_page(layers):
    figure = drawn(report(layers, 3), history(layers))
    renderer = FigureCanvasAgg(figure).get_renderer()
    undrawn = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            undrawn |= {label for t in ticks if not low <= t.get_loc() <= high for label in (t.label1, t.label2)}
    texts = [t for t in figure.findobj(matplotlib.text.Text) if t.get_visible() and t.get_text().strip()]
    upright = [t for t in texts if t not in undrawn and t.get_rotation() in (0.0, 90.0)]
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in upright]
    assert len(boxes) > 20
    for (one, box), (other, other_box) in combinations(boxes, 2):
        assert not box.shrunk(0.9, 0.9).overlaps(other_box), f"{one!r} and {other!r} overlap"
    for text in texts:
        box = text.get_window_extent(renderer)
        if text not in undrawn:
            assert figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1, f"{text.get_text()!r} is cut"
            assert figure.bbox.y0 <= box.y0 <= box.y1 <= figure.bbox.y1, f"{text.get_text()!r} is cut"


def test_the_figure_saves_as_png(tmp_path):
    drawn(report(4, 3), history(4)).savefig(tmp_path / "norms.png", dpi=100)
    assert matplotlib.image.imread(tmp_path / "norms.png").shape[:2] == (500, 1250)
