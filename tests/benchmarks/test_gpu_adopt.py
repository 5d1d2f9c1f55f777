"""What a result file makes the default: the backend that won everywhere and was right everywhere, and no other."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import results
from benchmarks.gpu import adopt, configs
from benchmarks.results import Writer
from vitreg_kernels._runtime import tuning

RIGHT = {"max": 1e-3, "mean": 1e-4, "eager_max": 2e-3, "eager_mean": 2e-4, "passed": True}
WRONG = RIGHT | {"max": 1.0, "passed": False}
SIZE = "16-bit,64,272"


def race(variant, median_ms, **changes):
    fields = {
        "kind": "race",
        "variant": variant,
        "ours": variant.startswith("vitreg:"),
        "default": variant == "vitreg:sdpa",
        "reason": None,
        "failed": False,
        "layout": "packed",
        "mode": "forward+backward",
        "dtype": "bf16",
        "batch": 64,
        "heads": 16,
        "tokens": 261,
        "prefix_tokens": 5,
        "head_dim": 64,
        "flops": 1,
        "bytes": 1,
        "median_ms": median_ms,
        "p20_ms": median_ms,
        "p80_ms": median_ms,
        "samples": 9,
        "ns_per_head": 1.0,
        "tflops": 1.0,
        "gbps": 1.0,
        "roofline_ns": 1.0,
        "roofline_fraction": 1.0,
        "best_peer": None,
        "speedup": None,
        "errors": {"output": RIGHT},
    }
    return fields | changes


def accuracy(backend="triton", **changes):
    fields = {
        "kind": "accuracy",
        "backend": backend,
        "case": "261 tokens",
        "dtype": "bf16",
        "reasons": [],
        "crash": None,
        "deterministic": True,
        "seconds": 1.0,
        "errors": {"output": RIGHT},
    }
    return fields | changes


def both(triton_ms, sdpa_ms, **changes):
    return [race("vitreg:triton", triton_ms, **changes), race("vitreg:sdpa", sdpa_ms, **changes)]


WON = [*both(1.0, 2.0), *both(1.0, 2.0, tokens=201), *both(1.0, 2.0, layout="separate"), accuracy()]


def test_what_won_everywhere_and_passed_is_the_default():
    assert adopt.fastest(WON) == {SIZE: "triton"}


@pytest.mark.parametrize(
    "rows",
    [
        [accuracy(case="201 tokens", errors={"output": RIGHT, "grad_key": WRONG})],
        [accuracy(dtype="fp16", errors={"output": WRONG})],
        [accuracy(case="201 tokens", errors=None, deterministic=None, crash="IndexError: out of its bounds")],
        [accuracy(case="201 tokens", deterministic=False)],
        both(2.1, 2.0, layout="separate", tokens=201),
        [race("vitreg:triton", None, layout="separate", tokens=201, reason="broke", failed=True, errors=None)],
        [race("vitreg:triton", 1.0, mode="forward", errors={"output": WRONG})],
    ],
    ids=[
        "wrong in another case",
        "wrong in the other half precision",
        "crashed in another case",
        "not deterministic",
        "slower in one case",
        "broke in one case",
        "wrong in a race that does not count",
    ],
)
def test_one_blot_leaves_it_to_sdpa(rows):
    assert adopt.fastest(WON + rows) == {SIZE: "sdpa"}


@pytest.mark.parametrize(
    "rows",
    [
        [accuracy(dtype="fp32", errors={"output": WRONG}), accuracy(dtype="tf32", errors={"output": WRONG})],
        [accuracy(case="additive mask", errors=None, deterministic=None, reasons=["does not support additive masks"])],
        [accuracy(backend="sdpa", errors={"output": WRONG})],
        both(3.0, 2.0, mode="forward"),
        both(3.0, 2.0, layout="multicrop", tokens=954),
        [race("torch:cudnn", 0.5), race("vitreg:xformers", 0.5)],
    ],
    ids=["other dtypes", "a case it does not serve", "another's errors", "forward alone", "packs", "never a default"],
)
def test_what_does_not_count(rows):
    assert adopt.fastest(WON + rows) == {SIZE: "triton"}


def test_never_judged_is_not_passed():
    assert adopt.fastest(WON[:-1]) == {SIZE: "sdpa"}
    only_refused = accuracy(errors=None, deterministic=None, reasons=["runs on cuda, not on cpu"])
    assert adopt.fastest([*WON[:-1], only_refused]) == {SIZE: "sdpa"}


def test_sizes_are_chosen_one_by_one():
    rows = [
        *WON,
        *both(2.0, 1.0, tokens=1029),
        *both(1.0, 2.0, tokens=54),
        *both(2.0, 1.0, head_dim=128),
        *both(1.0, 2.0, dtype="fp32"),
    ]
    expected = {
        SIZE: "triton",
        "16-bit,64,2048": "sdpa",
        "16-bit,64,64": "triton",
        "16-bit,128,272": "sdpa",
        "32-bit,64,272": "sdpa",  # never judged in fp32
    }
    assert adopt.fastest(rows) == expected


@pytest.fixture
def file(tmp_path, machine):
    """Writes rows as a GPU's result file."""

    def file(rows, capability="sm_90"):
        path = tmp_path / "run.json"
        path.unlink(missing_ok=True)
        writer = Writer(path, {"command": "gpu"}, machine | {"capability": capability})
        writer.extend(rows)
        return path

    return file


def test_the_command_writes_what_dispatch_reads_and_leaves_the_rest(file, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "configs"
    tiles = {"attention": {"forward": {SIZE: {"block_m": 64, "block_n": 64, "num_warps": 4, "num_stages": 2}}}}
    configs.merge(folder, 90, tiles | {"fastest": {SIZE: "sdpa", "16-bit,64,2048": "triton"}})
    configs.merge(folder, 80, {"fastest": {SIZE: "sdpa"}})
    monkeypatch.setattr(tuning, "CONFIGS", folder)
    assert adopt.main([str(file(WON))]) == 0
    assert f"{SIZE}: triton" in capsys.readouterr().out
    table = json.loads((folder / "sm90.json").read_text())
    assert table == tiles | {"fastest": {SIZE: "triton", "16-bit,64,2048": "triton"}}
    assert json.loads((folder / "sm80.json").read_text()) == {"fastest": {SIZE: "sdpa"}}
    assert sorted(f.name for f in folder.iterdir()) == ["sm80.json", "sm90.json"]
    monkeypatch.setattr(tuning, "_TABLES", tuning.read_tables(folder))
    assert tuning.fastest(90, torch.float16, 64, "272") == "triton"
    assert tuning.fastest(80, torch.float16, 64, "272") == "sdpa"
    assert tuning.fastest(100, torch.float16, 64, "272") is None


def test_a_default_that_broke_since_is_taken_back(file, tmp_path):
    folder = tmp_path / "configs"
    adopt.adopt(file(WON), folder)
    adopt.adopt(file([*WON, accuracy(case="201 tokens", crash="boom", errors=None, deterministic=None)]), folder)
    assert tuning.read_tables(folder)[90]["fastest"] == {SIZE: "sdpa"}


@pytest.mark.parametrize(
    ("rows", "capability", "told"),
    [
        (WON, "AVX2", "must be of a run on a GPU, not on AVX2"),
        ([accuracy()], "sm_90", "holds no forward"),
    ],
    ids=["a CPU's", "no races"],
)
def test_a_file_that_settles_nothing_is_refused(file, tmp_path, monkeypatch, capsys, rows, capability, told):
    monkeypatch.setattr(tuning, "CONFIGS", tmp_path / "configs")
    assert adopt.main([str(file(rows, capability))]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "configs").exists()


def test_no_such_file(tmp_path, capsys):
    assert adopt.main([str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err


def test_the_rows_here_are_those_of_the_stages(machine):
    for row in (*both(1.0, 2.0), accuracy()):
        results.validate(row | {"machine": machine})
