"""The driver: what it writes, prints and answers, with the parts that measure made small."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from test_features import tiny_model

from benchmarks import attention, end_to_end, features, lengths, monitoring, norms, overhead, results, roofline
from benchmarks.shapes import Case
from vitreg_kernels import RegisterViT, ViTConfig
from vitreg_kernels.measure import timing
from vitreg_kernels.ops.attention.backends import sdpa
from vitreg_kernels.ops.residual_norm.backends import composite

for package in ("matplotlib", "skimage", "sklearn", "tqdm"):
    pytest.importorskip(package, reason="the benchmark's own packages: pip install 'vitreg_kernels[bench]'")

from benchmarks import __main__ as driver  # noqa: E402

ERRORS = {"max": 1.0, "mean": 1.0, "eager_max": 1.0, "eager_mean": 1.0, "passed": True}
WHOLE_VIT = {
    "kind": "end_to_end",
    "model": "a ViT of timm's",
    "attention": "vitreg:sdpa",
    "ours": True,
    "compiled": False,
    "dtype": "bf16",
    "batch": 8,
    "tokens": 261,
    "goal": 1.2,
    "reason": None,
    "failed": False,
    "median_ms": 2.0,
    "p20_ms": 1.0,
    "p80_ms": 3.0,
    "samples": 3,
    "images_per_s": 4000.0,
    "speedup": 1.5,
    "errors": {"features": ERRORS},
}


@pytest.fixture
def small(monkeypatch, tmp_path, machine, ceilings):
    """The whole driver on a tiny model and one small race; the path of its result file."""
    path = tmp_path / "results" / "run.json"
    monkeypatch.setattr(features, "_IMAGES", {"quick": {56: 2}})
    monkeypatch.setattr(features, "_TIMING_BUDGET_S", {"quick": 0.01})
    monkeypatch.setattr(attention, "_BUDGET_S", {"quick": 0.01})
    monkeypatch.setattr(attention, "cases", lambda *_: iter([Case(1, 2, 54, "fp32", "forward")]))
    raced = [peer for peer in attention.peers("quick") if peer.name != "torch:compile"]  # takes seconds
    monkeypatch.setattr(attention, "peers", lambda size: raced)
    monkeypatch.setattr(overhead, "_BUDGET_S", 0.01)
    monkeypatch.setattr(lengths, "PAIRS", ((7, 8),))
    monkeypatch.setattr(lengths, "_ROUNDS", {"quick": 1})
    monkeypatch.setattr(end_to_end, "measure", lambda piece, budget_s: [WHOLE_VIT])
    tiny = [norms.Case(16, "fp32", mode, batch=3, tokens=9) for mode in norms.MODES]
    monkeypatch.setattr(norms, "cases", lambda device: tiny)
    monkeypatch.setattr(norms, "_BUDGET_S", {"quick": 0.0})
    quick = [peer for peer in norms.norms.peers(rms=False) if peer.name != "torch:compile"]  # takes seconds
    monkeypatch.setattr(norms.norms, "peers", lambda rms: quick)
    monkeypatch.setattr(monitoring, "_SIZES", {"quick": (1, 1)})
    vit = RegisterViT(ViTConfig(image_size=28, dim=32, depth=1, num_heads=1))
    monkeypatch.setattr(monitoring.RegisterViT, "preset", lambda name: vit)
    monkeypatch.setattr(roofline, "measure", lambda device: ceilings)
    monkeypatch.setattr(timing, "last_level_cache", lambda device: 2**12)
    monkeypatch.setattr(driver.results, "default_path", lambda *_: path)
    monkeypatch.setattr(driver.pretrained, "load", lambda name: tiny_model())
    monkeypatch.setattr(driver.machine, "describe", lambda device: machine)
    monkeypatch.setattr(driver.machine, "default_device", lambda: torch.device("cpu"))
    return path


def run(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments])
    return driver.main()


def kinds(path) -> set[str]:
    return {row["kind"] for row in results.load(path)}


def test_the_main_job(small, monkeypatch, capsys):
    assert run(monkeypatch) == 0
    printed = capsys.readouterr().out
    for words in (
        *(f"{part}/6 " for part in range(1, 7)),
        "1/4 registers at 56 px",
        "1/1 N=54 fp32 forward",
        "2/2 LayerNorm C=16 fp32 backward",
        "grey patches*",
        "torch:math",
        "counting the fused norms",
        "2/2 N=7 beside 8 bf16",
        "N = 7/8 fp32  torch:sdpa",
        "a ViT of timm's, bf16, eager, 8 images x 261 tokens",
    ):
        assert words in printed
    assert "results are as accurate as the rule asks" in printed
    assert small.with_suffix(".png").stat().st_size > 0
    assert kinds(small) == {
        "registers",
        "norms",
        "features",
        "roofline",
        "attention",
        "overhead",
        *(["launch_cost"] if find_spec("triton") else []),
        "residual_norm",
        "monitor",
        "lengths",
        "end_to_end",
    }


def test_a_wrong_backend_is_named_and_the_status_is_1(small, monkeypatch, capsys, change_backends):
    forward = sdpa.forward

    def slightly_wrong(inputs):
        result = forward(inputs)
        return result._replace(output=result.output * (1 + 1e-4))

    normalize = composite.forward

    def slightly_off(inputs):
        result = normalize(inputs)
        return result._replace(normalized=result.normalized * (1 + 1e-4))

    change_backends("sdpa", forward=slightly_wrong)
    change_backends("composite", op="residual_norm", forward=slightly_off)
    assert run(monkeypatch) == 1
    told = capsys.readouterr().err
    assert "vitreg:composite at N = 9, C = 16 in fp32, forward: normalized is" in told
    assert "sdpa at N = 21 in fp32, a tiny ViT: features is" in told
    assert "vitreg:sdpa at N = 54 in fp32, forward: output is" in told
    assert "reference" not in told


@pytest.mark.slow
def test_a_crash_of_ours_is_named_and_the_status_is_1(small, monkeypatch, capsys, change_backends):
    def crash(inputs):
        raise IndexError("out of its bounds")

    attend = attention.race
    monkeypatch.setattr(
        attention, "race", lambda *arguments: change_backends("sdpa", forward=crash) or attend(*arguments)
    )
    # They call the default backend, which is the broken one.
    monkeypatch.setattr(overhead, "run", lambda writer: [])
    monkeypatch.setattr(monitoring, "run", lambda *arguments: [])
    assert run(monkeypatch) == 1
    told = capsys.readouterr()
    assert "vitreg:sdpa at N = 54 in fp32, forward: IndexError: out of its bounds" in told.err
    assert "vitreg:sdpa       every case: FAIL IndexError: out of its bounds" in told.out


@pytest.mark.slow
def test_a_wrong_whole_vit_is_named_and_the_status_is_1(small, monkeypatch, capsys):
    wrong = WHOLE_VIT | {"errors": {"features": ERRORS | {"passed": False}}}
    monkeypatch.setattr(end_to_end, "measure", lambda piece, budget_s: [wrong])
    assert run(monkeypatch) == 1
    assert "vitreg:sdpa at N = 261 in bf16, a ViT of timm's: features is 1 off" in capsys.readouterr().err


def test_a_gpu_has_its_own_command_for_whole_vits(small, monkeypatch, capsys):
    monkeypatch.setattr(driver.machine, "default_device", lambda: SimpleNamespace(type="cuda"))
    for module in (features, attention, norms, monitoring):
        monkeypatch.setattr(module, "run", lambda *arguments: [])
    monkeypatch.setattr(driver.picture, "save", lambda *arguments: None)
    run(monkeypatch)
    assert "make gpu measures them on a GPU" in capsys.readouterr().out
    assert not {"lengths", "end_to_end"} & kinds(small)


def test_nothing_checked_is_one_sentence_and_status_1(capsys):
    assert driver._verdict([{"kind": "attention", "ours": True, "failed": False, "errors": None}]) == 1
    assert "No result was checked" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["not json", '{"schema": 1, "size": "quick", "complete": true, "rows": []}'])
def test_a_file_of_another_version_in_the_way_is_one_sentence_and_status_2(small, monkeypatch, capsys, text):
    small.parent.mkdir()
    small.write_text(text)
    assert run(monkeypatch) == 2
    told = capsys.readouterr().err
    assert "is not a result file of this version" in told
    assert told.count("\n") == 1
    assert small.read_text() == text


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda model: model._replace(weights={**model.weights, "extra": torch.zeros(1)}), "no place for extra"),
        (lambda model: (_ for _ in ()).throw(ConnectionError("no hub")), "no hub"),
    ],
    ids=["another architecture", "unreachable"],
)
def test_a_model_that_cannot_be_used_is_one_sentence_and_status_2(small, monkeypatch, capsys, change, sentence):
    monkeypatch.setattr(driver.pretrained, "load", lambda name: change(tiny_model()))
    assert run(monkeypatch) == 2
    told = capsys.readouterr().err
    assert sentence in told
    assert told.count("\n") == 1
    assert not small.exists()


class Cut(Exception):
    """What stands for Ctrl-C."""


def cut(*_):
    raise Cut


def test_a_cut_run_is_gone_on_with_unless_fresh(small, monkeypatch, capsys):
    save = driver.picture.save
    monkeypatch.setattr(driver.picture, "save", cut)
    with pytest.raises(Cut):
        run(monkeypatch)

    monkeypatch.setattr(attention, "race", cut)
    with pytest.raises(Cut):  # in the picture again, with no new race
        run(monkeypatch)
    assert "of a cut run" in capsys.readouterr().out
    assert "attention" in kinds(small)

    monkeypatch.setattr(driver.picture, "save", save)
    with pytest.raises(Cut):
        run(monkeypatch, "--fresh")
    begun = small.with_stem("run-2")
    assert not begun.with_suffix(".png").exists()
    assert kinds(begun) == {"registers", "norms", "features", "roofline"}
    assert "attention" in kinds(small)
