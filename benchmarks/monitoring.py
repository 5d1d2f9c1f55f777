"""What a TokenNormMonitor costs a training step of a ViT-S/14: rounds of steps, monitored and not, side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal, TypedDict

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import machine, results
from benchmarks.attention import Progress
from benchmarks.machine import Machine
from benchmarks.results import Row, Writer
from benchmarks.shapes import Size
from vitreg_kernels import RegisterViT, TokenNormMonitor
from vitreg_kernels.measure import timing

GOAL = 0.01
PRESET = "vit_small_patch14"
# Images of 224 px a step, and rounds of three steps.
_SIZES: dict[Size, tuple[int, int]] = {"quick": (4, 10), "full": (16, 30)}


class MonitorRow(TypedDict):
    """A way of monitoring: how much longer a monitored step takes than the unmonitored one of its round."""

    kind: Literal["monitor"]
    model: str
    source: str  # what the norms are taken from
    batch: int  # images
    tokens: int
    step_ms: float  # median of a step without a monitor
    overhead: float  # median over rounds of (monitored / not) - 1
    overhead_p20: float
    overhead_p80: float
    rounds: int
    goal: float
    machine: Machine


results.ROW_TYPES["monitor"] = MonitorRow


def run(size: Size, writer: Writer, progress: Progress, device: torch.device | None = None) -> Iterator[Row]:
    """Measures both ways of monitoring and yields their rows once they are written; a cut run's as they stand."""
    batch, rounds = _SIZES[size]
    progress(0, 1, f"monitored training steps of {PRESET}, {batch} images")
    yield from writer.find(kind="monitor") or writer.extend(
        measure(RegisterViT.preset(PRESET), batch, rounds, device or machine.default_device())
    )
    progress(1, 1, "")


def measure(vit: RegisterViT, batch: int, rounds: int, device: torch.device) -> list[Row]:
    """A row for norms that the fused ops give anyway, and one for reading a ``[B, N, C]`` of each block once more."""
    vit = vit.to(device).train()
    layers = [(f"blocks.{i}.mlp", block.mlp) for i, block in enumerate(vit.blocks)]
    monitors = {
        "the fused norms": partial(TokenNormMonitor, vit),
        # What it costs in a model of another library, where a layer's output is read once more: as much is read here.
        "the layers' outputs": partial(TokenNormMonitor, vit, layers=layers),
    }
    variants = {name: timing.Variant(_step(vit), context=monitor) for name, monitor in monitors.items()}
    variants["none"] = timing.Variant(_step(vit))
    height, width = (side * vit.config.patch_size for side in vit.config.grid)
    images = torch.randn(batch, 3, height, width, device=device)
    timed = timing.in_rounds(variants, images, device=device, rounds=rounds)
    rows = []
    for source in monitors:
        overheads = np.divide(timed[source], timed["none"]) - 1
        p20, median, p80 = np.percentile(overheads, (20, 50, 80)).tolist()
        rows.append(
            {
                "kind": "monitor",
                "model": PRESET,
                "source": source,
                "batch": batch,
                "tokens": vit.layout.num_prefix_tokens + math.prod(vit.config.grid),
                "step_ms": np.median(timed["none"]).item(),
                "overhead": median,
                "overhead_p20": p20,
                "overhead_p80": p80,
                "rounds": rounds,
                "goal": GOAL,
            }
        )
    return rows


def table(rows: Sequence[Row]) -> str:
    """The monitor's rows as text."""
    rows = [row for row in rows if row["kind"] == "monitor"]
    if not rows:
        return ""
    first = rows[0]
    lines = [
        f"TokenNormMonitor in a training step of {first['model']} ({first['batch']} x {first['tokens']} tokens, "
        f"{first['step_ms']:.0f} ms), median of {first['rounds']} rounds and p20-p80 (goal: {first['goal']:.0%})"
    ]
    for row in rows:
        spread = f"{row['overhead_p20']:+.2%} to {row['overhead_p80']:+.2%}"
        verdict = "" if row["overhead"] <= row["goal"] else "  ABOVE THE GOAL"
        lines.append(f"  counting {row['source']:<24}{row['overhead']:+8.2%}    {spread}{verdict}")
    return "\n".join(lines)


def _step(vit: RegisterViT) -> Callable[[torch.Tensor], None]:
    optimizer = torch.optim.AdamW(vit.parameters())

    def step(images: torch.Tensor) -> None:
        features = vit(images)
        loss = F.mse_loss(features.cls, torch.zeros_like(features.cls)) + features.patches.square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
