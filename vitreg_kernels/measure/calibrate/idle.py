"""Whether a device is idle before a race: beside another's work no time is worth anything."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import torch

_MOST_BUSY_PERCENT = 10.0
_WATCHED_S = 0.5
_GPU_FORGETS_S = 1.2
_IDLE_FIELDS = (3, 4)  # of a processor's line in /proc/stat: the ticks that it idled or waited for a disk


def check(device: torch.device) -> None:
    """Raise ``RuntimeError`` if others are using the device, as far as the system tells."""
    percent = _of_gpu(device) if device.type == "cuda" else _of_processors()
    if percent is not None and percent > _MOST_BUSY_PERCENT:
        what = "GPU" if device.type == "cuda" else "processor"
        raise RuntimeError(f"the {what} is busy ({percent:.0f}% of it): calibrate when nothing else runs on it")


def _of_gpu(device: torch.device) -> float | None:
    """The lesser of two answers of nvidia-smi, which speaks of the last second and of this process's work too.

    ``None`` where it is not there, or does not know, as of a part of a GPU.
    """
    uuid = str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")
    command = ("nvidia-smi", f"--id=GPU-{uuid}", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits")
    torch.cuda.synchronize(device)
    answers = []
    try:
        for _ in range(2):
            time.sleep(_GPU_FORGETS_S)
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
            answers.append(float(done.stdout.strip()))
        return min(answers)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def _of_processors() -> float | None:
    """Of those that this process may use, while it sleeps; ``None`` where the system does not tell."""
    if not Path("/proc/stat").exists():
        return None
    before = _ticks()
    time.sleep(_WATCHED_S)
    total, idle = (now - then for now, then in zip(_ticks(), before, strict=True))
    return 100 * (total - idle) / total if total else None


def _ticks() -> tuple[int, int]:
    """Ticks of the clock since the start of the system, in all and idle."""
    names = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    lines = (line.split() for line in Path("/proc/stat").read_text().splitlines())
    ticks = [[int(count) for count in line[1:]] for line in lines if line and line[0] in names]
    return sum(map(sum, ticks)), sum(of_one[field] for of_one in ticks for field in _IDLE_FIELDS)
