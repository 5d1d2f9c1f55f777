"""What each process of torchrun does in ``test_train``: trains by DDP, by FSDP2, and by FSDP2 in two parts."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from unittest import mock

import torch.distributed as dist
from train_cases import cut, train


def main(folder: Path) -> None:
    """Writes what the trainings give."""
    dist.init_process_group("gloo")
    with mock.patch.object(dist, "init_process_group"), mock.patch.object(dist, "destroy_process_group"):
        found = all_trainings(folder)  # in one group: a second one, after a first was destroyed, can hang
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # at once: gloo's threads may outlast what an orderly exit takes down, and abort the process


def all_trainings(folder: Path) -> dict[str, tuple[dict[int, float], float]]:
    """Losses and accuracy of every training, by its name."""
    found = {
        "ddp": train(folder / "ddp", "--parallel=ddp", "--accumulate=2"),
        "fsdp2": train(folder / "fsdp2", "--parallel=fsdp2", "--accumulate=2", "--patch=block"),
    }
    cut(folder / "cut", "--parallel=fsdp2")
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.copytree(folder / "cut", folder / "resumed")
    dist.barrier()
    found["fsdp2, resumed"] = train(folder / "resumed", "--parallel=fsdp2", "--resume")
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
