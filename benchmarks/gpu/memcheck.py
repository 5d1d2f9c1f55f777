"""NVIDIA's memory checker over a training step's attention: an access beside a tensor is an error, not luck.

This very module is the program that it watches: each of our kernels on two heads, and nothing is compared.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal, TypedDict

import torch
from torch import Tensor

from benchmarks import results
from benchmarks.machine import ROOT, Machine
from benchmarks.results import Row
from vitreg_kernels import functional

NAME = "memcheck"
_SECONDS = 45.0
_FINDING = re.compile(r"Invalid __\w+__ |ERROR SUMMARY: [1-9]")
_USUAL_PLACES = ("/usr/local/cuda/bin", "/opt/cuda/bin")
_LINES = 12  # of its report that a row keeps


class MemcheckRow(TypedDict):
    """What the memory checker says."""

    kind: Literal["memcheck"]
    reason: str | None  # why there is no answer
    failed: bool  # it found an error
    report: str  # its first lines where it did
    seconds: float
    machine: Machine


results.ROW_TYPES[NAME] = MemcheckRow


def check(device: torch.device) -> Row:
    """Has our kernels watched in a process of their own. Without its ``machine``."""
    start = time.monotonic()
    reason, report = _answer(device)
    return {
        "kind": NAME,
        "reason": reason,
        "failed": bool(report),
        "report": report,
        "seconds": time.monotonic() - start,
    }


def told(row: Row) -> str:
    """A row in a sentence."""
    if row["failed"]:
        return " ".join(row["report"].split())
    return f"not run: {row['reason']}" if row["reason"] else f"no error in {row['seconds']:.0f} s"


def main() -> int:
    """The program that is watched. It ends by itself should the tool be ended alone, and not stay on the GPU."""
    signal.alarm(math.ceil(_SECONDS) + 5)
    for tokens in (54, 261, 1029):
        qkv = torch.randn(1, tokens, 3, 2, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        _step(qkv)
    torch.cuda.synchronize()
    return 0


def _step(qkv: Tensor) -> None:
    output = functional.register_attention_qkv(qkv, num_prefix_tokens=5, backend="triton")
    torch.autograd.grad(output, qkv, torch.ones_like(output))


def _answer(device: torch.device) -> tuple[str | None, str]:
    """Why there is none, and what it found."""
    if device.type != "cuda":
        return "there is no GPU", ""
    path = os.pathsep.join((os.environ.get("PATH", ""), *_USUAL_PLACES))
    tool = shutil.which("compute-sanitizer", path=path)
    if tool is None:
        return "compute-sanitizer is not installed", ""
    # Every tensor by itself, or what is beyond one would be another's, in the same block of torch's.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # Calls of the driver's interface that fail are none of ours: torch and triton try some out.
    command = (tool, "--tool", "memcheck", "--report-api-errors", "no", sys.executable, "-m", __name__)
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"{Path(tool).name} took longer than {_SECONDS:.0f} s", ""
    lines = done.stdout.strip().splitlines()
    # By what it says: an access out of bounds also breaks the program, whose status then is its own.
    if _FINDING.search(done.stdout):
        return None, "\n".join([line for line in lines if line.startswith("=====")][:_LINES])
    if done.returncode:
        return f"{Path(tool).name} cannot run here: {' '.join(lines[-2:])}", ""
    return None, ""


if __name__ == "__main__":
    sys.exit(main())
