"""transformers' Trainer on this library's kernels, token norms logged with the loss: ``python examples/hf_trainer.py``.

It needs transformers, accelerate and what ``train.py`` beside it needs, whose digits are learnt here too.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from train import digits
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    EvalPrediction,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from vitreg_kernels import TokenNormMonitor, patch
from vitreg_kernels.monitor import CsvWriter


class NormLog(TrainerCallback):
    """Writes the token norms since the log before into a CSV file whenever the Trainer logs."""

    def __init__(self, monitor: TokenNormMonitor, path: Path) -> None:
        self.monitor, self.writer = monitor, CsvWriter(path)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Here, not in ``on_log``: an evaluation logs too, after its own tokens were counted."""
        if control.should_log:
            norms = self.monitor.compute(all_reduce=args.world_size > 1)
            if state.is_world_process_zero:
                self.writer.write(state.global_step, norms)
            self.monitor.reset()


def collate(batch: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The model's arguments."""
    images, labels = zip(*batch, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.stack(labels)}


def told_right(found: EvalPrediction) -> dict[str, float]:
    """The share of the images that are told right."""
    return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Train, and return what the evaluation in the end found."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", type=Path, default=Path("hf-output"))
    args = parser.parse_args(argv)

    set_seed(0)
    learnt, held_out, classes = digits(16)
    sizes = {"image_size": 16, "patch_size": 4, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2}
    model = Dinov2WithRegistersForImageClassification(Dinov2WithRegistersConfig(**sizes, num_labels=classes))
    print(patch(model))  # or, after register_transformers(), from_pretrained(..., attn_implementation="vitreg")
    monitor = TokenNormMonitor(model)

    args.output.mkdir(parents=True, exist_ok=True)
    training = TrainingArguments(
        output_dir=str(args.output),
        max_steps=args.steps,
        per_device_train_batch_size=64,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=args.steps // 10,
        logging_steps=25,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,  # the data set gives pairs, which ``collate`` names
        report_to="none",
    )
    trainer = Trainer(
        model,
        training,
        train_dataset=learnt,
        eval_dataset=held_out,
        data_collator=collate,
        compute_metrics=told_right,
        callbacks=[NormLog(monitor, args.output / "norms.csv")],
    )
    trainer.train()
    found = trainer.evaluate()
    print(f"{found['eval_accuracy']:.1%} of {len(held_out)} images held out are told right")
    return found


if __name__ == "__main__":
    main()
