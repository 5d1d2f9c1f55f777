"""What a result file makes the default: the backend that won everywhere and was right everywhere, and no other."""

from __future__ import annotations

import pytest

from benchmarks import results
from benchmarks.gpu import adopt
from benchmarks.results import Writer
from vitreg_kernels.dispatch import tables
from vitreg_kernels.dispatch.tables import Default, Key

RIGHT = {"max": 1e-3, "mean": 1e-4, "eager_max": 2e-3, "eager_mean": 2e-4, "passed": True}
WRONG = RIGHT | {"max": 1.0, "passed": False}
SIZE = Key("attention", "sm_90", 16, 64, 272, 0, ())  # 64 x 16 heads are more than the last bucket


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


def one(triton_ms, sdpa_ms, **changes):
    return [race("vitreg:triton", triton_ms, **changes), race("vitreg:sdpa", sdpa_ms, **changes)]


def both(triton_ms, sdpa_ms, **changes):
    """Races of both modes."""
    return [row for mode in ("forward", "forward+backward") for row in one(triton_ms, sdpa_ms, mode=mode, **changes)]


WON = [*both(1.0, 2.0), *both(1.0, 2.0, tokens=201), *both(1.0, 2.0, layout="separate"), accuracy()]


def test_what_won_everywhere_and_passed_is_the_default():
    assert adopt.defaults(WON, "sm_90") == {SIZE: "triton"}


@pytest.mark.parametrize(
    "rows",
    [
        [accuracy(case="201 tokens", errors={"output": RIGHT, "grad_key": WRONG})],
        [accuracy(dtype="fp16", errors={"output": WRONG})],
        [accuracy(case="201 tokens", errors=None, deterministic=None, crash="IndexError: out of its bounds")],
        [accuracy(case="201 tokens", deterministic=False)],
        one(2.1, 2.0, layout="separate", tokens=201),
        one(2.1, 2.0, layout="separate", tokens=201, mode="forward"),
        [race("vitreg:triton", 1.0, layout="separate", tokens=201)],
        [race("vitreg:triton", None, layout="separate", tokens=201, reason="broke", failed=True, errors=None)],
        [race("vitreg:triton", 1.0, layout="multicrop", errors={"output": WRONG})],
    ],
    ids=[
        "wrong in another case",
        "wrong in the other half precision",
        "crashed in another case",
        "not deterministic",
        "slower in one case",
        "slower forward",
        "sdpa was not raced",
        "broke in one case",
        "wrong in a race that does not count",
    ],
)
def test_one_blot_leaves_it_to_sdpa(rows):
    assert adopt.defaults(WON + rows, "sm_90") == {SIZE: "sdpa"}


@pytest.mark.parametrize(
    "rows",
    [
        [accuracy(dtype="fp32", errors={"output": WRONG}), accuracy(dtype="tf32", errors={"output": WRONG})],
        [accuracy(case="additive mask", errors=None, deterministic=None, reasons=["does not support additive masks"])],
        [accuracy(backend="sdpa", errors={"output": WRONG})],
        both(3.0, 2.0, layout="multicrop", tokens=954),
        [race("torch:cudnn", 0.5), race("vitreg:xformers", 0.5)],
    ],
    ids=["other dtypes", "a case it does not serve", "another's errors", "packs", "never a default"],
)
def test_what_does_not_count(rows):
    assert adopt.defaults(WON + rows, "sm_90") == {SIZE: "triton"}


@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
def test_a_run_that_was_cut_between_the_modes_settles_nothing(mode):
    rows = [row for row in WON if row.get("mode", mode) == mode]
    assert adopt.defaults(rows, "sm_90") == {SIZE: "sdpa"}


def test_never_judged_is_not_passed():
    assert adopt.defaults(WON[:-1], "sm_90") == {SIZE: "sdpa"}
    only_refused = accuracy(errors=None, deterministic=None, reasons=["runs on cuda, not on cpu"])
    assert adopt.defaults([*WON[:-1], only_refused], "sm_90") == {SIZE: "sdpa"}


def test_sizes_are_chosen_one_by_one():
    rows = [
        *WON,
        *both(2.0, 1.0, tokens=1029),
        *both(1.0, 2.0, tokens=54),
        *both(2.0, 1.0, head_dim=128),
        *both(1.0, 2.0, dtype="fp32"),
        *both(2.0, 1.0, batch=8),
        *both(2.0, 1.0, tokens=4096),
    ]
    expected = {
        SIZE: "triton",
        SIZE._replace(tokens=2048): "sdpa",
        SIZE._replace(tokens=64): "triton",
        SIZE._replace(width=128): "sdpa",
        SIZE._replace(bits=32): "sdpa",  # never judged in fp32
        SIZE._replace(heads=128): "sdpa",
        SIZE._replace(tokens=0): "sdpa",
    }
    assert adopt.defaults(rows, "sm_90") == expected


@pytest.fixture
def file(tmp_path, machine):
    """Writes rows as a GPU's result file."""

    def file(rows, capability="sm_90"):
        path = tmp_path / "run-2026-12-01.json"
        path.unlink(missing_ok=True)
        writer = Writer(path, {"command": "gpu"}, machine | {"capability": capability})
        writer.extend(rows)
        return path

    return file


def test_the_command_writes_what_dispatch_reads_and_leaves_the_rest(file, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "configs"
    tiles = [{"kernel": "forward", "block_m": 64}]
    tables.merge(folder, "sm_90", "attention_tiles", tiles, ["kernel"])
    longer, other = SIZE._replace(tokens=2048), SIZE._replace(device="sm_80")
    tables.adopt(folder, {key: Default("sdpa", "2026-01-01") for key in (SIZE, longer, other)})
    monkeypatch.setattr(tables, "CONFIGS", folder)
    assert adopt.main([str(file(WON))]) == 0
    assert "attention on sm_90, 16 bits, width 64, up to 272 tokens, over 512 heads: triton" in capsys.readouterr().out
    assert tables.read(folder, "attention_tiles") == {"sm_90": tiles}
    assert sorted(f.name for f in folder.iterdir()) == ["sm_80.json", "sm_90.json"]
    assert tables.defaults(tables.read(folder, "defaults")) == {
        SIZE: Default("triton", "2026-12-01"),
        longer: Default("sdpa", "2026-01-01"),
        other: Default("sdpa", "2026-01-01"),
    }


def test_a_default_that_broke_since_is_taken_back(file, tmp_path):
    folder = tmp_path / "configs"
    adopt.adopt(file(WON), folder)
    adopt.adopt(file([*WON, accuracy(case="201 tokens", crash="boom", errors=None, deterministic=None)]), folder)
    assert {k: row.backend for k, row in tables.defaults(tables.read(folder, "defaults")).items()} == {SIZE: "sdpa"}


def norm_race(variant, median_ms, **changes):
    fields = {
        "kind": "residual_norm",
        "variant": variant,
        "ours": True,
        "reason": None,
        "failed": False,
        "norm": "LayerNorm",
        "dtype": "bf16",
        "mode": "forward",
        "batch": 64,
        "tokens": 261,
        "channels": 768,
        "memory": "any",
        "bytes": 1,
        "copy_gbps": 1.0,
        "median_ms": median_ms,
        "p20_ms": median_ms,
        "p80_ms": median_ms,
        "samples": 9,
        "gbps": 1.0,
        "copy_fraction": 1.0,
        "best_peer": None,
        "speedup": None,
        "errors": {"normalized": RIGHT},
    }
    return fields | changes


NORM = Key("residual_norm", "sm_90", 16, 768, 272, 128, ())


def norms(forward, backward, **judged):
    """Races of both modes, each (ours, torch's) in milliseconds, and a judgement."""
    races = [
        norm_race(f"vitreg:{name}", ms, mode=mode)
        for mode, times in (("forward", forward), ("backward", backward))
        for name, ms in zip(("triton", "composite"), times, strict=True)
    ]
    return [*races, accuracy(**{"kind": "norm_accuracy", "backend": "residual_norm:triton", **judged})]


@pytest.mark.parametrize(
    ("rows", "winner"),
    [
        (norms((1.0, 2.0), (1.0, 2.0)), "triton"),
        (norms((1.0, 2.0), (2.1, 2.0)), "composite"),
        (norms((1.0, 2.0), (1.0, 2.0), errors={"grad_x": WRONG}), "composite"),
        (norms((1.0, 2.0), (1.0, 2.0), backend="token_norms:triton"), "composite"),
        (norms((None, 2.0), (1.0, 2.0)), "composite"),
        (norms((1.0, None), (1.0, 2.0)), "composite"),
        ([row for row in norms((1.0, 2.0), (1.0, 2.0)) if row.get("mode") != "backward"], "composite"),
    ],
    ids=["won both", "slower backward", "wrong", "never judged", "not raced", "torch's not raced", "forward alone"],
)
def test_norms_have_rows_too(rows, winner):
    assert adopt.defaults(rows, "sm_90") == {NORM: winner}


@pytest.mark.parametrize(
    ("rows", "capability", "told"),
    [
        (WON, "AVX2", "must be of a run on a GPU, not on AVX2"),
        ([accuracy()], "sm_90", "holds no race that counts"),
    ],
    ids=["a CPU's", "no races"],
)
def test_a_file_that_settles_nothing_is_refused(file, tmp_path, monkeypatch, capsys, rows, capability, told):
    monkeypatch.setattr(tables, "CONFIGS", tmp_path / "configs")
    assert adopt.main([str(file(rows, capability))]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "configs").exists()


def test_no_such_file(tmp_path, capsys):
    assert adopt.main([str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err


def test_the_rows_here_are_those_of_the_stages(machine):
    for row in (*both(1.0, 2.0), accuracy(), *norms((1.0, 2.0), (1.0, 2.0))):
        results.validate(row | {"machine": machine})
