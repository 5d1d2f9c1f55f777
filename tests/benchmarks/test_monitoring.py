"""What the monitor costs: rows of a tiny model, their arithmetic, and that steps are really monitored."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks import monitoring, results
from benchmarks.results import Writer
from vitreg_kernels import RegisterViT, TokenNormMonitor, ViTConfig
from vitreg_kernels.measure import timing

RUN = {"command": "bench", "size": "quick", "model": "a model"}
CPU = torch.device("cpu")


@pytest.fixture
def vit() -> RegisterViT:
    return RegisterViT(ViTConfig(image_size=28, dim=32, depth=2, num_heads=1))


def test_rows(vit, machine, tmp_path, monkeypatch):
    monkeypatch.setattr(monitoring, "_SIZES", {"quick": (2, 3)})
    monkeypatch.setattr(RegisterViT, "preset", lambda name: vit)
    steps = []
    writer = Writer(tmp_path / "run.json", RUN, machine)
    rows = list(monitoring.run("quick", writer, lambda *step: steps.append(step[:2]), CPU))
    assert rows == results.load(tmp_path / "run.json")
    assert [row["source"] for row in rows] == ["the fused norms", "the layers' outputs"]
    assert all((row["tokens"], row["batch"], row["rounds"]) == (9, 2, 3) for row in rows)
    assert steps == [(0, 1), (1, 1)]
    monkeypatch.setattr(monitoring, "measure", None)  # called again, it would raise
    assert list(monitoring.run("quick", writer, lambda *step: None, CPU)) == rows


def test_overheads_are_of_pairs(vit, monkeypatch):
    """Medians of the ratios in a round; ratios of the medians would be another number."""
    timed = {"none": [1.0, 2.0, 4.0], "the fused norms": [1.1, 2.0, 4.0], "the layers' outputs": [1.0, 2.4, 6.0]}
    monkeypatch.setattr(timing, "in_rounds", lambda *_, **__: timed)
    fused, outputs = monitoring.measure(vit, 2, 3, CPU)
    assert (fused["overhead"], fused["step_ms"]) == (0.0, 2.0)
    assert outputs["overhead"] == pytest.approx(0.2)
    assert outputs["overhead_p80"] == pytest.approx(0.2 + 0.6 * 0.3)
    table = monitoring.table([row | {"kind": "monitor"} for row in (fused, outputs)])
    assert table.count("ABOVE THE GOAL") == 1
    assert max(map(len, table.splitlines())) <= 130
    assert monitoring.table([]) == ""


def test_the_monitored_steps_are_monitored_and_the_others_are_not(vit, monkeypatch):
    made = []

    class Monitor(TokenNormMonitor):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            made.append(self)

        def remove(self):
            super().remove()
            made[-1] = (self.layers, self.compute().stats.patches.count.tolist())

    monkeypatch.setattr(monitoring, "TokenNormMonitor", Monitor)
    monitoring.measure(vit, 2, 1, CPU)
    assert len(made) == 4  # of three variants two, in the warm-up and in the round
    patches = 2 * math.prod(vit.config.grid)
    assert sorted(made)[0] == (("blocks.0.mlp", "blocks.1.mlp"), [patches] * 2)
    assert sorted(made)[-1] == (("embedding", "blocks.0", "blocks.1"), [patches] * 3)
    assert not any(module._forward_hooks for module in vit.modules())


def test_rounds_time_every_variant_once():
    calls = []
    variants = {name: timing.Variant(lambda x, name=name: calls.append((name, x))) for name in ("a", "b", "c")}
    timed = timing.in_rounds(variants, 7, device=CPU, rounds=5)
    assert {name: len(times) for name, times in timed.items()} == {"a": 5, "b": 5, "c": 5}
    assert all(sorted(calls[i : i + 3]) == [("a", 7), ("b", 7), ("c", 7)] for i in range(0, 18, 3))
    assert len(calls) == 18  # one round to warm up
    assert len({tuple(calls[i : i + 3]) for i in range(0, 18, 3)}) > 1
