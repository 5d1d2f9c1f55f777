"""The table fits a terminal and hides nothing; the bars stand where they should."""

from __future__ import annotations

import itertools
import re

import pytest

from benchmarks import report
from benchmarks.roofline import Roofline
from benchmarks.shapes import Case


@pytest.fixture
def rows(race, machine, ceilings, monkeypatch):
    monkeypatch.setattr(report, "LENGTHS", {7: "tiny", 9: "small"})
    rows = [{"kind": "roofline", **ceilings._asdict(), "machine": machine}, {"kind": "from another module"}]
    for tokens in (7, 9):
        for dtype in ("fp32", "bf16"):
            rows += race(Case(1, 2, tokens, dtype, "forward", head_dim=16))
    slow = {"call": "register_attention_qkv", "requires_grad": True, "ours_us": 40.0, "overhead_us": 32.0}
    fast = {"call": "register_attention", "requires_grad": False, "ours_us": 30.0, "overhead_us": 22.0}
    overhead = {"kind": "overhead", "shape": [1, 1, 16, 16], "raw_us": 8.0, "goal_us": 25.0, "samples": 9}
    return [*rows, *({**overhead, **figures, "machine": machine} for figures in (fast, slow))]


def test_table_fits_a_terminal_whatever_the_figures(rows):
    raced = next(row for row in rows if row.get("variant") == "vitreg:ours")
    raced |= {"median_ms": 123456.7, "p20_ms": 123456.7, "p80_ms": 123456.7, "gflops": 987654.3, "gbps": 0.001234567}
    raced |= {"peak_fraction": 12.345, "speedup": 1234.5}
    for row in rows:
        if row.get("variant") == "vitreg:wrong":  # its line ends in FAIL, the longest there is
            row |= {"gflops": 0.000123456, "gbps": 0.000123456}
    refused = next(row for row in rows if row.get("variant") == "vitreg:knows")
    refused["reason"] = "very " * 100 + "sorry"
    assert max(map(len, report.table(rows).splitlines())) <= 100


def test_table_groups_by_length_and_names_units(rows):
    text = report.table(rows)
    assert text.index("N = 7 (tiny") < text.index("N = 9 (small")
    assert text.count("N = ") == 2
    assert text.count("vitreg:ours") == 4
    for heading in ("median ms", "p20-p80 ms", "GFLOP/s", "% peak", "GB/s"):
        assert heading in text
    assert "fp32 100, bf16 10; copy 20 GB/s" in text
    assert "commit 0123456789ab\n" in text


def test_shares_are_of_the_highest_ceilings_of_the_run_which_the_header_shows(rows, machine):
    """Whenever they were measured: the first rows were written when 100 GFLOP/s was the highest known."""
    later = {"kind": "roofline", **Roofline({"fp32": 400.0, "bf16": 5.0}, 10.0)._asdict(), "machine": machine}
    raced = next(row for row in rows if row.get("variant") == "vitreg:ours")
    raced |= {"gflops": 60.0, "gbps": 0.000149}  # a slow machine's
    text = report.table([*rows, later])
    assert "fp32 400, bf16 10; copy 20 GB/s" in text
    line = next(line for line in text.splitlines() if "vitreg:ours" in line)
    assert re.search(r" 60 +15\.0% 1\.5e-04 ", line)


def test_races_by_another_number_of_threads_stand_apart_under_their_own_ceilings(rows):
    for row in rows:
        if row.get("variant") == "vitreg:ours":
            row["gflops"] = 24.0

    def by(threads, scale):
        ceilings = Roofline({"fp32": 100.0 * scale, "bf16": 10.0}, 20.0, {"fp32": 50.0, "bf16": 300.0 * scale}, threads)
        yield {"kind": "roofline", **ceilings._asdict(), "machine": rows[0]["machine"]}
        for row in rows:
            if row["kind"] == "attention":
                yield row | {"threads": threads}

    text = report.table([*by(2, 4), *by(1, 2)])
    for threads, product, registers in (("2 threads", 400, 1200), ("1 thread", 200, 600)):
        assert f"ceilings of {threads}: matrix product GFLOP/s fp32 {product}, bf16 10; copy 20 GB/s\n" in text
        assert f"\n  multiplying on registers alone: GFLOP/s fp32 50, bf16 {registers}\n" in text
    heads = [line for line in text.splitlines() if line.startswith("N = ")]
    assert [line.rpartition(", ")[2] for line in heads] == ["2 threads", "2 threads", "1 thread", "1 thread"]
    shares = [float(share) for share in re.findall(r"vitreg:ours .* ([\d.]+)%", text)]
    assert shares == pytest.approx([6.0, 6.0 / 3, 6.0, 6.0 / 3, 12.0, 4.0, 12.0, 4.0])


def test_table_reports_refused_contenders_in_their_own_words(rows):
    text = report.table(rows)
    assert "vitreg:knows      every case: runs on the moon only" in text
    assert "vitreg:crashes    every case: FAIL IndexError: out of its own bounds" in text
    assert "other:raises      every case: RuntimeError: no kernel for this\n" in text


def test_a_contender_refused_in_some_cases_only_is_both_raced_and_reported(rows):
    raced = next(row for row in rows if row.get("variant") == "other:right")
    raced["reason"] = "out of memory"
    text = report.table(rows)
    assert "other:right       1 of 4 cases: out of memory" in text
    assert text.count("other:right ") == 4


def test_table_marks_a_broken_accuracy_rule(rows):
    lines = report.table(rows).splitlines()
    wrong = [line for line in lines if "vitreg:wrong" in line]
    assert sum(line.endswith("FAIL") for line in wrong) >= 2  # both lengths in fp32
    assert not any(line.endswith("FAIL") for line in lines if "vitreg:ours" in line)


def test_a_failed_gradient_is_not_hidden_by_a_good_output():
    good = {"max": 9.0, "mean": 1.0, "eager_max": 1.0, "eager_mean": 1.0, "passed": True}
    bad = {"max": 3.0, "mean": 1.0, "eager_max": 1.0, "eager_mean": 1.0, "passed": False}
    assert report.worst({"output": good, "grad_key": bad}) is bad


def test_table_shows_the_overhead_against_its_goal(rows):
    without, with_gradients = report.table(rows).splitlines()[-2:]
    figures = ["30.0", "-", "8.0", "=", "22.0", "(goal:", "25)"]
    assert without.split() == ["register_attention", "without", "gradients", *figures]
    assert with_gradients.split()[:3] == ["register_attention_qkv", "with", "gradients"]
    assert with_gradients.endswith("= 32.0  (goal: 25)  ABOVE THE GOAL")


def test_table_shows_what_a_launch_costs_the_host(rows, machine):
    cost = {"kind": "launch_cost", "shape": [1, 1, 16, 16], "sdpa_us": 9.0, "samples": 9, "machine": machine}
    rows += [
        cost | {"call": "forward", "ours_us": 31.0, "goal_us": 30.0},
        cost | {"call": "backward", "ours_us": 32.0, "goal_us": 45.0},
    ]
    forward, backward = report.table(rows).splitlines()[-2:]
    assert forward.split()[:2] == ["forward", "31.0,"]
    assert forward.endswith("by itself 9.0  (goal: 30)  ABOVE THE GOAL")
    assert backward.endswith("by itself 9.0  (goal: 45)")


def test_table_of_a_cut_run_with_nothing_raced_yet(rows):
    assert "ceilings" in report.table(rows[:1])
    assert report.table([]) == ""


def test_bars(rows):
    figures = pytest.importorskip("matplotlib.figure")
    rows = _with_peak(rows, 2)
    figure = figures.Figure()
    panels = figure.subplots(2)
    for axes, dtype in zip(panels, ("fp32", "bf16"), strict=True):
        report.draw_bars(axes, rows, dtype, "forward")
    first, second = ({c.get_label(): c for c in axes.containers if c.get_label() in _raced(rows)} for axes in panels)
    assert list(first) == list(second) == ["vitreg:ours", "vitreg:wrong", "other:right"]
    assert panels[0].get_legend_handles_labels()[1] == ["measured peak", *first]
    for name in first:
        assert first[name][0].get_facecolor() == second[name][0].get_facecolor()
        shown = [bar.get_height() for bar in first[name]]
        assert shown == [r["gflops"] for r in rows if r.get("variant") == name and r["dtype"] == "fp32"]
    assert len({bars[0].get_facecolor() for bars in first.values()}) == 3
    # Bars of one length touch and do not overlap.
    edges = [(bars[0].get_x(), bars[0].get_x() + bars[0].get_width()) for bars in first.values()]
    assert all(left[1] == pytest.approx(right[0]) for left, right in itertools.pairwise(edges))
    assert [tick.get_text() for tick in panels[0].get_xticklabels()] == ["7", "9"]


def test_bars_are_of_the_most_threads(rows):
    figures = pytest.importorskip("matplotlib.figure")
    raced = [row for row in rows if row["kind"] == "attention"]
    axes = figures.Figure().subplots()
    faster = [row | {"threads": 1, "gflops": row["gflops"] and 2 * row["gflops"]} for row in raced]
    report.draw_bars(axes, [*(row | {"threads": 2} for row in raced), *faster], "fp32", "forward")
    heights = [bar.get_height() for bars in axes.containers if bars.get_label() == "vitreg:ours" for bar in bars]
    assert heights == [r["gflops"] for r in raced if (r["variant"], r["dtype"]) == ("vitreg:ours", "fp32")]


def test_a_peak_far_above_the_bars_is_told_instead_of_drawn(rows):
    figures = pytest.importorskip("matplotlib.figure")
    for times, drawn in ((4, True), (6, False)):
        axes = figures.Figure().subplots()
        report.draw_bars(axes, _with_peak(rows, times), "fp32", "forward")
        assert ("measured peak" in axes.get_legend_handles_labels()[1]) is drawn
        assert ("measured peak" in axes.get_ylabel()) is not drawn


def _with_peak(rows, times):
    """The rows under a ceiling so many times as high as the highest of their fp32 bars."""
    highest = max(row["gflops"] or 0 for row in rows if row.get("dtype") == "fp32")
    speeds = dict.fromkeys(("fp32", "bf16"), times * highest)
    ceilings = {"kind": "roofline", **Roofline(speeds, 10.0)._asdict(), "machine": rows[0]["machine"]}
    return [ceilings, *(row for row in rows if row["kind"] != "roofline")]


def _raced(rows):
    return {row["variant"] for row in rows if row["kind"] == "attention" and row["reason"] is None}
