"""What the interpreter cannot show of a backward in which one program owns a head: its barrier, and what it takes."""

from __future__ import annotations

import re

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed: it exists for Linux x86-64 only")

from benchmarks.prediction.gpu import GPUS  # noqa: E402
from benchmarks.prediction.predict import resident_programs  # noqa: E402
from vitreg_kernels._triton.launch import Launch  # noqa: E402
from vitreg_kernels._triton.offline import compilation, compile_launch  # noqa: E402
from vitreg_kernels.ops.attention.backends.triton import launches  # noqa: E402
from vitreg_kernels.ops.attention.types import AttentionInputs  # noqa: E402


def backward(tokens: int, arch: int, dtype: torch.dtype = torch.bfloat16, images: int | None = None) -> Launch:
    """The backward of 64 images of 16 heads, views of one packed qkv; ``images`` packs as many of up to ``tokens``."""
    shape = (64, tokens, 3, 16, 64) if images is None else (1, 64 * tokens, 3, 16, 64)
    qkv = torch.empty(shape, dtype=dtype, device="meta")
    inputs = AttentionInputs(*qkv.permute(2, 0, 3, 1, 4), num_prefix_tokens=5)
    if images is not None:
        bounds = torch.empty(images + 1, dtype=torch.int32, device="meta")
        inputs = inputs._replace(cu_seqlens=bounds, max_seqlen=tokens)
    _, launch = launches(inputs, arch)
    return launch


@pytest.mark.parametrize(
    ("tokens", "programs", "dtype"),
    [
        (54, 3, torch.bfloat16),
        (261, 2, torch.bfloat16),
        *(
            pytest.param(*row, marks=pytest.mark.slow)
            for row in (
                *((tokens, programs, torch.bfloat16) for tokens, programs in ((64, 3), (192, 2), (201, 3))),
                *((272, 2, dtype) for dtype in (torch.bfloat16, torch.float16)),  # of the most tokens
            )
        ),
    ],
)
def test_programs_a_multiprocessor_without_spills(tokens: int, programs: int, dtype: torch.dtype) -> None:
    used = compile_launch(backward(tokens, 90, dtype), 90)
    assert used.spill_bytes == 0
    assert resident_programs(used, GPUS[90]) >= programs
    assert used.instructions["HGMMA"]


@pytest.mark.parametrize("tokens", [54, pytest.param(64, marks=pytest.mark.slow)])
def test_a_tile_a_head_on_sm_100(tokens: int) -> None:
    used = compile_launch(backward(tokens, 100), 100)
    assert used.spill_bytes == 0
    assert used.tensor_memory_columns <= 256  # of 512, for two programs


@pytest.mark.parametrize("longest", [pytest.param(201, marks=pytest.mark.slow), 261])
def test_a_pack_of_large_and_small_crops(longest: int) -> None:
    assert compile_launch(backward(longest, 90, images=64), 90).spill_bytes == 0


@pytest.mark.parametrize("tokens", [54, pytest.param(201, marks=pytest.mark.slow), 261])
def test_a_barrier_between_what_queries_leave_and_keys_read(tokens: int) -> None:
    """delta and normalization pass from thread to thread through global memory, which only a barrier makes sure of.

    They are all that is stored in single words, and read-only loads (`.nc`) may be served from before the barrier.
    """
    compiled = compilation(backward(tokens, 90), 90).run().asm
    # As written, the loop over what owns queries and that over what owns keys. Further down, other barriers may stand
    # between them by chance, for the sake of shared memory.
    queries, keys = compiled["ttir"].split("barrier")
    assert (queries.count("scf.for"), keys.count("scf.for")) == (1, 1)
    assert "tt.store" in queries
    code = compiled["ptx"]
    assert "ld.global.nc" not in code
    last_store = max(found.end() for found in re.finditer(r"st\.global\.b32", code))
    next_load = re.search(r"ld\.global", code[last_store:])
    assert next_load is not None
    assert "bar.sync" in code[last_store : last_store + next_load.start()]
