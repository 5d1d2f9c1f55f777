"""Patched models under DDP and FSDP2: two processes give the gradients of one, and save what one would."""

from __future__ import annotations

import datetime
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.timm_vits import import_timm
from vitreg_kernels import patch, unpatch
from vitreg_kernels.integrations.attention.attend import Attend

pytest.importorskip("timm")
pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

PROCESSES = 2


def vit() -> nn.Module:
    torch.manual_seed(0)
    options = {"img_size": 56, "depth": 2, "embed_dim": 64, "num_heads": 2, "init_values": 1.0}
    return import_timm().create_model("vit_small_patch14_reg4_dinov2", **options)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """By name, of a loss that is a mean over images, as a whole even where they are sharded."""
    model.zero_grad()
    output = model(x)
    (output * torch.linspace(-1, 1, output.shape[-1])).mean().backward()
    return whole({name: p.grad for name, p in model.named_parameters()})


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies that no longer are sharded, by the names that they have without DDP."""
    return {
        name.removeprefix("module."): x.full_tensor() if hasattr(x, "full_tensor") else x.clone()
        for name, x in tensors.items()
    }


def sharded(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def checks(rank: int, folder: str) -> list[str]:
    """What failed, by what it was tried on."""
    calls, call = [], Attend._call
    Attend._call = lambda self, *a, **o: calls.append(1) or call(self, *a, **o)
    torch.manual_seed(1)
    x = torch.randn(4, 3, 56, 56)
    mine, expected, weights = x.chunk(PROCESSES)[rank], gradients(vit(), x), whole(vit().state_dict())
    failures = []
    for name, wrap in (("DDP", DistributedDataParallel), ("FSDP2", sharded)):
        for first in ("patched", "wrapped"):
            model = vit()
            if first == "patched":
                patch(model)
            model = wrap(model)
            if first == "wrapped":
                patch(model)
            calls.clear()
            found = gradients(model, mine)
            if len(calls) != 2:
                failures.append(f"{name}, {first} first: {len(calls)} fused calls")
            state = model.state_dict()
            distributed_checkpoint.save(state, checkpoint_id=f"{folder}/{name} {first}")
            unpatch(model)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()
            distributed_checkpoint.load(state, checkpoint_id=f"{folder}/{name} {first}")
            model.load_state_dict(state)
            calls.clear()
            again = gradients(model, mine)
            if calls:
                failures.append(f"{name}, {first} first: fused when it is unpatched")
            try:
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)
                torch.testing.assert_close(again, expected, atol=1e-5, rtol=1e-3)
                torch.testing.assert_close(whole(state), weights, atol=0, rtol=0)
            except AssertionError as error:
                failures.append(f"{name}, {first} first: {error}")
    return failures


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=PROCESSES,
        timeout=datetime.timedelta(seconds=60),
    )
    Path(folder, f"{rank}.txt").write_text("\n".join(checks(rank, folder)))
    dist.destroy_process_group()
    os._exit(0)  # at once: gloo's threads may outlast what an orderly exit takes down, and abort the process


def test_two_processes_give_the_gradients_of_one(tmp_path):
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=PROCESSES)
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(PROCESSES)] == ["", ""]
