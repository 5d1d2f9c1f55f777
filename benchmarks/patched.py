"""Other libraries' models patched against unpatched, end to end on a CPU: ``python -m benchmarks.patched``.

Each model has random weights in which attention matters. It is timed as it is, with its attention patched, and with its
blocks patched, in turns: forward, and a training step, which is forward and backward. The features of the first and the
last image are held against the model's own in fp64. Rows are written as they come, and a cut run is gone on with.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import os
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import machine, results
from benchmarks.machine import Machine
from benchmarks.report import number
from benchmarks.results import Errors, Row, Writer
from benchmarks.shapes import DTYPES, DType
from benchmarks.timm_vits import first_and_last, import_timm, sharpened
from vitreg_kernels import patch
from vitreg_kernels.measure import timing
from vitreg_kernels.measure.accuracy import compare

Mode = Literal["forward", "step"]
Way = Literal["unpatched", "attention", "block"]
_BATCH = 8
_COLUMNS = "{:<34} {:<5} {:<8} {:<15} {:>9} {:>13} {:>6}  {}"


class PatchedRow(results.HostTime):
    """One model in one way."""

    kind: Literal["patched"]
    model: str
    way: Way  # "unpatched", or the level it is patched at
    backend: str  # of what was patched; empty of the unpatched one
    dtype: DType  # of weights and images
    mode: Mode  # a step is forward and backward
    batch: int  # images
    tokens: int
    median_ms: float
    p20_ms: float
    p80_ms: float
    samples: int
    speedup: float  # the unpatched model's median / this one
    errors: dict[str, Errors]  # "features", all tokens of the first and the last image
    machine: Machine


results.ROW_TYPES["patched"] = PatchedRow


class Model(NamedTuple):
    """A model of somebody's.

    Attributes:
        name: what it is called here.
        build: makes it, its attention by ``scaled_dot_product_attention``.
        terms: the longest sum of the network, the MLP's hidden width.
    """

    name: str
    build: Callable[[], nn.Module]
    terms: int = 1536


def _timm(name: str) -> nn.Module:
    return import_timm().create_model(name, img_size=224, num_classes=0)


def _transformers(name: str, **options: Any) -> nn.Module:
    import_timm()  # torchvision beside a CPU torch, which transformers imports too
    import transformers

    config = getattr(transformers, f"{name}Config")(
        hidden_size=384, num_attention_heads=6, image_size=224, attn_implementation="sdpa", **options
    )
    return getattr(transformers, f"{name}Model")(config)


MODELS = (
    Model("timm vit_small_patch14_reg4_dinov2", partial(_timm, "vit_small_patch14_reg4_dinov2")),
    Model("timm vit_small_patch16_dinov3", partial(_timm, "vit_small_patch16_dinov3")),
    Model(
        "transformers Dinov2WithRegisters",
        partial(_transformers, "Dinov2WithRegisters", patch_size=14, num_register_tokens=4),
    ),
    Model(
        "transformers DINOv3ViT",
        partial(_transformers, "DINOv3ViT", patch_size=16, num_register_tokens=4, intermediate_size=1536),
    ),
)


def features(module: nn.Module, images: Tensor) -> Tensor:
    """``[B, N, C]``."""
    if hasattr(module, "forward_features"):
        return module.forward_features(images)
    return module(images).last_hidden_state


def step(module: nn.Module, images: Tensor) -> None:
    """Forward and backward of a training step."""
    module.zero_grad()
    features(module, images).float().square().mean().backward()


_CALLS: dict[Mode, Callable[[nn.Module, Tensor], object]] = {"forward": torch.inference_mode()(features), "step": step}


def race(model: Model, dtype: DType, mode: Mode, budget_s: float) -> list[Row]:
    """A row for the unpatched model, and one for each level it is patched at; without their ``machine``."""
    torch.manual_seed(0)
    own = sharpened(model.build()).to(DTYPES[dtype]).eval()
    images = torch.randn(_BATCH, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    few = first_and_last(images)
    with torch.inference_mode():
        exact, eager = features(copy.deepcopy(own).double(), few.double()), features(own, few)
    ways: dict[Way, nn.Module] = {"unpatched": own}
    backends: dict[Way, str] = {"unpatched": ""}
    for level in ("attention", "block"):
        ways[level] = copy.deepcopy(own, {id(p): p for p in own.parameters()})
        report = patch(ways[level], level=level, strict=True)
        backends[level] = report.patched[-1].backend.partition(" (")[0]
    for module in ways.values():
        module.train(mode == "step")
    timings = timing.interleave(
        {way: timing.Variant(partial(_CALLS[mode], module)) for way, module in ways.items()},
        [images],  # no copies: every call reads all the weights, which are larger than a cache
        device=images.device,
        budget_s=budget_s,
    )
    rows = []
    for way, module in ways.items():
        with torch.inference_mode():
            found = compare(features(module.eval(), few), exact, eager, terms=model.terms)
        rows.append(
            {
                "kind": "patched",
                "model": model.name,
                "way": way,
                "backend": backends[way],
                "dtype": dtype,
                "mode": mode,
                "batch": _BATCH,
                "tokens": exact.shape[1],
                **results.timed(timings[way]),
                "speedup": timings["unpatched"].median_ms / timings[way].median_ms,
                "errors": {"features": results.errors(found)},
            }
        )
    return rows


def line(row: Row) -> str:
    """A row as text."""
    way = f"{row['way']}{row['backend'] and ', ' + row['backend']}"
    times = f"{number(row['median_ms'])} ms", f"{number(row['p20_ms'])}-{number(row['p80_ms'])}"
    error = row["errors"]["features"]
    errors = f"{error['max']:.1e} ({error['eager_max']:.1e}){'' if error['passed'] else '  FAIL'}"
    return _COLUMNS.format(row["model"], row["dtype"], row["mode"], way, *times, f"x {row['speedup']:.2f}", errors)


def main() -> int:
    """Race all; the exit status is 1 if a patched model breaks the accuracy rule."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.patched", description=__doc__.partition("\n")[0])
    parser.add_argument("--budget", type=float, default=20.0, metavar="SECONDS", help="of timing a race")
    parser.add_argument("--fresh", action="store_true", help="begin a new file, do not go on from a cut run")
    asked = parser.parse_args()
    here = machine.describe(torch.device("cpu"))
    run = {"command": "patched", "budget": str(asked.budget)}
    writer = Writer(results.default_path(here, "-patched"), run, here, fresh=asked.fresh)
    print(_COLUMNS.format("model", "dtype", "mode", "way", "median", "p20-p80", "", "error (own error)"))
    for dtype, model, mode in itertools.product(("fp32", "bf16"), MODELS, _CALLS):
        done = writer.find(kind="patched", model=model.name, dtype=dtype, mode=mode)
        for row in done or writer.extend(race(model, dtype, mode, asked.budget)):
            print(line(row), flush=True)
    writer.finish()
    print(os.path.relpath(writer.path))
    return 0 if all(row["errors"]["features"]["passed"] for row in writer.rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
