"""RegisterViT under DDP and FSDP2: two processes give the gradients of one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from vit_cases import TINY, vit

from tests.two_processes import PROCESSES, member
from vitreg_kernels import RegisterViT
from vitreg_kernels.nn.hooks import hooked

CONFIG = replace(TINY, depth=3, position_rows="cls")
pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


def gradients(model, pixels):
    """By name, of a loss that is a mean over images, as a whole even where they are sharded."""
    model.zero_grad()
    sum(group.square().mean((1, 2)) for group in model(pixels)).mean().backward()
    return {
        name.removeprefix("module."): p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad.clone()
        for name, p in model.named_parameters()
    }


def sharded(model):
    """Each block on its own, freed after its forward, and the rest together."""
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    return fully_shard(model, mesh=mesh)


def checks(rank):
    """What failed, by what it was tried on."""
    torch.manual_seed(0)
    pixels = torch.randn(4, 3, 16, 20)
    mine = pixels.chunk(PROCESSES)[rank]
    expected = gradients(vit(CONFIG), pixels)
    failures = []
    for name in ("DDP", "FSDP2", "FSDP2 with checkpointing", "DDP with hooks", "FSDP2 with hooks"):
        model = vit(CONFIG)
        model.checkpointing = "checkpointing" in name
        watched = [model.blocks[1], model.blocks[1].norm1, model.blocks[2].ls2, model.norm]
        model = DistributedDataParallel(model) if name.startswith("DDP") else sharded(model)
        if any(map(hooked, watched)):
            failures.append(f"{name}: its own hooks undo the fusion")
        seen = []
        if "hooks" in name:
            for module in watched:
                module.register_forward_hook(lambda _, __, output, seen=seen: seen.append(type(output)))
        try:
            torch.testing.assert_close(gradients(model, mine), expected, atol=1e-5, rtol=1e-4)
        except AssertionError as error:
            failures.append(f"{name}: {error}")
        if seen != [torch.Tensor] * (4 * ("hooks" in name)):
            failures.append(f"{name}: hooks saw {seen}")
    # The way to build a model that no single device can hold.
    model = sharded(RegisterViT(CONFIG, device="meta"))
    model.to_empty(device="cpu")
    model.reset_parameters()
    if not all(p.full_tensor().isfinite().all() for p in model.parameters()):
        failures.append("FSDP2 from the meta device: weights that are not finite")
    if not torch.equal(model.blocks[0].ls1.gamma.full_tensor(), torch.full((CONFIG.dim,), CONFIG.layer_scale)):
        failures.append("FSDP2 from the meta device: LayerScale does not start where it should")
    gradients(model, mine)
    return failures


def work(rank: int, folder: str) -> None:
    with member(rank, folder):
        Path(folder, f"{rank}.txt").write_text("\n".join(checks(rank)))


def test_two_processes_give_the_gradients_of_one(tmp_path):
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=PROCESSES)
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(PROCESSES)] == ["", ""]
