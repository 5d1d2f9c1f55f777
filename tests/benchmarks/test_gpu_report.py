"""Table, picture and summary of GPU runs, from rows with figures made up here."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import results
from benchmarks.gpu import environment, pieces, report, stage
from benchmarks.results import Writer
from benchmarks.roofline import Roofline

pytest.importorskip("matplotlib", reason="the benchmark's own package: pip install 'vitreg_kernels[bench]'")

stage.load()


@pytest.fixture
def gpu(machine):
    return {**machine, "device": "NVIDIA H200", "capability": "sm_90"}


@pytest.fixture
def rows(gpu, tmp_path):
    """Of a whole run on a GPU, as a file gives them back."""
    writer = Writer(tmp_path / "nvidia-h200-2030-01-02.json", {"command": "gpu"}, gpu)
    writer.extend(made_up_rows())
    return results.load(writer.path)


def made_up_rows():
    blank = {"driver": "600.1", "cuda": "13.0", "cudnn": None, "power_limit_w": 700.0, "sm_clock_mhz": 1980.0}
    yield {
        "kind": "environment",
        "multiprocessors": 132,
        "l2_bytes": 60 * 2**20,
        "memory_bytes": 139 * 2**30,
        **blank,
        "memory_clock_mhz": 3201.0,
        "peers": {"xformers": "0.0.99"},
    }
    yield {"kind": "roofline", **Roofline({"fp32": 5e4, "bf16": 7e5}, 4000.0)._asdict()}
    for dtype, passed in (("bf16", True), ("fp16", False)):
        yield accuracy_row("triton", dtype, {"output": error(True), "grad_key": error(passed)})
    yield accuracy_row("xformers", "bf16", None) | {"reasons": ["cannot be imported"], "deterministic": None}
    for tokens in (201, 261):
        for mode in report.MODES:
            yield race_row("vitreg:triton", tokens, mode, 0.03, ours=True, speedup=1.5)
            yield race_row("vitreg:sdpa", tokens, mode, 0.05, ours=True, default=True, speedup=0.9)
            yield race_row("torch:cudnn", tokens, mode, 0.045)
            yield race_row("flash_attn:3", tokens, mode, None, reason="not installed: pip it\nsecond line")
    yield race_row("vitreg:triton", 261, "forward", 0.04, ours=True, dtype="fp32") | {
        "errors": {"output": error(False)}
    }
    yield race_row("vitreg:triton", 954, "forward", None, ours=True, layout="multicrop") | {
        "reason": "IndexError: out of its bounds",
        "failed": True,
    }
    yield race_row("torch:flash", 954, "forward", 0.06, layout="multicrop")
    yield outputs_row(("lse",), 1.25, None)
    yield outputs_row((), 1.0, None)
    yield outputs_row(("received_attention",), 1.375, 1.35)
    yield norm_row("vitreg:triton", 384, 0.02, ours=True, speedup=1.5)
    yield norm_row("vitreg:triton", 768, 0.04, ours=True, speedup=1.5, errors={"residual": error(False)})
    yield norm_row("torch:compile", 384, 0.03)
    yield norm_row("xformers", 384, None, reason="has no LayerNorm")
    yield norm_accuracy_row("residual_norm:triton", {"normalized": error(True), "grad_x": error(False)})
    yield norm_accuracy_row("assemble:triton", {"tokens": error(True)})
    yield model_row("vitreg: triton", True, 100.0, 1.17)
    yield model_row("own: cudnn", False, 117.0, 1.0)
    yield model_row("vitreg: wrong", True, 90.0, 1.3) | {"errors": {"features": error(True), "grad_qkv": error(False)}}
    yield model_row("vitreg: default", True, None, None) | {"reason": "ran out of memory at a batch of 64"}
    yield tuning_row(best=tiles(128, whole_head=True), speedup=1.25, rule_ms=[1.0, 1.0], best_ms=[0.5, 0.8])
    yield tuning_row("statistics", wrong=["Tiles(...): received_attention at 261 tokens"])
    yield tuning_row("grad_query", reason="IndexError: no | way", failed=True)
    yield {"kind": "stage", "stage": "accuracy", "seconds": None, "unfinished": None, "error": None}
    yield {"kind": "stage", "stage": "norms", "seconds": None, "unfinished": None, "error": None}
    yield pieces.row("race", "N=54 bf16 forward", "hung, and its process was ended")
    yield smoke_row({"output": error(True), "grad_key": error(False)})
    yield smoke_row(None) | {"reason": "IndexError: out of its bounds", "failed": True}
    yield {"kind": "memcheck", "reason": None, "failed": True, "report": "===== Invalid read\n= of 2", "seconds": 9.0}
    yield {"kind": "stage", "stage": "accuracy", "seconds": 89.7, "unfinished": 12, "error": None}
    yield {"kind": "stage", "stage": "race", "seconds": 3.0, "unfinished": None, "error": "IndexError: no | way"}


def error(passed):
    return {"max": 1e-3, "mean": 1e-4, "eager_max": 1e-3, "eager_mean": 1e-4, "passed": passed}


def accuracy_row(backend, dtype, errors):
    return {
        "kind": "accuracy",
        "backend": backend,
        "case": "261 tokens",
        "dtype": dtype,
        "reasons": [],
        "crash": None,
        "deterministic": True,
        "seconds": 1.0,
        "errors": errors,
    }


def race_row(variant, tokens, mode, ms, *, layout="packed", dtype="bf16", **changes):
    per_head = None if ms is None else 1e6 * ms / 1024
    return {
        "kind": "race",
        "variant": variant,
        "ours": False,
        "default": False,
        "reason": None,
        "failed": False,
        "layout": layout,
        "mode": mode,
        "dtype": dtype,
        "batch": 64,
        "heads": 16,
        "tokens": tokens,
        "prefix_tokens": 5,
        "head_dim": 64,
        "flops": 10**10,
        "bytes": 10**8,
        "median_ms": ms,
        "p20_ms": ms,
        "p80_ms": ms,
        "samples": ms and 9,
        "ns_per_head": per_head,
        "tflops": ms and 10 / ms,
        "gbps": ms and 100 / ms,
        "roofline_ns": 20.0,
        "roofline_fraction": ms and 20.0 / per_head,
        "best_peer": "torch:cudnn",
        "speedup": ms and 1.0,
        "errors": ms and {"output": error(True)},
        **changes,
    }


def norm_row(variant, channels, ms, **changes):
    return {
        "kind": "residual_norm",
        "variant": variant,
        "ours": False,
        "reason": None,
        "failed": False,
        "norm": "LayerNorm",
        "dtype": "bf16",
        "mode": "forward",
        "batch": 64,
        "tokens": 261,
        "channels": channels,
        "bytes": 10**8,
        "memory": "any",
        "copy_gbps": 4000.0,
        "median_ms": ms,
        "p20_ms": ms,
        "p80_ms": ms,
        "samples": ms and 9,
        "gbps": ms and 60 / ms,
        "copy_fraction": ms and 60 / ms / 4000,
        "best_peer": "torch:compile",
        "speedup": ms and 1.0,
        "errors": ms and {"residual": error(True)},
        **changes,
    }


def norm_accuracy_row(backend, errors):
    row = accuracy_row(backend, "bf16", errors)
    return row | {"kind": "norm_accuracy", "case": "64 x 261 x 1024"}


def outputs_row(outputs, ratio, goal):
    return {
        "kind": "outputs",
        "backend": "triton",
        "outputs": list(outputs),
        "reason": None,
        "failed": False,
        "dtype": "bf16",
        "batch": 64,
        "heads": 16,
        "tokens": 261,
        "prefix_tokens": 5,
        "head_dim": 64,
        "median_ms": 0.04,
        "p20_ms": 0.04,
        "p80_ms": 0.04,
        "samples": 9,
        "ratio": ratio,
        "goal": goal,
    }


def model_row(attention, ours, ms, speedup):
    return {
        "kind": "model",
        "model": "vit_large_patch14_reg4_dinov2",
        "attention": attention,
        "ours": ours,
        "mode": "training",
        "compiled": False,
        "batch": 64,
        "tokens": 261,
        "dtype": "bf16",
        "goal": 1.15,
        "reason": None,
        "failed": False,
        "median_ms": ms,
        "p20_ms": ms,
        "p80_ms": ms,
        "samples": ms and 9,
        "images_per_s": ms and 64e3 / ms,
        "best_own": "own: cudnn",
        "speedup": speedup,
        "peak_memory_bytes": ms and 10**10,
        "errors": ms and {"features": error(True)},
    }


def tiles(block_m, whole_head=False):
    return {"block_m": block_m, "block_n": 64, "num_warps": 4, "num_stages": 2, "whole_head": whole_head}


def tuning_row(kernel="forward", **changes):
    return {
        "kind": "tuning",
        "kernel": kernel,
        "head_dim": 64,
        "tokens": [261, 201],
        "dtype": "bf16",
        "size": "16-bit,64,272",
        "reason": None,
        "failed": False,
        "rule": [tiles(64), tiles(64)],
        "best": None,
        "rule_ms": None,
        "best_ms": None,
        "speedup": None,
        "timed": 30,
        "left_out": 3,
        "wrong": [],
        **changes,
    }


def lines(text):
    """Table lines by their first cell, the last of a name winning."""
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.split("\n") if line[:2] == "| "]
    return {row[0]: row[1:] for row in cells}


def section(text, title):
    return text.partition(f"{title}\n")[2].partition("\n#")[0]


def test_the_machine_is_told(rows):
    told = lines(section(report.markdown(rows), "## Machine"))
    assert told["GPU"] == ["NVIDIA H200 (sm_90)"]
    assert told["L2"] == ["60 MiB"]
    assert told["driver, CUDA, cuDNN"] == ["600.1, 13.0, unknown"]
    assert told["peers"] == ["xformers 0.0.99"]
    assert told["sources"] == ["0123456789abcdef"]
    assert told["copy bandwidth"] == ["4000 GB/s"]
    assert told["matrix product of random data"] == ["TFLOP/s: fp32 50, bf16 700"]


def test_accuracy_is_counted_and_what_fails_is_named(rows):
    told = section(report.markdown(rows), "## Accuracy")
    assert "| triton | bf16 | 1 | 0 | 0 | 2 | 1 of 1 |" in told
    assert "| triton | fp16 | 0 | 1 | 0 | 2 | 1 of 1 |" in told
    assert "| xformers | bf16 | 0 | 0 | 1 | 0 | 0 of 0 |" in told
    assert "- triton on 261 tokens in fp16: grad_key is 0.001 off" in told


def test_every_race_has_a_table_with_lengths_across(rows):
    text = report.markdown(rows)
    for mode in report.MODES:
        told = section(text, f"### packed, {mode}, bf16, head dim 64")
        assert "|  | N = 201 (B·H = 1024) | N = 261 (B·H = 1024) |" in told
        # 0.03 ms / 1024 = 29.3 ns; 10 GFLOP / 0.03 ms = 333 TFLOP/s; 20 ns / 29.3 ns = 68%
        assert lines(told)["vitreg:triton"] == ["29.3 ns, 333 TFLOP/s, 68%, 1.50x"] * 2
        assert lines(told)["vitreg:sdpa"][0].endswith("0.90x *")
        assert "flash_attn:3" not in told
    wrong = lines(section(text, "### packed, forward, fp32, head dim 64"))
    assert wrong["vitreg:triton"] == ["39.1 ns, 250 TFLOP/s, 51%, 1.00x FAIL"]
    crops = lines(section(text, "### multicrop, forward, bf16, head dim 64"))
    assert crops["vitreg:triton"] == ["FAIL"]


def test_the_goals_stand_beside_our_fastest(rows):
    told = lines(section(report.markdown(rows), "## The goals beside our fastest"))
    fastest = "29.3 by vitreg:triton"
    assert told["261"] == [
        f"{fastest} (goal 38), 1.50x",
        f"{fastest} (goal 110), 1.50x",
        f"{fastest} (goal 148), 1.50x",
    ]
    assert told["1029"] == ["- (goal 484)", "- (goal 1570)", "- (goal 2054)"]


def smoke_row(errors):
    return {
        "kind": "smoke",
        "backend": "triton",
        "dtype": "bf16",
        "batch": 64,
        "heads": 16,
        "tokens": 261,
        "head_dim": 64,
        "reason": None,
        "failed": False,
        "seconds": 0.5,
        "errors": errors,
    }


def test_what_was_wrong_from_the_start_and_what_broke_are_told(rows):
    text = report.markdown(rows)
    told = section(text, "## Smoke test")
    assert told.count("| triton | 261 | 1024 | bf16 | ") == told.count("| FAIL |") == 2
    assert "IndexError: out of its bounds" in told
    assert "Memory checker: ===== Invalid read = of 2." in told
    assert "- race, N=54 bf16 forward: hung, and its process was ended" in section(text, "## Broken")


def test_outputs_models_and_stages_are_told(rows):
    text = report.markdown(rows)
    assert "| triton | received_attention | 1.38 (goal 1.35) |" in section(text, "## Outputs")
    assert "| triton | lse | 1.25 |" in text
    models = section(text, "## Whole models")
    trained = "| vit_large_patch14_reg4_dinov2 | training | eager"
    assert f"{trained} | vitreg: triton | 64 | 261 | 100 | 640 | 1.17x | 1.15x |  |" in models
    assert f"{trained} | vitreg: wrong | 64 | 261 | 90 | 711 | 1.30x | 1.15x | FAIL |" in models
    assert "vitreg: default" not in models
    stages = section(text, "## Stages")
    assert "| accuracy | 90 | 12 |  |" in stages
    assert stages.count("| accuracy |") == 1  # how it began is told only where it did not end
    assert "| norms | cut | unknown |  |" in stages
    assert "| race | 3 | unknown | IndexError: no \\| way |" in stages


def test_norms_are_told(rows):
    text = report.markdown(rows)
    told = section(text, "### LayerNorm, forward, bf16, 64 x 261 tokens")
    assert "|  | C = 384 | C = 768 |" in told
    assert lines(told)["vitreg:triton"] == ["20 µs, 3000 GB/s, 75%, 1.50x", "40 µs, 1500 GB/s, 38%, 1.50x FAIL"]
    assert lines(told)["torch:compile"] == ["30 µs, 2000 GB/s, 50%, 1.00x", "-"]
    assert "xformers" not in told
    assert "- xformers, 1 of 1 norms: has no LayerNorm" in section(text, "## Not timed")
    accuracy = section(text, "## Accuracy")
    assert "| residual_norm:triton | bf16 | 0 | 1 | 0 | 2 | 1 of 1 |" in accuracy
    assert "| assemble:triton | bf16 | 1 | 0 | 0 | 1 | 1 of 1 |" in accuracy
    assert "- residual_norm:triton on 64 x 261 x 1024 in bf16: grad_x is 0.001 off" in accuracy


def test_a_sweep_is_told(rows):
    told = section(report.markdown(rows), "## Tiles")
    size, rule = "16-bit,64,272 | 261, 201", "64 x 64, 4 warps, 2 stages"
    better = "128 x 64, 4 warps, 2 stages, whole head | 1.25x"
    assert f"| forward | {size} | {rule} | {better} | 30 of 33 |  |" in told
    assert f"| grad_query | {size} | {rule} |  |  | 30 of 33 | FAIL IndexError: no \\| way |" in told
    assert "Faster, but wrong:\n- statistics, 16-bit,64,272: Tiles(...): received_attention at 261 tokens" in told


def test_who_was_not_timed_says_why(rows):
    told = section(report.markdown(rows), "## Not timed")
    assert "- flash_attn:3, 6 of 6 cases: not installed: pip it\n" in told
    assert "- vitreg:triton, 1 of 8 cases: FAIL IndexError: out of its bounds" in told
    assert "- vitreg: default, 1 of 1 models: ran out of memory at a batch of 64" in told


def test_no_word_of_a_dry_run_on_a_gpu_and_every_output_of_a_dry_run_says_so(rows, machine):
    assert "DRY RUN" not in report.markdown(rows)
    assert "DRY RUN" not in report.draw(rows).get_suptitle()
    dry = [row | {"machine": machine} for row in rows]
    assert "**DRY RUN" in report.markdown(dry)
    assert report.draw(dry).get_suptitle().startswith("DRY RUN")


def test_a_run_cut_at_any_row_has_a_report(rows):
    for end in range(1, len(rows)):
        assert report.markdown(rows[:end]).startswith("# vitreg_kernels on NVIDIA H200")


def test_the_picture_has_a_bar_for_each_contender_under_the_roofline(rows):
    figure = report.draw(rows)
    above, below = figure.axes
    assert [panel.get_title() for panel in (above, below)] == ["forward", "forward+backward"]
    for panel in (above, below):
        heights = {bars.get_label(): [bar.get_height() for bar in bars] for bars in panel.containers}
        assert heights == {
            "vitreg:triton": pytest.approx([333.3, 333.3], rel=1e-3),
            "vitreg:sdpa": pytest.approx([200, 200]),
            "torch:cudnn": pytest.approx([222.2, 222.2], rel=1e-3),
        }
        # 10 GFLOP / (20 ns x 1024)
        (first, second) = (line.get_segments()[0][:, 1] for line in panel.collections)
        assert list(first) == list(second) == pytest.approx([488.3, 488.3], rel=1e-3)


def test_table_and_picture_are_written_beside_the_file(rows, tmp_path):
    path = tmp_path / "nvidia-h200-2030-01-02.json"
    told = report.save(path, rows)
    assert path.with_suffix(".md").read_text() == report.markdown(rows) + "\n"
    assert path.with_suffix(".png").stat().st_size > 0
    assert told.splitlines()[-1].endswith(".png")


def test_without_matplotlib_the_picture_waits_and_says_for_what(rows, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    path = tmp_path / "run.json"
    told = report.save(path, rows)
    assert "draw it with: python -m benchmarks.gpu --report" in told.splitlines()[-1]
    assert path.with_suffix(".md").exists()
    assert not path.with_suffix(".png").exists()


def test_the_summary_without_results_names_what_is_not_measured(tmp_path):
    told = report.summary([])
    assert "sm_80, sm_90 and sm_100 have not been measured yet" in told
    assert "no GPU speed is claimed" in told


def test_the_summary_with_results_has_their_table_and_what_is_still_missing(rows, tmp_path, machine):
    gpu_file = tmp_path / "nvidia-h200-2030-01-02.json"
    for name, run in (("bench.json", {"command": "bench"}), ("dry-run-x.json", {"command": "gpu", "dry": "yes"})):
        Writer(tmp_path / name, run, machine).extend(list(made_up_rows()))
    told = report.summary([tmp_path / "bench.json", tmp_path / "dry-run-x.json", gpu_file])
    assert told.count("NVIDIA H200 (sm_90)") == 1
    assert "Some CPU" not in told
    assert lines(told)["261"][0] == "29.3 by vitreg:triton (goal 38), 1.50x"
    assert "**sm_80 and sm_100 have not been measured yet**." in told


def test_what_nvidia_smi_does_not_tell_is_none(monkeypatch):
    class Done:
        stdout = "600.1, [N/A], 1980, 3201\n"

    monkeypatch.setattr(environment.subprocess, "run", lambda *_, **__: Done)
    driver, power, clock, _ = environment._nvidia_smi("GPU-1")
    assert (driver, environment._number(power), environment._number(clock)) == ("600.1", None, 1980.0)

    def absent(*_, **__):
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(environment.subprocess, "run", absent)
    assert environment._nvidia_smi("GPU-1") == (None,) * 4
    assert environment._number(None) is None


def test_a_gpu_is_described_as_the_schema_has_it(monkeypatch, gpu):
    h200 = SimpleNamespace(uuid="1-2", multi_processor_count=132, L2_cache_size=60 * 2**20, total_memory=139 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: h200)
    monkeypatch.setattr(environment, "_nvidia_smi", lambda uuid: (f"600.1 of {uuid}", "700.00", "[N/A]", "3201"))
    row = environment.describe(torch.device("cuda"))
    results.validate({**row, "machine": gpu})
    assert (row["driver"], row["power_limit_w"], row["sm_clock_mhz"]) == ("600.1 of 1-2", 700.0, None)
    assert (row["multiprocessors"], row["l2_bytes"]) == (132, 60 * 2**20)


def test_peers_are_found_without_importing_anything(monkeypatch, tmp_path):
    """Two distributions that share a name, as FlashAttention's do, and packages that raise when they are imported."""
    packages = {"shared-2": ("2.1", "shared/__init__.py"), "shared-4": ("4.0", "shared/cute/__init__.py")}
    for name, (version, file) in packages.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("raise RuntimeError('broken')")
        about = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (about / "RECORD").write_text(f"{file},,\n{about.name}/METADATA,,\n")
    (tmp_path / "nobodys.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    modules = ("shared", "shared.cute", "shared.other", "nobodys", "nobodys.part", "absent", "absent.part")
    found = {"shared": "2.1", "shared.cute": "4.0", "nobodys": "of no distribution"}
    assert environment._installed(modules) == found
    assert "flash_attn.cute" in environment.PEERS
