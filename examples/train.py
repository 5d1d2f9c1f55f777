"""Train a Vision Transformer of timm's on this library's kernels, its token norms watched: a script to copy.

    python examples/train.py
    python examples/train.py --data IMAGES --model vit_base_patch16_reg4_gap_256 --img-size 256 --bf16 --compile
    torchrun --nproc-per-node 8 examples/train.py --data IMAGES --patch block --bf16 --parallel fsdp2

It needs timm, tqdm and matplotlib, and scikit-learn for its digits. ``--output`` gets ``checkpoint.pt``, ``norms.csv``,
the token norms of every layer by step, and ``norms.png``, their picture. ``--resume`` goes on as if nothing happened:
what is random follows from the seed and the step, so that no generator needs to be saved.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.utils import ParseKwargs
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from tqdm import tqdm

from vitreg_kernels import TokenNormMonitor, patch
from vitreg_kernels.monitor import CsvWriter, read_csv
from vitreg_kernels.monitor.plot import draw

# What is trained by default learns the digits within a minute on two cores.
SMALL = "vit_small_patch14_reg4_dinov2"
SMALL_KWARGS = {"patch_size": 4, "embed_dim": 128, "depth": 4, "num_heads": 2, "init_values": 1.0}
SAME = ("model", "model_kwargs", "img_size", "data", "steps", "batch_size", "lr", "seed")  # when a run is resumed
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # a checkpoint is of any number of processes


class Training(NamedTuple):
    """What changes by training, and what watches it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    monitor: TokenNormMonitor


class Stream(Dataset):
    """Pass after pass over a data set, each in an order of its own, by position since training began."""

    def __init__(self, data: Dataset, seed: int) -> None:
        self.data, self.seed = data, seed

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor | int]:
        passes, place = divmod(position, len(self.data))
        with torch.random.fork_rng(devices=[]):  # of what an augmentation draws
            torch.manual_seed(self.seed + position)
            return self.data[shuffled(len(self.data), self.seed + passes)[place]]


@functools.lru_cache(maxsize=2)
def shuffled(length: int, seed: int) -> list[int]:
    """The numbers below ``length`` in random order."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed)).tolist()


def digits(size: int) -> tuple[Dataset, Dataset, int]:
    """The 1,797 handwritten digits inside scikit-learn, a fifth of them held out; and the number of classes."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = F.interpolate(torch.from_numpy(bunch.images).float()[:, None] / 8 - 1, (size, size), mode="bilinear")
    data = TensorDataset(images.expand(-1, 3, -1, -1), torch.from_numpy(bunch.target))
    order, held_out = shuffled(len(data), 0), len(data) // 5
    return Subset(data, order[held_out:]), Subset(data, order[:held_out]), 10


def folders(root: str, size: int) -> tuple[Dataset, Dataset, int]:
    """One's own images, ``root/train/CLASS/*`` and ``root/val/CLASS/*``."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    tensor = [transforms.ToTensor(), transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)]
    random = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    center = [transforms.Resize(size * 8 // 7), transforms.CenterCrop(size)]
    learnt = ImageFolder(f"{root}/train", transforms.Compose(random + tensor))
    held_out = ImageFolder(f"{root}/val", transforms.Compose(center + tensor))
    return learnt, held_out, len(learnt.classes)


def loader(data: Dataset, indices: Sequence[int], args: argparse.Namespace) -> DataLoader:
    """This process's share of every batch, whose indices those are."""
    share, cuda = args.batch_size // args.world, args.device.type == "cuda"
    return DataLoader(data, share, sampler=indices, num_workers=args.workers, pin_memory=cuda)


def build(classes: int, args: argparse.Namespace) -> Training:
    """The model: patched, watched, compiled and spread over the processes, in this order."""
    torch.manual_seed(args.seed)  # the same weights in every process
    try:
        model = timm.create_model(args.model, num_classes=classes, img_size=args.img_size, **args.model_kwargs)
        model.to(args.device)
        report = "not patched" if args.patch == "off" else patch(model, level=args.patch)
        monitor = TokenNormMonitor(model)
    except (RuntimeError, TypeError, ValueError) as error:
        raise SystemExit(f"{args.model} cannot be trained here: {error}") from error
    if args.rank == 0:
        print(report)
    if args.compile:
        for block in model.blocks:  # they are alike, so that one graph serves all
            block.compile()
    if args.parallel == "ddp":
        model = DistributedDataParallel(model)
    elif args.parallel == "fsdp2":
        mesh = init_device_mesh(args.device.type, (args.world,))
        for part in (*model.blocks, model):
            fully_shard(part, mesh=mesh)
    return Training(model, torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05), monitor)


def autocast(args: argparse.Namespace) -> torch.autocast:
    """bf16 where it was asked for."""
    return torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16)


def over_processes(x: Tensor) -> Tensor:
    """The sum of every process's ``x``."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def train(training: Training, data: Dataset, done: int, args: argparse.Namespace) -> Iterator[tuple[int, Tensor]]:
    """The steps after the first ``done``; yields the number of each and its mean loss over this process's images."""
    model, optimizer, _ = training
    # Processes take turns, so that together they see in every step the images that one alone would.
    positions = range(done * args.batch_size + args.rank, args.steps * args.batch_size, args.world)
    bar = tqdm(loader(Stream(data, args.seed), positions, args), "training", unit="step", disable=args.rank > 0)
    model.train()
    for step, batch in enumerate(bar, done + 1):
        torch.manual_seed(args.seed + step * args.world + args.rank)  # for dropout and stochastic depth
        images, labels = (x.to(args.device, non_blocking=True).chunk(args.accumulate) for x in batch)
        loss = torch.zeros((), device=args.device)
        for i in range(args.accumulate):
            # The processes exchange gradients once a step, after its last piece.
            last = i == args.accumulate - 1
            if isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(last)
            with model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext():
                with autocast(args):
                    part = F.cross_entropy(model(images[i]), labels[i]) / args.accumulate
                part.backward()
            loss += part.detach()
        # A warm-up over the first tenth, then a cosine.
        rate = args.lr * min(10 * step / args.steps, 0.5 + 0.5 * math.cos(math.pi * (step - 1) / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        yield step, loss


@torch.no_grad()
def accuracy(model: nn.Module, data: Dataset, args: argparse.Namespace) -> float:
    """The share of the images that are told right."""
    model.eval()
    # FSDP2 wants every process to run equally often: the last ones may see an image again, which does not count.
    mine = torch.arange(args.rank, len(data) + -len(data) % args.world, args.world)
    right = torch.zeros((), device=args.device)
    seen = loader(data, (mine % len(data)).tolist(), args)
    for indices, (images, labels) in zip(mine.split(seen.batch_size), seen, strict=True):
        with autocast(args):
            told = model(images.to(args.device)).argmax(-1).cpu()
        right += ((told == labels) & (indices < len(data))).sum()
    return over_processes(right).item() / len(data)


def save(step: int, training: Training, args: argparse.Namespace) -> None:
    """All that the next steps depend on, in a file that is whole whenever the machine stops. Every process calls it."""
    model, optimizer, monitor = training
    weights, moments = get_state_dict(model, optimizer, options=WHOLE)
    norms = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in monitor.state_dict().items()}
    norms_by_rank = [norms] * args.world
    if dist.is_initialized():
        dist.all_gather_object(norms_by_rank, norms)
    if args.rank == 0:
        run = {name: getattr(args, name) for name in SAME}
        state = {"run": run, "step": step, "model": weights, "optimizer": moments, "norms": norms_by_rank}
        beside = args.checkpoint.with_suffix(".new")
        torch.save(state, beside)
        os.replace(beside, args.checkpoint)


def load(training: Training, args: argparse.Namespace) -> int:
    """Take up what was saved; returns after which step that was."""
    state = torch.load(args.checkpoint, map_location="cpu", weights_only=True)
    for name, was in state["run"].items():
        if was != (now := getattr(args, name)):
            raise SystemExit(f"{args.checkpoint} is of a run with {name}={was!r}, not {now!r}: it cannot be resumed so")
    if state["step"] >= args.steps:
        raise SystemExit(f"{args.checkpoint} is of the last step, {args.steps}: nothing is left to do")
    model, optimizer, monitor = training
    saved = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
    set_state_dict(model, optimizer, **saved, options=WHOLE)
    if len(state["norms"]) == args.world:
        monitor.load_state_dict(state["norms"][args.rank])
    elif args.rank == 0:
        print(f"{len(state['norms'])} processes had counted norms since the last report, which are left out")
    return state["step"]


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """What was asked for, and this process's place among all; ends with a sentence if it cannot be done."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    add = parser.add_argument
    add("--model", help=f"any ViT of timm's (default: a small {SMALL})")
    add(
        "--model-kwargs",
        nargs="*",
        action=ParseKwargs,
        default={},
        metavar="NAME=VALUE",
        help="such as drop_path_rate=0.1",
    )
    add("--img-size", type=int, help="(default: 16, or 224 for a model that was named)")
    add("--data", metavar="DIR", help="images, DIR/train/CLASS/* and DIR/val/CLASS/* (default: scikit-learn's digits)")
    add("--workers", type=int, default=0, help="processes that read images, for each that trains")
    add("--output", type=Path, default=Path("train-output"), metavar="DIR")
    add("--resume", action="store_true", help="go on from the checkpoint in --output")
    add("--steps", type=int, default=300)
    add("--batch-size", type=int, default=64, help="images a step, of all processes together")
    add("--accumulate", type=int, default=1, metavar="N", help="run a batch as N pieces, one after another")
    add("--lr", type=float, default=2e-3)
    add("--seed", type=int, default=0)
    add("--patch", choices=("off", "attention", "block"), default="attention")
    add("--bf16", action="store_true", help="autocast to bf16")
    add("--compile", action="store_true")
    add("--parallel", choices=("ddp", "fsdp2"), help="how the processes of torchrun share the work")
    add("--report-every", type=int, default=25, metavar="STEPS")
    add("--save-every", type=int, default=100, metavar="STEPS")
    try:
        args = parser.parse_args(argv)
    except ValueError:
        parser.error("--model-kwargs takes NAME=VALUE, with = and no spaces around it")
    args.rank, args.world = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
    cuda = torch.cuda.is_available()
    args.device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu")
    args.checkpoint = args.output / "checkpoint.pt"
    args.img_size = args.img_size or (224 if args.model else 16)
    if args.model is None:
        args.model, args.model_kwargs = SMALL, SMALL_KWARGS | args.model_kwargs

    def need(fine: object, otherwise: str) -> None:
        if not fine:
            parser.error(otherwise)

    for name in ("img_size", "steps", "batch_size", "accumulate", "report_every", "save_every"):
        need(getattr(args, name) >= 1, f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    pieces, there = args.world * args.accumulate, args.checkpoint.exists()
    need(
        args.batch_size % pieces == 0,
        f"--batch-size {args.batch_size} must be a multiple of processes x pieces, {pieces}",
    )
    need("RANK" in os.environ or not args.parallel, "--parallel needs torchrun --nproc-per-node N before this script")
    need(args.parallel or args.world == 1, "--parallel ddp or fsdp2 must say how torchrun's processes share the work")
    parts = [Path(args.data, part).is_dir() for part in ("train", "val") if args.data]
    need(all(parts), f"--data {args.data} must hold folders train and val, and these one for each class")
    need(there or not args.resume, f"there is no {args.checkpoint} to --resume")
    need(
        args.resume or not there, f"{args.checkpoint} is there: --resume goes on from it, another --output begins anew"
    )
    return args


def main(argv: Sequence[str] | None = None) -> tuple[dict[int, float], float]:
    """Train, report and save; returns the losses that were reported, by step, and the accuracy in the end."""
    args = arguments(argv)
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
    if args.parallel:
        dist.init_process_group("nccl" if args.device.type == "cuda" else "gloo")
    learnt, held_out, classes = folders(args.data, args.img_size) if args.data else digits(args.img_size)
    training, losses = build(classes, args), {}
    done = load(training, args) if args.resume else 0
    args.output.mkdir(parents=True, exist_ok=True)
    history = CsvWriter(args.output / "norms.csv")
    if args.rank == 0 and not args.resume:
        history.path.unlink(missing_ok=True)  # of a run that was cut before its first checkpoint

    for step, loss in train(training, learnt, done, args):
        if step % args.report_every == 0 or step == args.steps:
            losses[step] = over_processes(loss).item() / args.world
            norms = training.monitor.compute(all_reduce=args.world > 1)
            training.monitor.reset()
            if args.rank == 0:
                history.write(step, norms)
                tqdm.write(f"step {step:5}  loss {losses[step]:.4f}")
        if step % args.save_every == 0 or step == args.steps:
            save(step, training, args)

    training.monitor.remove()
    right = accuracy(training.model, held_out, args)
    if args.rank == 0:
        print(f"Token norms since the report before\n{norms.table()}")
        draw(norms, read_csv(history.path)).savefig(args.output / "norms.png", dpi=150)
        print(f"{right:.1%} of {len(held_out)} images held out are told right; all else is in {args.output}")
    if args.parallel:
        dist.destroy_process_group()
    return losses, right


if __name__ == "__main__":
    main()
