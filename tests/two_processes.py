"""Two processes of one gloo group, for tests of what is spread over devices."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

PROCESSES = 2


@contextmanager
def member(rank: int, folder: str) -> Iterator[None]:
    """Within it a process is of the group; after it the process ends.

    Args:
        rank: which of the two it is.
        folder: where they find each other.
    """
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=PROCESSES,
        timeout=datetime.timedelta(seconds=60),
    )
    yield
    dist.destroy_process_group()
    os._exit(0)  # at once: gloo's threads may outlast what an orderly exit takes down, and abort the process
