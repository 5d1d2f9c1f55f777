"""Rows of a result file as a table on the terminal and as bars in a picture."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from benchmarks import roofline
from benchmarks.results import Errors, Row
from benchmarks.roofline import Roofline
from benchmarks.shapes import DTYPES, LENGTHS, MODES, DType, Mode, in_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 100
# A space before every column: one that outgrows its width would move the rest and not join its neighbour.
_LINE = "  {:<17} {:>9} {:>13} {:>7} {:>7} {:>7} {:>7} {:>9} {:>8}  {}"
_HEADINGS = _LINE.format(
    "", "median ms", "p20-p80 ms", "GFLOP/s", "% peak", "GB/s", "x peer", "max error", "eager's", ""
).rstrip()
_LEGEND = (
    "GFLOP/s and GB/s count useful work and traffic only. % peak: of the highest ceiling above that can serve the "
    "dtype: of a matrix product or, where there are native kernels, of multiplying on registers alone. x peer: time "
    "of the fastest contender that is not ours / this time. Errors: of the output, or the gradient furthest from the "
    "eager formula's error, against fp64 on the first and the last image; FAIL breaks the accuracy rule."
)
_BAR_GROUP = 0.8  # of the distance between two lengths
_FAR = 5  # times the highest bar: a peak beyond it is told, not drawn


def table(rows: Sequence[Row]) -> str:
    """The rows of attention, ceilings and host costs as text of at most 100 columns, grouped by length and threads.

    Rows of other kinds are left out.
    """
    attention, rooflines, overheads, launch_costs = (
        [row for row in rows if row["kind"] == kind] for kind in ("attention", "roofline", "overhead", "launch_cost")
    )
    parts = [_header(rooflines)] if rooflines else []
    if attention:
        parts.append(textwrap.fill(_LEGEND, WIDTH))
    for tokens, threads in dict.fromkeys((row["tokens"], row["threads"]) for row in attention):
        raced = [row for row in attention if (row["tokens"], row["threads"]) == (tokens, threads)]
        parts.append(_length(raced, roofline.highest(rooflines, threads)))
    parts += [refusals(attention), _overheads(overheads), _launch_costs(launch_costs)]
    return "\n\n".join(filter(None, parts))


def draw_bars(axes: Axes, rows: Sequence[Row], dtype: DType, mode: Mode) -> None:
    """Draws GFLOP/s of every contender by length, with p20-p80 whiskers and the run's peak as a dashed line.

    A peak so far above them that the bars would be too low to compare is told in words instead.

    Given the whole run's ``rows``, a contender has one place and one colour in every panel: vitreg_kernels in reds, its
    peers in blues. Of several numbers of threads the highest is drawn. The caller makes the figure and the legend
    (``axes.get_legend_handles_labels()``).
    """
    import matplotlib

    raced = [row for row in rows if row["kind"] == "attention" and row["reason"] is None]
    threads = max((row["threads"] for row in raced if row["threads"]), default=None)
    raced = [row for row in raced if row["threads"] == threads]
    panel = [row for row in raced if row["dtype"] == dtype and row["mode"] == mode]
    lengths = sorted(_in_order(panel, "tokens"))
    width = _BAR_GROUP / max(len(_in_order(raced, "variant")), 1)
    place = width / 2 - _BAR_GROUP / 2
    for ours, colours in ((True, "Reds"), (False, "Blues")):
        names = _in_order([row for row in raced if row["ours"] is ours], "variant")
        shades = matplotlib.colormaps[colours]([0.8 - 0.5 * i / len(names) for i in range(len(names))])
        for name, colour in zip(names, shades, strict=True):
            bars = [row for row in panel if row["variant"] == name]
            at = [lengths.index(row["tokens"]) + place for row in bars]
            heights = [row["gflops"] for row in bars]
            whiskers = [  # down to the speed at p80, up to that at p20
                [row["gflops"] - row["flops"] / row["p80_ms"] / 1e6 for row in bars],
                [row["flops"] / row["p20_ms"] / 1e6 - row["gflops"] for row in bars],
            ]
            axes.bar(at, heights, width, color=colour, label=name, yerr=whiskers, error_kw={"elinewidth": 0.7})
            place += width
    ceilings, unit = roofline.highest(rows, threads), "GFLOP/s"
    if panel and ceilings:
        peak = ceilings.peak_gflops(dtype)
        if peak > _FAR * max(row["gflops"] for row in panel):
            unit += f" (measured peak {peak:.0f})"
        else:
            axes.axhline(peak, color="grey", linestyle="--", linewidth=1, label="measured peak")
    axes.set_xticks(range(len(lengths)), [str(n) for n in lengths])
    axes.set(title=f"{dtype} {mode}", xlabel="tokens", ylabel=unit)


def _in_order(rows: Sequence[Row], field: str) -> list:
    """The values of a field, once each, in order of appearance."""
    return list(dict.fromkeys(row[field] for row in rows))


def _header(rooflines: Sequence[Row]) -> str:
    machine, versions = rooflines[-1]["machine"], rooflines[-1]["machine"]["packages"]
    changes = " with changes" if machine["dirty"] else ""
    ceilings = [_ceilings(roofline.highest(rooflines, threads)) for threads in _in_order(rooflines, "threads")]
    return "\n".join(
        (
            f"{machine['device']} ({machine['capability']}), {machine['threads']} threads, Python {machine['python']}",
            ", ".join(f"{name} {version}" for name, version in versions.items()),
            f"commit {machine['commit'][:12]}{changes}",
            *ceilings,
        )
    )


def _ceilings(ceilings: Roofline) -> str:
    def figures(gflops: dict[DType, float]) -> str:
        return ", ".join(f"{dtype} {number(value)}" for dtype, value in gflops.items())

    of = "" if ceilings.threads is None else f" of {in_words(ceilings.threads)}"
    products = f"matrix product GFLOP/s {figures(ceilings.product_gflops)}"
    registers = ceilings.register_gflops
    return f"ceilings{of}: {products}; copy {number(ceilings.copy_gbps)} GB/s" + (
        f"\n  multiplying on registers alone: GFLOP/s {figures(registers)}" if registers else ""
    )


def _length(rows: Sequence[Row], ceilings: Roofline) -> str:
    """All races of one length by one number of threads."""
    first = rows[0]
    threads = "" if first["threads"] is None else f", {in_words(first['threads'])}"
    lines = [
        f"N = {first['tokens']} ({LENGTHS[first['tokens']]}, {first['prefix_tokens']} prefix tokens)"
        f", B = {first['batch']}, H = {first['heads']}, D = {first['head_dim']}{threads}",
        _HEADINGS,
    ]
    for dtype in DTYPES:
        for mode in MODES:
            raced = [r for r in rows if (r["dtype"], r["mode"], r["reason"]) == (dtype, mode, None)]
            if raced:
                lines.append(f" {dtype} {mode}, {number(raced[0]['flops'] / 1e9)} GFLOP")
                lines += [_figures(row, ceilings.peak_gflops(dtype)) for row in raced]
    return "\n".join(lines)


def _figures(row: Row, peak_gflops: float) -> str:
    error = worst(row["errors"])
    return _LINE.format(
        row["variant"],
        number(row["median_ms"]),
        f"{number(row['p20_ms'])}-{number(row['p80_ms'])}",
        number(row["gflops"]),
        f"{row['gflops'] / peak_gflops:.1%}",
        number(row["gbps"]),
        "" if row["speedup"] is None else f"{row['speedup']:.2f}",
        f"{error['max']:.1e}",
        f"{error['eager_max']:.1e}",
        "" if all(e["passed"] for e in row["errors"].values()) else "FAIL",
    ).rstrip()


def worst(errors: dict[str, Errors]) -> Errors:
    """A tensor that broke the rule if one did, and of those left the one furthest from the eager formula's error."""
    return max(errors.values(), key=lambda e: (not e["passed"], e["max"] / e["eager_max"] if e["eager_max"] else 0.0))


def refusals(rows: Sequence[Row]) -> str:
    """Who was not raced, in how many of the cases of a race, and the first sentence of what each said; "" if nobody."""
    refused = [row for row in rows if row["reason"] is not None]
    counts = Counter((row["variant"], row["failed"], _first_sentence(row["reason"])) for row in refused)
    lines = ["not raced:"]
    for (name, failed, reason), count in counts.items():
        of = sum(row["variant"] == name for row in rows)
        cases = "every case" if count == of else f"{count} of {of} cases"
        text = f"  {name:<18}{cases}: {'FAIL ' if failed else ''}{reason}"
        lines.append(textwrap.fill(text, WIDTH, subsequent_indent=" " * 20, break_on_hyphens=False))
    return "\n".join(lines) if refused else ""


def _first_sentence(reason: str) -> str:
    """Or line: what follows may name the shapes, and differ from case to case."""
    return reason.partition("\n")[0].split(". ")[0].rstrip(".:")


def _overheads(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    lines = ["our functions over the raw backend call, µs a call"]
    for row in rows:
        gradients = "with gradients" if row["requires_grad"] else "without gradients"
        figures = f"{row['ours_us']:>8.1f} - {row['raw_us']:.1f} = {row['overhead_us']:.1f}"
        lines.append(f"  {row['call']:<24}{gradients:<18}{figures}{_against(row, row['overhead_us'])}")
    return "\n".join(lines)


def _launch_costs(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    lines = ["the Triton backend over an op that only allocates, µs of the host, by a driver that launches nothing"]
    for row in rows:
        figures = f"{row['ours_us']:>8.1f}, scaled_dot_product_attention by itself {row['sdpa_us']:.1f}"
        lines.append(f"  {row['call']:<24}{figures}{_against(row, row['ours_us'])}")
    return "\n".join(lines)


def _against(row: Row, us: float) -> str:
    return f"  (goal: {row['goal_us']:.0f})" + ("" if us <= row["goal_us"] else "  ABOVE THE GOAL")


def number(value: float) -> str:
    """Three significant digits; two in scientific notation below 0.001, where three are too long for a column."""
    if 0 < value < 1e-3:
        return f"{value:.1e}"
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
