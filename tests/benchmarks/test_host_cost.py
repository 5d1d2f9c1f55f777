"""What a launch costs the host is measured without a GPU, and a repeated launch is cheap."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton is not installed: it exists for Linux x86-64 only")

from vitreg_kernels._triton import mode

if mode.INTERPRETING:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.runtime import driver

from benchmarks import host_cost
from benchmarks.results import Writer


def test_it_measures_both_directions_beside_torch() -> None:
    before = driver._active
    measured = host_cost.measure(samples=20)
    assert set(measured) == {"forward", "backward", "scaled_dot_product_attention"}
    assert all(0 < us < 10_000 for us in measured.values())
    assert driver._active is before


def test_rows_are_written_once_with_their_goals(tmp_path, machine, monkeypatch) -> None:
    monkeypatch.setattr(host_cost, "_SAMPLES", 3)
    writer = Writer(tmp_path / "run.json", {"command": "bench"}, machine)
    rows = list(host_cost.run(writer))
    assert {row["call"]: row["goal_us"] for row in rows} == {"forward": 30.0, "backward": 45.0}
    assert all(row["ours_us"] > 0 and row["sdpa_us"] > 0 for row in rows)
    assert list(host_cost.run(writer)) == rows == writer.rows


def test_every_call_measured_is_launched() -> None:
    launched: list[str] = []
    host_cost.measure(samples=3, fake=host_cost.NoGPU(lambda kernel, *_: launched.append(kernel.split()[0])))
    forward, backward = "_attention_fwd_kernel", ["_attention_bwd_query_kernel", "_attention_bwd_key_value_kernel"]
    assert launched == [forward] + 3 * [forward, *backward]
