"""What each of two processes does in ``test_monitor_distributed``: half of a batch, in every wrapping."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from monitor_cases import Doublings, monitored, tokens
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

RANKS = 2
WRAPPINGS = ("plain", "DDP", "FSDP2", "FSDP2, checkpointed")


def share(rank):
    """Three images of a rank's own; the second rank's have a NaN token."""
    x = tokens(3, seed=rank)
    if rank == 1:
        x[0, 8, 0] = torch.nan
    return x


def wrapped(model, wrapping):
    if wrapping == "DDP":
        return DistributedDataParallel(model)
    if wrapping.startswith("FSDP2"):
        for module in (*model.blocks, model):
            fully_shard(module)
    return model


def main(rank, folder):
    """Saves reports by wrapping and by when the monitor was attached: its own, of all ranks twice, its own again."""
    torch.set_num_threads(1)
    meeting, patience = f"file://{folder}/rendezvous", timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=RANKS, timeout=patience)
    reports = {}
    for wrapping in WRAPPINGS:
        for attached in ("before", "after", "on meta"):
            inner = Doublings(reentrant=False if wrapping.endswith("checkpointed") else None)
            if attached == "on meta":
                if wrapping == "DDP":  # which wants its weights when it wraps
                    continue
                inner.to("meta")
            monitor = None if attached == "after" else monitored(inner)
            model = wrapped(inner, wrapping)
            if attached == "on meta":
                model.to_empty(device="cpu")
                for parameter in model.parameters():
                    torch.nn.init.constant_(parameter, 2.0)
            monitor = monitor or monitored(inner)
            for x in share(rank).split(1):
                model(x.requires_grad_()).sum().backward()
            asked = [monitor.compute(all_reduce=all_reduce) for all_reduce in (False, True, True, False)]
            reports[f"{wrapping}, attached {attached}"] = asked
    first_alone = dist.new_group([0])
    if rank == 0:
        reports["alone"] = [monitor.compute(all_reduce=True, process_group=first_alone)]
    torch.save(reports, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
