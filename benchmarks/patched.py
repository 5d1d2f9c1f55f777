"""Other libraries' models patched against unpatched, end to end on a CPU: ``python -m benchmarks.patched``.

Each model has random weights in which attention matters. It is timed as it is, with its attention patched, and with its
blocks patched, in turns: forward, and a training step, which is forward and backward. The features of the first and the
last image are held against the model's own in fp64. Rows are printed, and written to a file, as they come.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import machine
from benchmarks.timm_vits import first_and_last, import_timm
from vitreg_kernels import patch
from vitreg_kernels.measure import timing
from vitreg_kernels.measure.accuracy import compare

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
UNPATCHED = "unpatched"
LEVELS = ("attention", "block")
_BATCH = 8
_COLUMNS = "{:<34} {:<5} {:<8} {:<15} {:>9} {:>15} {:>6}  {}"


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


def built(model: Model, dtype: torch.dtype) -> nn.Module:
    """The model with queries and keys of normal size and LayerScale of 1, or errors of attention would not be seen."""
    torch.manual_seed(0)
    module = model.build()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith(("qkv.weight", "q_proj.weight", "k_proj.weight", "query.weight", "key.weight")):
                parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5)
            elif name.endswith(("gamma", "gamma_1", "gamma_2", "lambda1")):
                parameter.fill_(1.0)
    return module.to(dtype).eval()


def features(module: nn.Module, images: Tensor) -> Tensor:
    """``[B, N, C]``."""
    if hasattr(module, "forward_features"):
        return module.forward_features(images)
    return module(images).last_hidden_state


@torch.inference_mode()
def forward(module: nn.Module, images: Tensor) -> None:
    """Features alone, without anything kept for a backward."""
    features(module, images)


def step(module: nn.Module, images: Tensor) -> None:
    """Forward and backward of a training step."""
    module.zero_grad()
    features(module, images).float().square().mean().backward()


def race(model: Model, dtype: str, mode: str, budget_s: float) -> list[dict[str, Any]]:
    """A row for the unpatched model, and one for each level it is patched at."""
    own = built(model, DTYPES[dtype])
    images = torch.randn(_BATCH, 3, 224, 224, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    few = first_and_last(images)
    with torch.inference_mode():
        exact, eager = features(copy.deepcopy(own).double(), few.double()), features(own, few)
    ways, backends = {UNPATCHED: own}, {UNPATCHED: ""}
    for level in LEVELS:
        ways[level] = copy.deepcopy(own, {id(p): p for p in own.parameters()})
        report = patch(ways[level], level=level, strict=True)
        backends[level] = report.patched[-1].backend.partition(" (")[0]
    call = {"forward": forward, "step": step}[mode]
    for module in ways.values():
        module.train(mode == "step")
    timings = timing.interleave(
        {name: timing.Variant(partial(call, module)) for name, module in ways.items()},
        [images],  # no copies: every call reads all the weights, which are larger than a cache
        device=images.device,
        budget_s=budget_s,
    )
    rows = []
    for name, module in ways.items():
        with torch.inference_mode():
            accuracy = compare(features(module.eval(), few), exact, eager, terms=model.terms)
        timed = timings[name]
        rows.append(
            {
                "model": model.name,
                "dtype": dtype,
                "mode": mode,
                "way": name,
                "backend": backends[name],
                "batch": _BATCH,
                "tokens": exact.shape[1],
                **{field: getattr(timed, field) for field in ("median_ms", "p20_ms", "p80_ms", "samples")},
                "speedup": timings[UNPATCHED].median_ms / timed.median_ms,
                "error": accuracy.max_error,
                "eager_error": accuracy.eager_max_error,
                "passed": accuracy.passed,
            }
        )
    return rows


def line(row: dict[str, Any]) -> str:
    """A row as text."""
    way = f"{row['way']}{row['backend'] and ', ' + row['backend']}"
    spread = f"{row['p20_ms']:.1f}-{row['p80_ms']:.1f}"
    error = f"{row['error']:.1e} ({row['eager_error']:.1e}){'' if row['passed'] else '  FAIL'}"
    times = f"{row['median_ms']:.1f} ms", spread, f"x {row['speedup']:.2f}"
    return _COLUMNS.format(row["model"], row["dtype"], row["mode"], way, *times, error)


def main() -> int:
    """Race all; the exit status is 1 if a patched model breaks the accuracy rule."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.patched", description=__doc__.partition("\n")[0])
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of timing a race")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/patched.json"))
    arguments = parser.parse_args()
    about = {"machine": machine.describe(), "date": time.strftime("%Y-%m-%d"), "rows": []}
    print(_COLUMNS.format("model", "dtype", "mode", "way", "median", "p20-p80", "", "error (own error)"))
    for model, dtype, mode in itertools.product(MODELS, DTYPES, ("forward", "step")):
        for row in race(model, dtype, mode, arguments.budget):
            about["rows"].append(row)
            print(line(row), flush=True)
        arguments.output.write_text(json.dumps(about, indent=1) + "\n")
    return 0 if all(row["passed"] for row in about["rows"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
