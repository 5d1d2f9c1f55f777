"""The real-model part on a tiny model: its rows, its maps, its resumption, and that a wrong backend is caught."""

from __future__ import annotations

import re

import pytest
import torch

from benchmarks import features, model_report, results
from benchmarks.pretrained import Pretrained
from benchmarks.results import Writer
from vitreg_kernels import RegisterViT, UnsupportedError, ViTConfig
from vitreg_kernels.ops.attention.backends import sdpa

BACKENDS = ("sdpa", "sdpa_flash", "sdpa_math", "reference")  # that serve fp32 and bf16 here
RUN = {"command": "bench", "size": "quick", "model": "a model"}

for package in ("skimage", "sklearn"):
    pytest.importorskip(package, reason="the photographs come inside scikit-image and scikit-learn")


def tiny_model(num_registers: int = 0) -> Pretrained:
    """C = 128, H = 2, 2 blocks, patches of 14 px at 3 x 3 positions, random weights under DINOv2's names."""
    sizes = {"image_size": 42, "dim": 128, "depth": 2, "num_heads": 2, "hidden_dim": 64, "position_rows": "cls"}
    config = ViTConfig(**sizes, num_registers=num_registers)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(x.shape, generator=generator) / x.shape[-1] ** 0.5
        for name, x in RegisterViT(config, device="meta").state_dict().items()
    }
    told = {"num_heads": 2, "antialias": num_registers > 0, "interpolate_offset": 0.0 if num_registers else 0.1}
    return Pretrained("a tiny ViT", weights | {"mask_token": torch.zeros(1, 128)}, told)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(features, "_IMAGES", {"quick": {56: 2}})
    monkeypatch.setattr(features, "_TIMING_BUDGET_S", {"quick": 0.01})


@pytest.fixture
def run(small, tmp_path, machine):
    """Runs a model; the rows, and what the progress was. A second call goes on from the first's file."""

    def run(model) -> tuple[list, list]:
        steps = []
        writer = Writer(tmp_path / "run.json", RUN, machine)
        rows = features.run("quick", writer, lambda *step: steps.append(step), model, torch.device("cpu"))
        return list(rows), steps

    return run


def test_rows_of_a_model_without_registers(run, tmp_path):
    rows, steps = run(tiny_model())
    assert [row["kind"] for row in rows] == ["registers"] * 3 + ["norms"] * 2 + ["features"] * 8
    assert rows == results.load(tmp_path / "run.json")
    assert [row["used"] for row in rows[:3]] == [True, False, False]
    for row in rows[5:]:
        assert (row["tokens"], row["prefix_tokens"], row["images"], row["batch"]) == (21, 5, 2, 1)
        assert all(error["passed"] for error in row["errors"].values())
    assert [(row["backend"], row["default"]) for row in rows[5:]] == [(name, name == "sdpa") for name in BACKENDS] * 2
    assert [step[:2] for step in steps] == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]


def test_registers_of_its_own_are_kept(run):
    own = tiny_model(num_registers=2)
    rows, _ = run(own)
    assert {row["kind"] for row in rows} == {"norms", "features"}
    assert rows[-1]["prefix_tokens"] == 3
    assert features.attention_maps(own, ("cat",), 56).model == "a tiny ViT"


def test_a_cut_run_is_gone_on_with(run, monkeypatch):
    first, _ = run(tiny_model())
    monkeypatch.setattr(features, "by_backend", None)  # called, it would raise
    again, _ = run(tiny_model())
    assert again == first


def test_a_wrong_backend_breaks_the_rule(run, change_backends):
    forward = sdpa.forward

    def slightly_wrong(inputs):
        result = forward(inputs)
        return result._replace(output=result.output * (1 + 1e-4))

    change_backends("sdpa", forward=slightly_wrong)
    rows, _ = run(tiny_model())
    verdicts = {(r["backend"], r["dtype"]): r["errors"]["features"]["passed"] for r in rows if r["kind"] == "features"}
    assert not verdicts["sdpa", "fp32"]
    assert verdicts["reference", "fp32"]
    assert re.search(r"sdpa\*.* FAIL \d", model_report.table(rows))


@pytest.mark.parametrize(
    ("error", "failed", "shown"),
    [
        (UnsupportedError("was not built for this"), False, "sdpa        not run: was not built"),
        (IndexError("out of its bounds"), True, "sdpa        FAIL IndexError: out of"),
    ],
    ids=["refuses", "crashes"],
)
def test_a_backend_that_turns_out_unusable_has_a_row_with_its_reason(run, monkeypatch, error, failed, shown):
    by = features._by

    def fails(backend, vit, images):
        if backend == "sdpa":
            raise error
        return by(backend, vit, images)

    monkeypatch.setattr(features, "_by", fails)
    rows, _ = run(tiny_model())
    rows = [row for row in rows if row["kind"] == "features"]
    assert [(row["backend"], row["failed"]) for row in rows] == [
        (name, failed and name == "sdpa") for name in BACKENDS
    ] * 2
    for row in rows[:: len(BACKENDS)]:
        assert str(error) in row["reason"]
        assert all(row[field] is None for field in features._MEASURED)
    assert all(row["errors"] and row["reason"] is None for row in rows[1::2])
    assert shown in model_report.table(rows)


def test_the_table_has_every_row_and_fits_a_terminal(run):
    rows, _ = run(tiny_model())
    table = model_report.table(rows)
    assert table.count("FAIL") == 1  # in the legend
    assert max(map(len, table.splitlines())) <= 100
    for words in ("sdpa*", "reference", "fp32", "bf16", "grey patches*", "copies of CLS", "astronaut", "cat"):
        assert words in table


@torch.inference_mode()
def test_maps_are_the_prefix_rows_over_the_patch_grid():
    model = tiny_model()
    maps = features.attention_maps(model, ("cat", "coffee"), 56)
    assert maps.model == "a tiny ViT, given 4 here"
    assert maps.images.shape == (2, 3, 56, 56)
    assert maps.attention.shape == (2, 5, 4, 4)

    # The last block's attention once more, by hand.
    vit = model.vit(num_registers=4)
    seen = []
    vit.blocks[-1].attn.qkv.register_forward_hook(lambda module, inputs, output: seen.append(output))
    vit(features.normalize(maps.images))
    query, key, _ = seen[0].unflatten(2, (3, 2, 64)).permute(2, 0, 3, 1, 4)
    probabilities = (query[:, :, :5] @ key.transpose(-1, -2) / 8).softmax(-1).mean(1)
    torch.testing.assert_close(maps.attention.flatten(2), probabilities[:, :, 5:] * 21)
