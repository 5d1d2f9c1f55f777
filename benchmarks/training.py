"""A small ViT with registers learns handwritten digits, its token norms monitored: ``python -m benchmarks.training``.

The digits are those inside scikit-learn, 1,797 real scans of 8 x 8 pixels, which make 16 patches; a fifth is held out.
Leaves in a folder ``training.csv``, the norms of every layer and group by step, ``training.png``, their picture, and
``training.json``, how it ended and on which machine.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import machine, results
from vitreg_kernels import NormReport, RegisterViT, TokenNormMonitor, ViTConfig
from vitreg_kernels.monitor import CsvWriter, read_csv
from vitreg_kernels.monitor.plot import draw

CONFIG = ViTConfig(image_size=8, patch_size=2, in_channels=1, dim=64, depth=6, num_heads=2, layer_scale=None)
_BATCH = 64
_LEARNING_RATE = 3e-3
_WARMUP_STEPS = 20


class Digits(NamedTuple):
    """Images ``[B, 1, 8, 8]`` fp32 in [-1, 1] and the digits ``[B]`` they show."""

    images: Tensor
    labels: Tensor


class Progress(NamedTuple):
    """What the steps since the last one gave.

    Attributes:
        step: how many steps there were.
        loss: mean cross entropy, in nats.
        norms: of all tokens of these steps.
    """

    step: int
    loss: float
    norms: NormReport


class Classifier(nn.Module):
    """A linear layer on the CLS token."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.vit = RegisterViT(config)
        self.head = nn.Linear(config.dim, 10)

    def forward(self, images: Tensor) -> Tensor:
        """``[B, 1, 8, 8]`` to logits ``[B, 10]``."""
        return self.head(self.vit(images).cls[:, 0])


def digits() -> tuple[Digits, Digits]:
    """What is learnt from, and what is held out."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float()[:, None] / 8.0 - 1.0
    labels = torch.from_numpy(bunch.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out, learnt = order.split((len(order) // 5, len(order) - len(order) // 5))
    return Digits(images[learnt], labels[learnt]), Digits(images[held_out], labels[held_out])


def train(model: Classifier, data: Digits, steps: int, *, report_every: int) -> Iterator[Progress]:
    """AdamW with a warm-up and a cosine; yields after every ``report_every`` steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=0.05)
    warm = min(_WARMUP_STEPS, steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    generator = torch.Generator().manual_seed(0)
    losses = []
    with TokenNormMonitor(model.vit) as monitor:
        for step in range(1, steps + 1):
            chosen = torch.randint(len(data.labels), (_BATCH,), generator=generator)
            loss = F.cross_entropy(model(data.images[chosen]), data.labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
            if step % report_every == 0:
                yield Progress(step, torch.stack(losses).mean().item(), monitor.compute())
                monitor.reset()
                losses.clear()


@torch.inference_mode()
def accuracy(model: Classifier, data: Digits) -> float:
    """Share of the digits that are told right."""
    return (model.eval()(data.images).argmax(-1) == data.labels).float().mean().item()


def main() -> None:
    """Trains, prints, and leaves the CSV file and the picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.partition(":")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--folder", type=Path, default=results.FOLDER)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    history, picture, result = (arguments.folder / f"training.{ending}" for ending in ("csv", "png", "json"))

    torch.manual_seed(0)
    model = Classifier(CONFIG)
    learnt, held_out = digits()
    print(f"{len(learnt.labels)} digits, {len(held_out.labels)} held out; {arguments.steps} steps of {_BATCH}")
    writer = CsvWriter(history)
    for progress in train(model, learnt, arguments.steps, report_every=max(1, arguments.steps // 15)):
        writer.write(progress.step, progress.norms)
        print(f"step {progress.step:4}  loss {progress.loss:.3f}", flush=True)
    print(f"\nToken norms of the last steps\n{progress.norms.table()}")
    ended = {"steps": arguments.steps, "loss": progress.loss, "accuracy": accuracy(model, held_out)}
    here = machine.describe(torch.device("cpu"))
    result.write_text(json.dumps({**ended, "held_out": len(held_out.labels), "machine": here}, indent=2) + "\n")
    print(f"\n{ended['accuracy']:.1%} of the digits held out are told right")
    draw(progress.norms, read_csv(history)).savefig(picture, dpi=150)
    print("\n".join(map(os.path.relpath, (history, picture, result))))


if __name__ == "__main__":
    main()
