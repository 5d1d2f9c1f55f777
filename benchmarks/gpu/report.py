"""A GPU run's rows as a Markdown table and a picture, and what ``docs/benchmarks.md`` says of all such runs."""

from __future__ import annotations

import json
import os
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import machine, results, roofline
from benchmarks.gpu import accuracy, memcheck, norms, pieces, smoke
from benchmarks.gpu.stage import load
from benchmarks.results import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MODES = ("forward", "backward", "forward+backward")
# ns a (batch, head) on an H200 in bf16 at head dim 64: what the kernels are made to reach.
GOALS = {
    54: (8, 17, 25),
    201: (28, 80, 108),
    261: (38, 110, 148),
    1029: (484, 1570, 2054),
    1374: (833, 2690, 3523),
}
UNKNOWN = "unknown"  # the capability of a GPU that no process got hold of
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")

_DRY = "**DRY RUN: tiny shapes on a CPU. No time and no speed below means anything.**"
_LEGEND = (
    "A cell: ns a (batch, head), useful TFLOP/s, share of the roofline, and the time of the fastest peer of the column "
    "over this one. * is what `backend=None` takes. FAIL breaks the accuracy rule or broke. - was not raced, for a "
    "reason at the end."
)
_NORMS_LEGEND = (
    "Residual with LayerScale, its norm and each token's norm. A cell: time, useful GB/s (each [B, N, C] tensor once, "
    "4 forward and 6 backward), share of the speed of copying x and the branch, and the time of the fastest peer of "
    "the column over this."
)
_BAR_GROUP = 0.8  # of the distance between two lengths


def save(path: Path, rows: Sequence[Row]) -> str:
    """Writes the table (.md) and the picture (.png) beside a result file; the table, and which files there are now."""
    text, table, picture = markdown(rows), path.with_suffix(".md"), path.with_suffix(".png")
    table.write_text(text + "\n")
    lines = [text, "", os.path.relpath(path), os.path.relpath(table)]
    if not _pictured(rows):
        lines.append("no picture: nothing packed was raced")
    else:
        try:
            draw(rows).savefig(picture, dpi=150)
            lines.append(os.path.relpath(picture))
        except ModuleNotFoundError as error:
            again = f"python -m benchmarks.gpu --report {os.path.relpath(path)}"
            lines.append(f"no picture: {error}; where matplotlib is installed, draw it with: {again}")
    return "\n".join(lines)


def is_dry(rows: Sequence[Row]) -> bool:
    """Whether a CPU made these rows."""
    return not rows[0]["machine"]["capability"].startswith(("sm_", UNKNOWN))


def markdown(rows: Sequence[Row]) -> str:
    """The whole report. There is a row at least."""
    title = f"# vitreg_kernels on {rows[0]['machine']['device']}"
    sections = (
        _environment,
        _smoke,
        _broken,
        _accuracy,
        _races,
        _goals,
        _outputs,
        _norms,
        _models,
        _tiles,
        _refusals,
        _stages,
    )
    parts = [title, *([_DRY] if is_dry(rows) else []), *(section(rows) for section in sections)]
    return "\n\n".join(part for part in parts if part)


def draw(rows: Sequence[Row]) -> Figure:
    """Bars of useful TFLOP/s by length, forward and forward+backward, under the roofline of each length."""
    from matplotlib.figure import Figure

    raced = _pictured(rows)
    dtype, head_dim = raced[0]["dtype"], raced[0]["head_dim"]
    figure = Figure(figsize=(11.0, 8.0), layout="constrained")
    about = rows[0]["machine"]
    figure.suptitle(
        ("DRY RUN: these speeds mean nothing\n" if is_dry(rows) else "")
        + f"Attention on ViT shapes, {dtype}, head dim {head_dim}: higher is faster\n{about['device']} "
        f"({about['capability']}), torch {about['packages']['torch']}",
        fontweight="bold",
    )
    panels = figure.subplots(2, 1)
    for panel, mode in zip(panels, ("forward", "forward+backward"), strict=True):
        _bars(panel, raced, mode)
    handles = {}
    for panel in panels:
        found, labels = panel.get_legend_handles_labels()
        handles |= dict(zip(labels, found, strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, frameon=False)
    return figure


def summary(paths: Iterable[Path]) -> str:
    """What ``docs/benchmarks.md`` says of GPUs: the goals beside each run's figures, and who has none."""
    load()
    runs = [(path, results.load(path)) for path in paths if _is_gpu_run(path)]
    measured = {rows[0]["machine"]["capability"] for _, rows in runs}
    missing = [name for name in ARCHITECTURES if name not in measured]
    parts = []
    for path, rows in runs:
        name = f"{rows[0]['machine']['device']} ({rows[0]['machine']['capability']})"
        inside = path.is_relative_to(machine.ROOT)
        where = f"../{path.relative_to(machine.ROOT).as_posix()}" if inside else path.name
        parts += [f"**{name}**, from [{path.name}]({where}):", _goals_table(rows) or "It raced nothing."]
    if missing:
        have = "has" if len(missing) == 1 else "have"
        none = "" if runs else ": no GPU result file exists, so no GPU speed is claimed"
        parts.append(f"**{_and(missing)} {have} not been measured yet**{none}.")
    return "\n\n".join(parts)


def committed() -> list[Path]:
    """The result files that git knows of; outside a checkout, those that are there."""
    folder = results.FOLDER
    try:
        command = ("git", "-C", str(folder), "ls-files", "*.json")
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return sorted(folder.glob("*.json"))
    return sorted(folder / name for name in done.stdout.split())


def _environment(rows: Sequence[Row]) -> str:
    if not (its := _of(rows, "environment")):  # the run broke before
        return ""
    (row,) = its
    about = row["machine"]
    changed = " with changes" if about["dirty"] else ""
    lines = [
        ("GPU", f"{about['device']} ({about['capability']})"),
        ("multiprocessors", row["multiprocessors"]),
        ("L2", row["l2_bytes"] and f"{row['l2_bytes'] / 2**20:.0f} MiB"),
        ("memory", row["memory_bytes"] and f"{row['memory_bytes'] / 2**30:.1f} GiB"),
        ("power limit", row["power_limit_w"] and f"{row['power_limit_w']:.0f} W"),
        ("highest clocks", _clocks(row)),
        ("driver, CUDA, cuDNN", ", ".join(str(row[name] or "unknown") for name in ("driver", "cuda", "cudnn"))),
        ("Python", about["python"]),
        ("packages", ", ".join(f"{name} {version}" for name, version in about["packages"].items())),
        ("peers", ", ".join(f"{name} {version}" for name, version in row["peers"].items()) or "none"),
        ("commit", about["commit"][:12] + changed),
        ("sources", about["sources"]),
    ]
    if ceilings := roofline.highest(rows):
        products = ", ".join(f"{dtype} {gflops / 1e3:.3g}" for dtype, gflops in ceilings.product_gflops.items())
        lines.append(("copy bandwidth", f"{ceilings.copy_gbps:.0f} GB/s"))
        lines.append(("matrix product of random data", f"TFLOP/s: {products}"))
    return "## Machine\n" + _table(("", ""), [(name, value or "unknown") for name, value in lines])


def _clocks(row: Row) -> str | None:
    clocks = (row["sm_clock_mhz"], row["memory_clock_mhz"])
    return None if None in clocks else "SM {:.0f} MHz, memory {:.0f} MHz".format(*clocks)


def _smoke(rows: Sequence[Row]) -> str:
    """The smoke test's own errors beside the eager formula's, and what the memory checker says."""
    table = [
        (
            row["backend"],
            row["tokens"],
            row["batch"] * row["heads"],
            row["dtype"],
            row["reason"]
            or ", ".join(f"{name} {e['max']:.2g} ({e['eager_max']:.2g})" for name, e in row["errors"].items()),
            "FAIL" if smoke.failures([row]) else "",
        )
        for row in _of(rows, "smoke")
    ]
    told = [f"Memory checker: {memcheck.told(row)}." for row in _of(rows, "memcheck")]
    columns = ("backend", "N", "heads", "dtype", "largest errors (eager's)", "")
    parts = [*([_table(columns, table)] if table else []), *told]
    return "## Smoke test\n" + "\n\n".join(parts) if parts else ""


def _broken(rows: Sequence[Row]) -> str:
    """Pieces of work that hung, raised or took their process along."""
    return "\n".join(["## Broken", *(f"- {sentence}" for sentence in its)]) if (its := pieces.failures(rows)) else ""


def _accuracy(rows: Sequence[Row]) -> str:
    judged = _of(rows, "accuracy") + _of(rows, "norm_accuracy")
    if not judged:
        return ""
    table = []
    for backend in _in_order(judged, "backend"):
        for dtype in _in_order(judged, "dtype"):
            its = [row for row in judged if (row["backend"], row["dtype"]) == (backend, dtype)]
            ran = [row for row in its if not row["reasons"]]
            same = [row for row in ran if row["deterministic"]]
            exact = [row for row in ran if row["errors"] and all(e["passed"] for e in row["errors"].values())]
            tensors = sum(len(row["errors"] or {}) for row in ran)
            counts = len(exact), len(ran) - len(exact), len(its) - len(ran), tensors
            table.append((backend, dtype, *counts, f"{len(same)} of {len(ran)}"))
    headings = ("backend", "dtype", "passed", "FAILED", "not served", "tensors", "same bits twice")
    wrong = [*accuracy.failures(list(rows)), *norms.failures(_of(rows, "norm_accuracy"))]
    failures = "\n".join(f"- {sentence}" for sentence in wrong)
    return "\n\n".join(filter(None, ("## Accuracy\n" + _table(headings, table), failures)))


def _races(rows: Sequence[Row]) -> str:
    """One table for each layout, mode, dtype and head dim: peers down, lengths across."""
    races = _of(rows, "race")
    if not races:
        return ""
    parts = ["## Attention\n" + _LEGEND]
    for key in dict.fromkeys((row["layout"], row["head_dim"], row["dtype"], row["mode"]) for row in races):
        layout, head_dim, dtype, mode = key
        its = [row for row in races if (row["layout"], row["head_dim"], row["dtype"], row["mode"]) == key]
        lengths = dict.fromkeys((row["tokens"], row["batch"] * row["heads"]) for row in its)
        table = []
        for variant in _in_order(its, "variant"):
            by_length = {(row["tokens"], row["batch"] * row["heads"]): row for row in its if row["variant"] == variant}
            table.append((variant, *(_cell(by_length.get(length)) for length in lengths)))
        if any(set(cells) != {"-"} for _, *cells in table):
            headings = ("", *(f"N = {tokens} (B·H = {heads})" for tokens, heads in lengths))
            raced = [cells for cells in table if set(cells[1:]) != {"-"}]
            parts.append(f"### {layout}, {mode}, {dtype}, head dim {head_dim}\n" + _table(headings, raced))
    return "\n\n".join(parts)


def _cell(row: Row | None) -> str:
    if row is None or (row["median_ms"] is None and not row["failed"]):
        return "-"
    if row["median_ms"] is None:
        return "FAIL"
    figures = [f"{_ns(row['ns_per_head'])} ns", f"{row['tflops']:.3g} TFLOP/s"]
    if row["roofline_fraction"] is not None:
        figures.append(f"{row['roofline_fraction']:.0%}")
    if row["speedup"] is not None:
        figures.append(f"{row['speedup']:.2f}x")
    wrong = any(not error["passed"] for error in (row["errors"] or {}).values())
    return ", ".join(figures) + (" *" if row["default"] else "") + (" FAIL" if wrong else "")


def _goals(rows: Sequence[Row]) -> str:
    table = _goals_table(rows)
    return table and "## The goals beside our fastest\n" + table


def _goals_table(rows: Sequence[Row]) -> str:
    """ns a (batch, head) of our fastest backend, its goal, and how many times as fast as the best peer it is."""
    raced = [
        row
        for row in _raced(rows)
        if row["ours"] and (row["layout"], row["dtype"], row["head_dim"]) == ("packed", "bf16", 64)
    ]
    table = []
    for tokens, goals in GOALS.items():
        cells = []
        for mode, goal in zip(MODES, goals, strict=True):
            its = [row for row in raced if (row["tokens"], row["mode"]) == (tokens, mode)]
            best = min(its, key=lambda row: row["ns_per_head"], default=None)
            ours = "-" if best is None else f"{_ns(best['ns_per_head'])} by {best['variant']}"
            faster = f", {best['speedup']:.2f}x" if best and best["speedup"] is not None else ""
            cells.append(f"{ours} (goal {goal}){faster}")
        table.append((tokens, *cells))
    headings = ("N", *(f"{mode}, ns a (batch, head)" for mode in MODES))
    note = "\n\nPacked bf16, head dim 64. The goals are for an H200; x: time of the best peer over ours."
    return _table(headings, table) + note if raced else ""


def _outputs(rows: Sequence[Row]) -> str:
    measured = _of(rows, "outputs")
    if not measured:
        return ""
    lengths = _in_order(measured, "tokens")
    table = []
    for backend, outputs in dict.fromkeys((row["backend"], tuple(row["outputs"])) for row in measured):
        cells = {
            row["tokens"]: _output_cell(row)
            for row in measured
            if (row["backend"], tuple(row["outputs"])) == (backend, outputs)
        }
        table.append((backend, ", ".join(outputs) or "none", *(cells.get(n, "-") for n in lengths)))
    note = "Time of the forward with the outputs over that without, and the goal for it."
    return f"## Outputs\n{note}\n\n" + _table(("backend", "outputs", *(f"N = {n}" for n in lengths)), table)


def _output_cell(row: Row) -> str:
    if row["ratio"] is None:
        return "-"
    goal = "" if row["goal"] is None else f" (goal {row['goal']:.2f})"
    return f"{row['ratio']:.2f}{goal}"


def _norms(rows: Sequence[Row]) -> str:
    """One table for each norm and mode: contenders down, widths across."""
    raced = _of(rows, "residual_norm")
    if not raced:
        return ""
    parts = [f"## Residual norms\n{_NORMS_LEGEND}"]
    for norm, mode, dtype in dict.fromkeys((row["norm"], row["mode"], row["dtype"]) for row in raced):
        its = [row for row in raced if (row["norm"], row["mode"], row["dtype"]) == (norm, mode, dtype)]
        widths = _in_order(its, "channels")
        table = []
        for variant in _in_order(its, "variant"):
            by_width = {row["channels"]: row for row in its if row["variant"] == variant}
            table.append((variant, *(_norm_cell(by_width.get(width)) for width in widths)))
        headings = ("", *(f"C = {width}" for width in widths))
        timed = [cells for cells in table if set(cells[1:]) != {"-"}]
        if timed:
            size = f"{its[0]['batch']} x {its[0]['tokens']}"
            parts.append(f"### {norm}, {mode}, {dtype}, {size} tokens\n" + _table(headings, timed))
    return "\n\n".join(parts)


def _norm_cell(row: Row | None) -> str:
    if row is None or row["median_ms"] is None:
        return "FAIL" if row is not None and row["failed"] else "-"
    figures = [f"{1e3 * row['median_ms']:.3g} µs", f"{row['gbps']:.0f} GB/s", f"{row['copy_fraction']:.0%}"]
    if row["speedup"] is not None:
        figures.append(f"{row['speedup']:.2f}x")
    wrong = any(not error["passed"] for error in row["errors"].values())
    return ", ".join(figures) + (" FAIL" if wrong else "")


def _models(rows: Sequence[Row]) -> str:
    models = _of(rows, "model")
    table = [
        (
            row["model"],
            row["mode"],
            "compiled" if row["compiled"] else "eager",
            row["attention"],
            row["batch"],
            row["tokens"],
            f"{row['median_ms']:.3g}",
            f"{row['images_per_s']:.0f}",
            "" if row["speedup"] is None else f"{row['speedup']:.2f}x",
            row["goal"] and f"{row['goal']:.2f}x",
            "FAIL" if any(not error["passed"] for error in (row["errors"] or {}).values()) else "",
        )
        for row in models
        if row["median_ms"] is not None
    ]
    headings = ("model", "mode", "", "attention", "batch", "tokens", "ms", "images/s", "speed-up", "goal", "")
    return "## Whole models\n" + _table(headings, table) if table else ""


def _tiles(rows: Sequence[Row]) -> str:
    """What a sweep found, a kernel and a size a line, and under them the tiles that were faster and wrong."""
    swept = _of(rows, "tuning")
    table = [
        (
            row["kernel"],
            row["size"],
            ", ".join(map(str, row["tokens"])),
            "; ".join(dict.fromkeys(_shape(tiles) for tiles in row["rule"] or ())),
            row["best"] and _shape(row["best"]),
            "" if row["speedup"] is None else f"{row['speedup']:.2f}x",
            f"{row['timed']} of {row['timed'] + row['left_out']}",
            f"FAIL {row['reason']}" if row["failed"] else row["reason"],
        )
        for row in swept
    ]
    headings = ("kernel", "size", "N", "tiles", "better tiles", "speed-up", "timed", "")
    wrong = "\n".join(f"- {row['kernel']}, {row['size']}: {tiles}" for row in swept for tiles in row["wrong"])
    wrong = wrong and "Faster, but wrong:\n" + wrong
    return "\n\n".join(filter(None, ("## Tiles\n" + _table(headings, table), wrong))) if table else ""


def _shape(tiles: dict[str, Any]) -> str:
    whole_head = ", whole head" if tiles["whole_head"] else ""
    return (
        f"{tiles['block_m']} x {tiles['block_n']}, {tiles['num_warps']} warps, {tiles['num_stages']} stages{whole_head}"
    )


def _refusals(rows: Sequence[Row]) -> str:
    """Who was not timed, in how many of their cases, in their own words."""
    lines = []
    for kind, field, what in (
        ("race", "variant", "cases"),
        ("outputs", "backend", "calls"),
        ("residual_norm", "variant", "norms"),
        ("model", "attention", "models"),
    ):
        its = _of(rows, kind)
        counts = Counter(
            (row[field], row["failed"], row["reason"].partition("\n")[0]) for row in its if row["reason"] is not None
        )
        of = Counter(row[field] for row in its)
        lines += [
            f"- {name}, {count} of {of[name]} {what}: {'FAIL ' if failed else ''}{reason}"
            for (name, failed, reason), count in counts.items()
        ]
    return "## Not timed\n" + "\n".join(lines) if lines else ""


def _stages(rows: Sequence[Row]) -> str:
    its = _of(rows, "stage")
    last = {row["stage"]: row for row in its}
    table = [
        (
            row["stage"],
            "cut" if row["seconds"] is None else f"{row['seconds']:.0f}",
            "unknown" if row["unfinished"] is None else row["unfinished"],
            row["error"],
        )
        for row in its
        if row["seconds"] is not None or row is last[row["stage"]]  # not how one began that also ended
    ]
    return "## Stages\n" + _table(("stage", "seconds", "unfinished", "stopped by"), table) if table else ""


def _bars(axes: Axes, raced: Sequence[Row], mode: str) -> None:
    import matplotlib

    panel = [row for row in raced if row["mode"] == mode]
    lengths = sorted(_in_order(panel, "tokens"))
    width = _BAR_GROUP / max(len(_in_order(raced, "variant")), 1)
    place = width / 2 - _BAR_GROUP / 2
    for ours, colours in ((True, "Reds"), (False, "Blues")):
        names = _in_order([row for row in raced if row["ours"] is ours], "variant")
        shades = matplotlib.colormaps[colours]([0.8 - 0.5 * i / len(names) for i in range(len(names))])
        for name, colour in zip(names, shades, strict=True):
            bars = [row for row in panel if row["variant"] == name]
            at = [lengths.index(row["tokens"]) + place for row in bars]
            axes.bar(at, [row["tflops"] for row in bars], width, color=colour, label=name)
            place += width
    for index, tokens in enumerate(lengths):
        ceiling = next((_ceiling(row) for row in panel if row["tokens"] == tokens and row["roofline_ns"]), None)
        if ceiling is not None:
            ends = (index - _BAR_GROUP / 2, index + _BAR_GROUP / 2)
            axes.hlines(ceiling, *ends, color="black", linestyle="--", linewidth=1, label="roofline")
    axes.set_xticks(range(len(lengths)), [str(n) for n in lengths])
    axes.set(title=mode, xlabel="tokens", ylabel="useful TFLOP/s")


def _ceiling(row: Row) -> float:
    """Useful TFLOP/s on the roofline; FLOPs a ns are GFLOP/s."""
    return row["flops"] / (row["roofline_ns"] * row["batch"] * row["heads"]) / 1e3


def _pictured(rows: Sequence[Row]) -> list[Row]:
    """The packed races of one dtype and head dim: bf16 and 64, if one of ours ran there."""
    packed = [row for row in _raced(rows) if row["layout"] == "packed"]
    ran = {(row["dtype"], row["head_dim"]) for row in packed if row["ours"]}
    shown = min(ran, key=lambda key: (key[0] != "bf16", key[1] != 64, key), default=None)
    return [row for row in packed if (row["dtype"], row["head_dim"]) == shown]


def _raced(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["kind"] == "race" and row["median_ms"] is not None]


def _of(rows: Sequence[Row], kind: str) -> list[Row]:
    return [row for row in rows if row["kind"] == kind]


def _in_order(rows: Sequence[Row], field: str) -> list:
    return list(dict.fromkeys(row[field] for row in rows))


def _table(headings: Sequence[Any], lines: Sequence[Sequence[Any]]) -> str:
    def line(cells: Iterable[Any]) -> str:
        return "| " + " | ".join("" if cell is None else str(cell).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join((line(headings), "|" + "---|" * len(headings), *map(line, lines)))


def _ns(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _is_gpu_run(path: Path) -> bool:
    """Whether ``make gpu`` wrote the file; its folder holds other kinds too, and some are not of races at all."""
    return json.loads(path.read_text()).get("run") == {"command": "gpu"}
