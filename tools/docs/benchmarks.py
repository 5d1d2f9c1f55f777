"""The tables of ``docs/benchmarks.md``, each made of the result files that are committed, and of nothing else."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import machine
from benchmarks.gpu import report

Row = dict[str, Any]

# The default backend of a CPU, by its name and by that of before 2026-11-26.
_CPU = ("cpu", "native")
_COMMANDS = {
    "bench": "make bench",
    "patched": "python -m benchmarks.patched",
    "analysis": "python -m benchmarks.analysis",
    "gpu": "make gpu",
}


_FIGURE = re.compile(r"[-+]?\d|$")


class Run(NamedTuple):
    """A result file."""

    path: Path
    command: str
    rows: list[Row]

    @property
    def label(self) -> str:
        """Machine, date, commit, command and file, in one line."""
        about = self.rows[0]["machine"]
        date = re.search(r"\d{4}-\d\d-\d\d", self.path.name)
        commit = f"commit `{about['commit'][:12]}`" + (" with changes" if about["dirty"] else "")
        device = f"**{about['device']}, {about['capability']}**"
        packages = about["packages"]
        parts = [device, *([date[0]] if date else []), f"torch {packages['torch']}", commit, f"`{self.command}`"]
        return f"{', '.join(parts)}: {link(self.path)}"

    def of(self, kind: str) -> list[Row]:
        """Its rows of a kind that were measured."""
        return [row for row in self.rows if row["kind"] == kind and row.get("reason") is None]


def link(path: Path) -> str:
    """To a result file, as from the page."""
    return f"[{path.name}](../{path.relative_to(machine.ROOT).as_posix()})"


def blocks() -> dict[str, str]:
    """The parts of the page by name."""
    paths = report.committed()
    runs = [run for path in paths if (run := _run(path))]
    bench = [run for run in runs if run.command.startswith("make bench")]
    return {
        "GPU results": report.summary(paths),
        "attention": _each(bench, _attention),
        "residual norms": _each(bench, _residual_norms),
        "timm models": _each(bench, _end_to_end),
        "patched models": _each([run for run in runs if run.command.endswith("patched")], _patched),
        "a pretrained model": _each(bench, _features),
        "monitor": _each(bench, _monitor),
        "cost of a call": _each(bench, _host_cost),
        "odd lengths": _each(bench, _lengths),
        "analyses": _each([run for run in runs if run.command.endswith("analysis")], _analysis),
        "training": "\n\n".join(map(_training, paths)),
    }


def _run(path: Path) -> Run | None:
    document = json.loads(path.read_text())
    if "rows" not in document:
        return None
    asked = document["run"]
    full = " FULL=1" if asked.get("size") == "full" else ""
    return Run(path, _COMMANDS.get(asked["command"], asked["command"]) + full, document["rows"])


def _each(runs: Iterable[Run], tell: Callable[[Run], str]) -> str:
    """What there is to tell of each run, the newest first."""
    told = [(run, tell(run)) for run in sorted(runs, key=lambda run: run.path.name.split("-20")[-1], reverse=True)]
    return "\n\n".join(f"{run.label}\n\n{text}" for run, text in told if text)


def _attention(run: Run) -> str:
    rows = run.of("attention")
    ours = [row for row in rows if row["variant"].removeprefix("vitreg:") in _CPU]
    peers = Counter(row["best_peer"] for row in ours)
    threads = sorted({row["threads"] for row in ours}, reverse=True)
    parts = []
    for count in threads:
        its = [row for row in ours if row["threads"] == count]
        heading = f"on {count} thread{'s' if count > 1 else ''}"
        parts.append(_grid(its, heading, ("dtype", "mode"), "tokens", lambda row: _mark(row, _times(row["speedup"]))))
    parts.append(
        _grid(
            [row for row in ours if row["threads"] == threads[0]],
            f"GFLOP/s, on {threads[0]} threads",
            ("dtype", "mode"),
            "tokens",
            lambda row: f"{row['gflops']:.0f}, {row['peak_fraction']:.0%}",
        )
    )
    fastest = ", ".join(f"{name} ({count})" for name, count in peers.most_common())
    return "\n\n".join([*parts, f"Fastest peers, and of how many cells: {fastest}."])


def _residual_norms(run: Run) -> str:
    ours = [row for row in run.of("residual_norm") if row["variant"].removeprefix("vitreg:") in _CPU]
    return _grid(
        ours,
        "",
        ("dtype", "mode", "memory"),
        "channels",
        lambda row: _mark(row, f"{_times(row['speedup'])}, {row['copy_fraction']:.0%}"),
    )


def _end_to_end(run: Run) -> str:
    table = []
    for row in run.of("end_to_end"):
        if row["attention"].removeprefix("vitreg:") in _CPU:
            way = "compiled" if row["compiled"] else "eager"
            ms = row["median_ms"]
            cells = (row["model"], row["dtype"], way, f"{ms * row['speedup']:.0f}", f"{ms:.0f}")
            table.append((*cells, _mark(row, _times(row["speedup"]))))
    return _table(("model", "", "", "timm's own, ms", "ours, ms", "times as fast"), table)


def _patched(run: Run) -> str:
    rows = run.of("patched")
    table = []
    for model, dtype, mode in dict.fromkeys((row["model"], row["dtype"], row["mode"]) for row in rows):
        by_way = {row["way"]: row for row in rows if (row["model"], row["dtype"], row["mode"]) == (model, dtype, mode)}
        own = by_way["unpatched"]
        ways = (_mark(row, _times(row["speedup"])) for way in ("attention", "block") if (row := by_way[way]))
        table.append((model, dtype, mode, f"{own['median_ms']:.0f}", *ways, own["samples"]))
    headings = ("model", "", "", "unpatched, ms", "attention", "block", "samples")
    return _table(headings, table)


def _features(run: Run) -> str:
    table = [
        (
            f"{row['image_size']} px, N = {row['tokens']}",
            row["dtype"],
            row["backend"] + ("*" if row["default"] else ""),
            f"{row['median_ms']:.1f}",
            _times(row["speedup"]),
            *(
                f"{row['errors'][name]['max']:.1e} ({row['errors'][name]['eager_max']:.1e})"
                for name in ("features", "prefix_attention")
            ),
        )
        for row in run.of("features")
    ]
    return _table(("images", "", "backend", "ms an image", "times as fast", "features", "prefix attention"), table)


def _monitor(run: Run) -> str:
    table = [
        (
            row["source"],
            f"{row['batch']} x {row['tokens']}",
            f"{row['step_ms']:.0f}",
            f"{row['overhead']:+.2%}",
            f"{row['overhead_p20']:+.2%} to {row['overhead_p80']:+.2%}",
            row["rounds"],
        )
        for row in run.of("monitor")
    ]
    return _table(("counting", "tokens", "step, ms", "median", "p20-p80", "rounds"), table)


def _host_cost(run: Run) -> str:
    table = [
        (
            f"`{row['call']}`",
            "with gradients" if row["requires_grad"] else "without",
            f"{row['ours_us']:.1f}",
            f"{row['raw_us']:.1f}",
            f"{row['overhead_us']:.1f}",
        )
        for row in run.of("overhead")
    ]
    return _table(("function", "", "µs", "backend alone, µs", "difference, µs"), table)


def _lengths(run: Run) -> str:
    table = [
        (
            f"{row['tokens']} / {row['next_tokens']}",
            row["dtype"],
            row["variant"],
            f"{row['gflops']:.0f} / {row['next_gflops']:.0f}",
            f"{row['excess']:+.1%}",
            f"{row['excess_p20']:+.1%} to {row['excess_p80']:+.1%}",
        )
        for row in run.of("lengths")
    ]
    return _table(("tokens", "", "", "GFLOP/s", "median", "p20-p80"), table)


def _analysis(run: Run) -> str:
    table = [
        (
            {"record": "`analysis.record`"}.get(row["way"], f"timm's `{row['way']}`"),
            f"{row['median_ms']:.0f}",
            f"{row['p20_ms']:.0f}-{row['p80_ms']:.0f}",
            f"{row['peak_memory_bytes'] / 2**20:.0f}",
            row["samples"],
        )
        for row in run.of("analysis")
    ]
    first = run.of("analysis")[0]
    size = f"{first['model']}, {first['batch']} images, N = {first['tokens']}"
    return f"{size}.\n\n" + _table(("way", "ms", "p20-p80", "peak memory, MiB", "samples"), table)


def _training(path: Path) -> str:
    document = json.loads(path.read_text())
    if "accuracy" not in document:
        return ""
    run = Run(path, "python -m benchmarks.training", [document])
    table = [(document["steps"], f"{document['loss']:.3f}", f"{document['accuracy']:.1%} of {document['held_out']}")]
    return f"{run.label}\n\n" + _table(("steps", "loss at the end", "right of those held out"), table)


def _grid(rows: Sequence[Row], heading: str, down: tuple[str, ...], across: str, cell: Callable[[Row], str]) -> str:
    """A table with a row for each value of ``down`` and a column for each of ``across``."""
    columns = sorted({row[across] for row in rows})
    symbol = {"tokens": "N", "channels": "C"}[across]
    table = []
    for key in dict.fromkeys(tuple(row[name] for name in down) for row in rows):
        its = {row[across]: cell(row) for row in rows if tuple(row[name] for name in down) == key}
        table.append((" ".join(key), *(its.get(column, "") for column in columns)))
    return _table((heading, *(f"{symbol} = {column}" for column in columns)), table)


def _times(speedup: float) -> str:
    return f"{speedup:.2f}"


def _mark(row: Row, text: str) -> str:
    """With FAIL where the accuracy rule is broken."""
    return text if all(error["passed"] for error in (row["errors"] or {}).values()) else f"{text} FAIL"


def _table(headings: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    if not rows:
        return ""
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in (headings, *rows)]
    # Figures to the right, by which the style sheet also knows not to break them.
    figures = [index > 0 and all(_FIGURE.match(str(row[index])) for row in rows) for index in range(len(headings))]
    rule = "|" + "".join("---:|" if right else "---|" for right in figures)
    return "\n".join([lines[0], rule, *lines[1:]])
