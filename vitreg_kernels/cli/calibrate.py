"""``vitreg calibrate``: the fastest right backend on this machine becomes the default, and a table says which."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor

from ..dispatch import calibration
from ..integrations import load_vit
from ..measure.calibrate import Calibration, Outcome, calibrate
from ..nn import RegisterViT
from .device import usable
from .table import markdown

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Those of the registers' paper and of its successors; of a batch that a GPU trains on, or a CPU serves.
_SHAPES = {
    "cuda": ((64, 16, 201, 64), (64, 16, 261, 64), (64, 16, 1029, 64)),
    "cpu": ((8, 12, 201, 64), (8, 12, 261, 64)),
}
_BATCH = {"cuda": 64, "cpu": 8}
_BAR = 24


def add_to(commands: argparse._SubParsersAction) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "calibrate",
        help="make the fastest backend that is right on this machine the default",
        description="Checks every backend on the calls named, races those that are right, and keeps the winners in "
        "the cache: VITREG_CACHE_DIR, or XDG_CACHE_HOME. What was not measured keeps its default.",
    )
    parser.add_argument(
        "--shape",
        action="append",
        metavar="B,H,N,D",
        help="batch, heads, tokens, head dim (may be repeated)",
    )
    parser.add_argument(
        "--model", metavar="timm:NAME|FILE", help="the calls of a model instead: timm's by name, or one load_vit reads"
    )
    parser.add_argument("--batch", type=int, help="images a batch, for --model (64 on a GPU, 8 on a CPU)")
    parser.add_argument("--dtype", choices=_DTYPES, help="bf16 on a GPU, fp32 on a CPU; a model's autocast")
    parser.add_argument("--rope", action="store_true", help="shapes whose patches are rotated")
    parser.add_argument("--mask", action="store_true", help="shapes whose keys are padded")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dry-run", action="store_true", help="measure, and write nothing")
    parser.add_argument("--clear", action="store_true", help="forget all that was measured")


def run(asked: argparse.Namespace) -> int:
    """What the command line asks for; the exit status is 2 if it cannot be done, 1 if a backend was wrong."""
    try:
        if asked.clear:
            removed = calibration.clear()
            print(f"removed {removed}" if removed else "nothing was calibrated")
            return 0
        done = _calibrate(asked)
    except BrokenPipeError:  # nobody reads on, which `cli.main` sees to
        raise
    except (ValueError, OSError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ncut; what was decided is kept", file=sys.stderr)
        return 130
    print(table(done))
    return 1 if any(outcome.wrong for outcome in done.outcomes) else 0


def table(done: Calibration) -> str:
    """Of each call: what it takes from now on, how far ahead that is, and its error beside that of eager torch."""
    rows = [("op", "call", "backend", "before", "x the next", "max error", "eager's", "")]
    for outcome in done.outcomes:
        error = outcome.errors.get(outcome.backend)
        rows.append(
            (
                outcome.subject.op.replace("_", " "),
                f"{outcome.subject}{', training' if outcome.gradients else ''}",
                outcome.backend,
                outcome.before,
                "" if outcome.lead is None else f"{outcome.lead:.2f}",
                "" if error is None else f"{error.max_error:.1e}",
                "" if error is None else f"{error.eager_max_error:.1e}",
                "" if outcome.decided else f"no change: {outcome.reason}",
            )
        )
    lines = [markdown(rows)]
    for outcome in done.outcomes:
        lines += [
            f"WRONG, and no default there any more: {name} on {outcome.subject.op}, {outcome.subject}: {what}"
            for name, what in outcome.wrong.items()
        ]
    decided = sum(outcome.decided for outcome in done.outcomes)
    where = f", in {done.file}" if done.file else ", nothing written"
    lines.append(f"{decided} of {len(done.outcomes)} decided{where}")
    return "\n".join(lines)


def calibrated() -> str:
    """What counts here of what was calibrated, for ``vitreg info``."""
    if calibration.path() is None:
        return "calibrated: turned off by VITREG_CALIBRATION=0"
    contents = calibration.read()
    lines = [_line(one) for one in contents.measurements]
    if contents.ignored:
        lines.append(f"  does not count: {contents.ignored}")
    if not lines:
        return "calibrated: nothing; `vitreg calibrate` takes a minute"
    return "\n".join([f"calibrated, in {calibration.path()}:", *lines])


def _line(one: calibration.Measurement) -> str:
    heads = f"{one.heads} {'heads' if one.op == 'attention' else 'images'}"
    kinds = [one.variant, *one.features, "training" if one.gradients else ""]
    call = ", ".join([f"{one.tokens} tokens", heads, one.dtype, *filter(None, kinds)])
    wrong = "".join(f", {name} was wrong" for name in one.wrong)
    return f"  {one.op}, {call}: {one.backend or 'nobody clearly fastest'}{wrong} ({one.date})"


def _calibrate(asked: argparse.Namespace) -> Calibration:
    device = usable(asked.device, "calibrate")
    dtype = None if asked.dtype is None else _DTYPES[asked.dtype]
    if asked.model is None:
        if asked.batch is not None:
            raise ValueError("--batch is of --model; a shape has its own")
        shapes = [_shape(text) for text in asked.shape or ()] or _SHAPES["cuda" if device.type == "cuda" else "cpu"]
        return calibrate(
            shapes,
            dtype=dtype,
            device=device,
            rope=asked.rope,
            mask=asked.mask,
            dry_run=asked.dry_run,
            progress=_progress,
        )
    if asked.shape or asked.rope or asked.mask:
        raise ValueError("--shape, --rope and --mask are of shapes; a model has its own")
    model, images = _model(asked.model, device, asked.batch or _BATCH["cuda" if device.type == "cuda" else "cpu"])
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        return calibrate(model, images, dry_run=asked.dry_run, progress=_progress)


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise ValueError(f"--shape takes B,H,N,D, four integers, not {text!r}") from None


def _model(name: str, device: torch.device, batch: int) -> tuple[RegisterViT, Tensor]:
    """The model, and a batch of images of the size that it was made for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights that are left out; only the sizes of the calls matter here
        if name.startswith("timm:"):
            try:
                import timm
            except ImportError as error:
                raise ValueError(f"--model timm:NAME needs timm, which cannot be imported: {error}") from error
            theirs = timm.create_model(name.removeprefix("timm:"), pretrained=False)
            heads = theirs.blocks[0].attn.num_heads
            model = load_vit(theirs.state_dict(), num_heads=heads, device=device)
        else:
            if not Path(name).exists():
                raise ValueError(f"--model takes timm:NAME, or a file or folder that load_vit reads; {name} is none")
            model = load_vit(name, device=device)
    size = model.config.image_size
    height, width = size if isinstance(size, tuple) else (size, size)
    return model, torch.zeros(batch, model.config.in_channels, height, width, device=device)


def _progress(done: int, of: int, outcome: Outcome | None) -> None:
    """A bar that is drawn anew on a terminal, and elsewhere a line for each call."""
    filled = _BAR * done // of
    what = "" if outcome is None else f"{outcome.subject.op}: {outcome.backend}"
    line = f"[{'#' * filled}{'.' * (_BAR - filled)}] {done}/{of} {what}"
    if sys.stderr.isatty():
        print(f"\r{line:<78}", end="\n" if done == of else "", file=sys.stderr, flush=True)
    else:
        print(line, file=sys.stderr, flush=True)
