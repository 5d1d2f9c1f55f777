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
# 64 x 16 heads are more than the last bucket.
SIZE = Key("attention", "sm_90", "bfloat16", 64, 272, 0, False, "packed projection", ())
TRAINING = SIZE._replace(gradients=True)


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


def stage(name="accuracy", unfinished=0, error=None):
    return {"kind": "stage", "stage": name, "seconds": 1.0, "unfinished": unfinished, "error": error}


def one(triton_ms, sdpa_ms, **changes):
    return [race("vitreg:triton", triton_ms, **changes), race("vitreg:sdpa", sdpa_ms, **changes)]


def both(triton_ms, sdpa_ms, **changes):
    """Races of both modes."""
    return [row for mode in ("forward", "forward+backward") for row in one(triton_ms, sdpa_ms, mode=mode, **changes)]


WON = [*both(1.0, 2.0), *both(1.0, 2.0, tokens=201), *both(1.0, 2.0, batch=128), accuracy(), stage(), stage("race")]


def test_what_won_everywhere_and_passed_is_the_default():
    assert adopt.defaults(WON, "sm_90") == {SIZE: "triton", TRAINING: "triton"}


@pytest.mark.parametrize(
    "rows",
    [
        [accuracy(case="201 tokens", errors={"output": RIGHT, "grad_key": WRONG})],
        [accuracy(dtype="fp16", errors={"output": WRONG})],
        [accuracy(case="201 tokens", errors=None, deterministic=None, crash="IndexError: out of its bounds")],
        [accuracy(case="201 tokens", deterministic=False)],
        both(1.96, 2.0, tokens=201, batch=128),
        [race("vitreg:triton", 1.0, tokens=201, batch=128, mode=m) for m in ("forward", "forward+backward")],
        [race("vitreg:triton", None, tokens=201, batch=128, reason="broke", failed=True, errors=None)],
        [race("vitreg:triton", 1.0, layout="multicrop", errors={"output": WRONG})],
    ],
    ids=[
        "wrong in another case",
        "wrong in the other half precision",
        "crashed in another case",
        "not deterministic",
        "no clear lead in one case",
        "sdpa was not raced",
        "broke in one case",
        "wrong in a race that does not count",
    ],
)
def test_one_blot_leaves_it_to_sdpa(rows):
    assert adopt.defaults(WON + rows, "sm_90") == {SIZE: "sdpa", TRAINING: "sdpa"}


@pytest.mark.parametrize("last", [stage(unfinished=1), stage(unfinished=None, error="boom"), None], ids=str)
def test_a_stage_that_was_not_finished_settles_nothing(last):
    """The case that was not reached may be the one that fails; what was settled before stays."""
    rows = [row for row in WON if row.get("stage") != "accuracy"] + [row for row in [last] if row]
    assert adopt.defaults(rows, "sm_90") == {}
    assert set(adopt.defaults([*rows, stage()], "sm_90").values()) == {"triton"}


def test_a_race_that_was_not_finished_settles_nothing():
    """One of the lengths of a bucket may be what it loses at."""
    assert adopt.defaults([*WON, stage("race", unfinished=3)], "sm_90") == {}


def test_what_the_memory_checker_found_forbids_our_attention_alone():
    found = {"kind": "memcheck", "reason": None, "failed": True, "report": "Invalid __global__ read", "seconds": 9.0}
    assert set(adopt.defaults([*WON, found], "sm_90").values()) == {"sdpa"}
    assert set(adopt.defaults([*norms((1.0, 2.0), (1.0, 2.0)), found], "sm_90").values()) == {"triton"}
    unknown = found | {"failed": False, "report": "", "reason": "it is not installed"}
    assert set(adopt.defaults([*WON, unknown], "sm_90").values()) == {"triton"}


@pytest.mark.parametrize(("backend", "follows"), [("triton", "sdpa"), ("another", "triton")])
def test_what_the_smoke_test_found_of_a_backend_forbids_that_one_alone(backend, follows):
    smoked = {"kind": "smoke", "backend": backend, "dtype": "bf16", "batch": 1, "heads": 2, "tokens": 54}
    found = smoked | {"reason": None, "failed": False, "errors": {"output": WRONG}}
    assert set(adopt.defaults([*WON, found], "sm_90").values()) == {follows}


@pytest.mark.parametrize("where", ["accuracy", "race"])
def test_what_broke_settles_nothing(where):
    broken = {"kind": "broken", "stage": where, "piece": "261 tokens", "reason": "hung"}
    assert adopt.defaults([*WON, broken], "sm_90") == {}
    assert adopt.defaults([*WON, broken | {"stage": "models"}], "sm_90")


@pytest.mark.parametrize(("gradients", "mode"), [(False, "forward"), (True, "forward+backward")])
def test_with_gradients_and_without_are_settled_apart(gradients, mode):
    rows = WON + one(2.1, 2.0, tokens=201, batch=128, mode=mode)
    lost, won = (TRAINING, SIZE) if gradients else (SIZE, TRAINING)
    assert adopt.defaults(rows, "sm_90") == {lost: "sdpa", won: "triton"}


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
    assert adopt.defaults(WON + rows, "sm_90") == {SIZE: "triton", TRAINING: "triton"}


@pytest.mark.parametrize(("mode", "key"), [("forward", SIZE), ("forward+backward", TRAINING)])
def test_a_run_that_was_cut_between_the_modes_settles_one(mode, key):
    rows = [row for row in WON if row.get("mode", mode) == mode]
    assert adopt.defaults(rows, "sm_90") == {key: "triton"}


def test_never_judged_is_not_passed():
    rows = [row for row in WON if row["kind"] != "accuracy"]
    assert set(adopt.defaults(rows, "sm_90").values()) == {"sdpa"}
    for judged in (
        accuracy(errors=None, deterministic=None, reasons=["runs on cuda, not on cpu"]),
        accuracy(dtype="fp16"),
    ):
        assert set(adopt.defaults([*rows, judged], "sm_90").values()) == {"sdpa"}


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
        SIZE._replace(dtype="float32"): "sdpa",  # never judged in fp32
        SIZE._replace(heads=128): "sdpa",
        SIZE._replace(tokens=0): "sdpa",
    }
    both_modes = {key._replace(gradients=gradients): name for key, name in expected.items() for gradients in (0, 1)}
    assert adopt.defaults(rows, "sm_90") == both_modes


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
    shown = capsys.readouterr().out
    assert "attention on sm_90, bfloat16, width 64, up to 272 tokens, over 512 heads, training: triton" in shown
    assert tables.read(folder, "attention_tiles") == {"sm_90": tiles}
    assert sorted(f.name for f in folder.iterdir()) == ["sm_80.json", "sm_90.json"]
    assert tables.defaults(tables.read(folder, "defaults")) == {
        SIZE: Default("triton", "2026-12-01"),
        TRAINING: Default("triton", "2026-12-01"),
        longer: Default("sdpa", "2026-01-01"),
        other: Default("sdpa", "2026-01-01"),
    }


def test_a_default_that_broke_since_is_taken_back(file, tmp_path):
    folder = tmp_path / "configs"
    adopt.adopt(file(WON), folder)
    adopt.adopt(file([*WON, accuracy(case="201 tokens", crash="boom", errors=None, deterministic=None)]), folder)
    found = tables.defaults(tables.read(folder, "defaults"))
    assert {key: row.backend for key, row in found.items()} == {SIZE: "sdpa", TRAINING: "sdpa"}


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


NORM = Key(
    "residual_norm", "sm_90", "bfloat16", 768, 272, 128, False, "LayerNorm, bfloat16 scaled branch to bfloat16", ()
)


def norms(forward, backward, **judged):
    """Races of both modes, each (ours, torch's) in milliseconds, and a judgement."""
    races = [
        norm_race(f"vitreg:{name}", ms, mode=mode)
        for mode, times in (("forward", forward), ("backward", backward))
        for name, ms in zip(("triton", "composite"), times, strict=True)
    ]
    judgement = accuracy(**{"kind": "norm_accuracy", "backend": "residual_norm:triton", **judged})
    return [*races, judgement, stage("norms")]


@pytest.mark.parametrize(
    ("rows", "forward", "training"),
    [
        (norms((1.0, 2.0), (1.0, 2.0)), "triton", "triton"),
        (norms((1.0, 2.0), (2.1, 2.0)), "triton", "composite"),
        (norms((2.1, 2.0), (1.0, 2.0)), "composite", "composite"),
        (norms((1.0, 2.0), (1.0, 2.0), errors={"grad_x": WRONG}), "composite", "composite"),
        (norms((1.0, 2.0), (1.0, 2.0), backend="token_norms:triton"), "composite", "composite"),
        (norms((None, 2.0), (1.0, 2.0)), "composite", "composite"),
        (norms((1.0, None), (1.0, 2.0)), "composite", "composite"),
    ],
    ids=["won both", "slow backward", "slow forward", "wrong", "never judged", "not raced", "torch's not"],
)
def test_norms_have_rows_too(rows, forward, training):
    assert adopt.defaults(rows, "sm_90") == {NORM: forward, NORM._replace(gradients=True): training}


def test_a_run_that_was_cut_before_the_backward_settles_the_forward():
    rows = [row for row in norms((1.0, 2.0), (1.0, 2.0)) if row.get("mode") != "backward"]
    assert adopt.defaults(rows, "sm_90") == {NORM: "triton"}


def test_layouts_are_calls_of_two_kinds():
    rows = WON + both(2.0, 1.0, layout="separate")
    separate = {key._replace(variant="separate"): "sdpa" for key in (SIZE, TRAINING)}
    assert adopt.defaults(rows, "sm_90") == {SIZE: "triton", TRAINING: "triton", **separate}


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
    broken = {"kind": "broken", "stage": "race", "piece": "261 tokens", "reason": "hung"}
    for row in (broken, stage(), *both(1.0, 2.0), accuracy(), *norms((1.0, 2.0), (1.0, 2.0))):
        results.validate(row | {"machine": machine})
