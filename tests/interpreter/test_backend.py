"""The backend's three functions: what they allocate, launch and leave out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from harness import call, packed_bounds, random_rope

from vitreg_kernels._triton import mode
from vitreg_kernels.ops.attention import reference
from vitreg_kernels.ops.attention.backends import triton
from vitreg_kernels.ops.attention.backends.triton import tiles as tuning
from vitreg_kernels.ops.attention.backends.triton.plan import launch_plan
from vitreg_kernels.ops.attention.types import OUTPUT_NAMES, AttentionInputs


def swept_columns(inputs: AttentionInputs, arch: int = 90) -> int:
    """Width of all tiles that a program of the forward sweeps."""
    constants = launch_plan(inputs, "forward", arch).constants
    first = inputs.num_prefix_tokens if constants["PREFIX"] else 0
    rest = inputs.query.shape[2] - first
    full = (rest - 1) // constants["BLOCK_N"] if constants["TAIL"] else rest // constants["BLOCK_N"]
    return constants["PREFIX"] + full * constants["BLOCK_N"] + constants["TAIL"]


def meta_call(tokens: int, prefix: int, **changes: object) -> AttentionInputs:
    qkv = torch.empty(2, tokens, 3, 6, 64, dtype=torch.bfloat16, device="meta")
    return AttentionInputs(*qkv.permute(2, 0, 3, 1, 4), num_prefix_tokens=prefix, **changes)


@pytest.mark.parametrize(
    ("tokens", "prefix", "columns"), [(54, 5, 64), (201, 5, 208), (261, 5, 272), (1029, 5, 1040), (1374, 5, 1376)]
)
def test_little_work_beyond_the_tokens(tokens: int, prefix: int, columns: int) -> None:
    assert swept_columns(meta_call(tokens, prefix)) == columns


@pytest.mark.parametrize("kernel", ["forward", "grad_query", "grad_key_value", "statistics"])
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_few_variants_for_all_lengths(kernel: tuning.AttentionKernel, arch: int) -> None:
    """Kernels are compiled by the class of a length, not by the length."""
    variants = {tuple(launch_plan(meta_call(tokens, 0), kernel, arch).constants.items()) for tokens in range(300, 2000)}
    assert len(variants) <= 9


def test_nothing_extra_is_launched_or_allocated_unless_asked_for() -> None:
    """A forward is one launch without statistics, and max_logit and token_norms come out of that same launch."""
    plain, *backward = triton.launches(meta_call(201, 5), 90)
    for name in ("lse", "max_logit", "square_norm"):
        assert plain.arguments[name] is None
    assert len(backward) == 2
    assert len(triton.launches(meta_call(201, 5, outputs=("lse", "max_logit", "token_norms")), 90)) == 3
    assert len(triton.launches(meta_call(201, 5, outputs=OUTPUT_NAMES), 90)) == 4


@pytest.mark.parametrize("outputs", [(), *((name,) for name in OUTPUT_NAMES), OUTPUT_NAMES])
def test_statistics_are_those_asked_for(outputs: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    inputs = call(37, 5, batch=2, heads=2, outputs=outputs)
    output, statistics = triton.forward(inputs)
    exact = reference.attention(inputs._replace(outputs=OUTPUT_NAMES))
    assert output.transpose(1, 2).is_contiguous()
    torch.testing.assert_close(output, exact.output)
    for name, value in statistics._asdict().items():
        if name in outputs:
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, getattr(exact.statistics, name))
        else:
            assert value is None, name


def test_packed_statistics_are_by_image() -> None:
    torch.manual_seed(0)
    lengths = (5, 80, 17)
    inputs = call(
        102,
        2,
        heads=2,
        cu_seqlens=packed_bounds(lengths),
        max_seqlen=80,
        rope=random_rope(96, 32, interleaved=False),
        outputs=OUTPUT_NAMES,
    )
    _, statistics = triton.forward(inputs)
    exact = reference.attention(inputs).statistics
    assert statistics.max_logit.shape == (3, 2)
    for name in OUTPUT_NAMES:
        torch.testing.assert_close(getattr(statistics, name), getattr(exact, name))


def test_without_prefix() -> None:
    _, statistics = triton.forward(call(17, 0, outputs=("prefix_attention",)))
    assert statistics.prefix_attention.shape == (1, 1, 0, 17)


@pytest.mark.parametrize("whole_head", [False, True])
def test_measured_tiles_override_the_rules(whole_head: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = tuning.Tiles(block_m=32, block_n=128, num_warps=8, num_stages=4, whole_head=whole_head)
    row = {"kernel": "forward", "bits": 16, "width": 64, "tokens": 272, **vars(tiles)}
    (tmp_path / "sm_90.json").write_text(json.dumps({tuning.SECTION: [row]}))
    monkeypatch.setattr(tuning, "_MEASURED", tuning.measured_tiles(tmp_path))
    tuning.attention_tiles.cache_clear()
    try:
        assert tuning.attention_tiles("forward", 90, torch.bfloat16, 64, 201) == tiles
        # They are measured on many heads; few do not fill a GPU with a program each.
        of_few = tuning.attention_tiles("forward", 90, torch.bfloat16, 64, 201, many_heads=False)
        assert (of_few == tiles) is not whole_head
        others = [
            ("forward", 80, 64, 201),
            ("statistics", 90, 64, 201),
            ("forward", 90, 128, 201),
            ("forward", 90, 64, 300),
        ]
        for kernel, arch, head_dim, tokens in others:
            assert tuning.attention_tiles(kernel, arch, torch.bfloat16, head_dim, tokens) != tiles
    finally:
        tuning.attention_tiles.cache_clear()


def test_interpreter_is_usable() -> None:
    assert mode.INTERPRETING
    assert mode.faults() == []
