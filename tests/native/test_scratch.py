"""The memory that a thread of a native kernel works in: an error where there is none, and given back after large calls.

All tokens of a large call are one and the same in memory, and one key takes part: it asks for memory, not for time.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vitreg_kernels._native import library

pytestmark = [
    pytest.mark.skipif(bool(library.faults()), reason="; ".join(library.faults())),
    pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's limit and count of a process's memory"),
]

CALLS = """
import resource
from pathlib import Path

import torch
from vitreg_kernels.functional import register_attention

def attend(tokens):
    query, key, value = torch.ones(3, 1, 2, 1, 128).expand(3, 1, 2, tokens, 128)
    mask = (torch.arange(tokens) == 0).view(1, 1, 1, tokens)
    output = register_attention(query, key, value, attn_mask=mask, backend="cpu")
    assert torch.equal(output, torch.ones_like(output))

def held():
    "MiB of addresses that this process holds."
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() / 2**20
"""


def run(code: str, threads: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"{CALLS}\ntorch.set_num_threads({threads})\n{code}"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("threads", [1, 2])
def test_none_left_is_an_error_and_the_next_call_works(threads):
    run(
        """
attend(200)
resource.setrlimit(resource.RLIMIT_AS, (int(held() + 300) << 20, -1))
try:
    attend(2**17)  # 128 MiB of output, 192 a thread to work in
except RuntimeError as error:
    assert str(error).startswith("can't allocate memory: each thread of this native kernel needs 2"), error
    assert len(str(error).splitlines()) == 1, error
else:
    raise AssertionError("there was enough")
attend(200)
""",
        threads,
    )


@pytest.mark.parametrize("threads", [1, 2])
def test_a_large_call_gives_back_what_it_worked_in(threads):
    run(
        """
attend(200)
before = held()
attend(2**17)
assert held() < before + 32, (before, held())
""",
        threads,
    )
