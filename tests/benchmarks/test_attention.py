"""The race: nobody is dropped in silence, wrong answers show, and the useful work is counted right."""

from __future__ import annotations

import dataclasses
import itertools
import re
import subprocess
import types

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import attention, contest, overhead, peers, roofline, shapes
from benchmarks import machine as machine_module
from benchmarks.results import Writer
from benchmarks.shapes import Case
from vitreg_kernels.measure import timing
from vitreg_kernels.measure.race import Stopped
from vitreg_kernels.ops.attention.backends import BACKENDS

RUN = {"command": "bench", "size": "quick", "model": "a model"}

CPU = torch.device("cpu")
TINY = Case(2, 2, 7, "fp32", "forward", head_dim=16)
TINY_BACKWARD = Case(2, 2, 7, "bf16", "forward+backward", head_dim=16)


def test_forward_flops_are_those_of_the_products():
    qkv, _ = contest.inputs_of(TINY, CPU)()
    with FlopCounterMode(display=False) as counter:
        peers.eager(qkv)
    assert TINY.flops == counter.get_total_flops() == 4 * 7 * 7 * 16 * 2 * 2


def test_flops_and_bytes_of_forward_and_backward():
    case = Case(3, 2, 201, "bf16", "forward+backward")
    assert case.flops == 14 * 201**2 * 64 * 3 * 2
    assert case.bytes == 1536 * 201 * 3 * 2  # 512 N forward and 1024 N backward
    assert Case(3, 2, 201, "fp32", "forward").bytes == 2 * 512 * 201 * 3 * 2


@pytest.mark.parametrize("size", ["quick", "full"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_both_sizes_cover_every_length_dtype_and_mode(size, device):
    covered = [(case.tokens, case.dtype, case.mode) for case in shapes.cases(size, torch.device(device))]
    assert list(dict.fromkeys(covered)) == list(itertools.product(shapes.LENGTHS, shapes.DTYPES, shapes.MODES))


@pytest.mark.parametrize(("size", "of_one"), [("quick", {201, 1029}), ("full", set(shapes.LENGTHS))])
def test_a_cpu_races_by_all_of_its_threads_and_by_one(size, of_one, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    its = list(shapes.cases(size, CPU))
    assert {case.tokens for case in its if case.threads == 4} == set(shapes.LENGTHS)
    assert {case.tokens for case in its if case.threads == 1} == of_one
    assert {case.threads for case in its} == {1, 4}
    assert min(case.batch * case.heads for case in its) >= 6
    assert str(its[0]) == "N=54 fp32 forward 4 threads"
    assert {case.threads for case in shapes.cases(size, torch.device("cuda"))} == {None}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert len(list(shapes.cases(size, CPU))) == len(shapes.LENGTHS) * 4


def test_a_case_runs_on_its_threads_and_the_ceilings_are_theirs(tmp_path, monkeypatch, machine):
    monkeypatch.setattr(timing, "last_level_cache", lambda device: 2**12)
    todo = [dataclasses.replace(TINY, threads=n) for n in (2, 1)]
    monkeypatch.setattr(attention, "cases", lambda size, device: todo)
    monkeypatch.setattr(attention, "_BUDGET_S", {"quick": 0.0})
    seen = []
    peer = peers.Peer("other", lambda qkv: seen.append(torch.get_num_threads()) or peers.eager(qkv))
    monkeypatch.setattr(attention, "peers", lambda size: [peer])

    def measure(device):
        threads = torch.get_num_threads()
        speeds = {"fp32": 50.0 * threads, "bf16": 10.0}
        return roofline.Roofline({"fp32": 1.0, "bf16": 1.0}, 20.0, speeds, threads)

    monkeypatch.setattr(roofline, "measure", measure)
    before = torch.get_num_threads()
    run = attention.run("quick", Writer(tmp_path / "run.json", RUN, machine), lambda *_: None, CPU)
    rows = []
    for row in run:
        assert torch.get_num_threads() == before, "a caller between two rows has the threads of one"
        rows.append((row["threads"], row["peak_gflops"], row["peak_source"]))
    assert rows == [(2, 100.0, "registers"), (1, 50.0, "registers")]
    assert seen == [2] * (len(seen) // 2) + [1] * (len(seen) // 2)


def test_threads_are_given_back_after_an_error():
    before = torch.get_num_threads()

    def breaks():
        with machine_module.threads(before + 1):
            assert torch.get_num_threads() == before + 1
            raise IndexError("broke")

    with pytest.raises(IndexError, match="broke"):
        breaks()
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("case", [TINY, TINY_BACKWARD], ids=str)
def test_every_contender_has_a_row_and_a_refused_one_its_reason(race, contenders, case):
    rows = {row["variant"]: row for row in race(case)}
    assert list(rows) == [peer.name for peer in contenders]
    assert rows["vitreg:knows"]["reason"] == "runs on the moon only"
    assert rows["vitreg:declines"]["reason"] == "not built here"
    assert rows["vitreg:crashes"]["reason"] == "IndexError: out of its own bounds"
    assert rows["other:raises"]["reason"].startswith("RuntimeError: no kernel for this\nof shape (2, 7, ")
    assert [name for name, row in rows.items() if row["failed"]] == ["vitreg:crashes"]  # the others have refused
    for name, row in rows.items():
        stopped = name in ("vitreg:knows", "vitreg:crashes", "vitreg:declines", "other:raises")
        assert (row["reason"] is not None) is stopped
        assert all((row[field] is None) is stopped for field in (*contest.MEASURED, "gflops", "peak_fraction"))


def test_figures_follow_from_the_median(race):
    for row in race(TINY):
        if row["reason"] is None:
            assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
            assert row["gflops"] == pytest.approx(TINY.flops / row["median_ms"] * 1e-6)
            assert row["peak_fraction"] == pytest.approx(row["gflops"] / 100.0)
            assert row["gbps"] == pytest.approx(TINY.bytes / row["median_ms"] * 1e-6)
            assert row["best_peer"] == "other:right"
    rows = {row["variant"]: row for row in race(TINY)}
    assert rows["other:right"]["speedup"] == 1.0
    assert rows["vitreg:ours"]["speedup"] == rows["other:right"]["median_ms"] / rows["vitreg:ours"]["median_ms"] > 1


@pytest.mark.parametrize("case", [TINY, TINY_BACKWARD], ids=str)
def test_a_wrong_answer_shows(race, case):
    rows = {row["variant"]: row for row in race(case)}
    wanted = {"output"} if case.mode == "forward" else {"output", "grad_query", "grad_key", "grad_value"}
    for row in rows.values():
        assert row["errors"] is None or row["errors"].keys() == wanted
    assert all(error["passed"] for error in rows["vitreg:ours"]["errors"].values())
    assert all(error["max"] > 0 and error["eager_max"] > 0 for error in rows["vitreg:ours"]["errors"].values())
    if case.dtype == "fp32":  # 1% is within bf16's own rounding
        assert not rows["vitreg:wrong"]["errors"]["output"]["passed"]


def test_a_wrong_gradient_shows(ceilings):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            grad = grad.clone()
            grad[:, :, 1] *= 1.5  # the key's
            return grad

    wrong = peers.Peer("wrong", lambda qkv: peers.eager(Wrong.apply(qkv)))
    (row,) = attention.race(TINY_BACKWARD, [wrong], ceilings, CPU, budget_s=0.0)
    assert {name for name, error in row["errors"].items() if not error["passed"]} == {"grad_key"}


@pytest.mark.parametrize("wrong", [1, 2], ids=["from image 1 on", "the last image"])
def test_a_wrong_later_image_shows(ceilings, wrong):
    def attend(qkv):
        output = peers.eager(qkv)
        return torch.cat((output[:wrong], 1.01 * output[wrong:]))

    case = Case(3, 2, 7, "fp32", "forward", head_dim=16)
    (row,) = attention.race(case, [peers.Peer("wrong", attend)], ceilings, CPU, budget_s=0.0)
    assert not row["errors"]["output"]["passed"]


def test_a_batch_of_one_is_compared_once():
    assert [len(contest.first_and_last(TINY, torch.zeros(n, 2))) for n in (1, 2, 5)] == [1, 2, 2]


def test_a_result_that_cannot_be_compared_is_our_failure(ceilings):
    short = peers.Peer("vitreg:short", lambda qkv: peers.eager(qkv)[:, :-1], ours=True)
    (row,) = attention.race(TINY, [short], ceilings, CPU, budget_s=0.0)
    assert row["failed"]
    assert row["reason"].startswith("ValueError: ")


def test_nan_breaks_the_rule_and_not_the_run(ceilings, machine, tmp_path):
    broken = peers.Peer("broken", lambda qkv: torch.nan * peers.eager(qkv))
    rows = attention.race(TINY_BACKWARD, [broken], ceilings, CPU, budget_s=0.0)
    (row,) = Writer(tmp_path / "run.json", RUN, machine).extend(rows)
    assert not any(error["passed"] for error in row["errors"].values())
    assert row["errors"]["grad_key"]["max"] > 1e300


def test_the_contenders_are_all_backends_and_at_least_four_agree():
    contenders = peers.peers("quick")
    names = [peer.name for peer in contenders]
    assert names[: len(BACKENDS)] == [f"vitreg:{backend.name}" for backend in BACKENDS]
    torchs = {f"torch:{name}" for name in ("math", "flash", "efficient", "cudnn", "compile", "flex")}
    assert {*torchs, "onnxruntime", "xformers", "eager"} <= set(names)
    assert [peer.name for peer in contenders if peer.ours] == names[: len(BACKENDS)]
    qkv, grad_output = contest.inputs_of(Case(1, 2, 54, "fp32", "forward+backward"), CPU)()
    wanted = contest.job(peers.eager, qkv, grad_output)
    compiles = "torch:compile"  # for seconds
    answers = {p.name: peers.attempt(p, contest.job, qkv, grad_output) for p in contenders if p.name != compiles}
    for answer in answers.values():
        if isinstance(answer, Stopped):
            assert answer.reason
            assert not answer.failed
        else:
            torch.testing.assert_close(answer, wanted)
    raced = {name for name, answer in answers.items() if not isinstance(answer, Stopped)}
    assert {"vitreg:sdpa", "vitreg:reference", "torch:math", "torch:flash", "eager"} <= raced


def test_bf16_may_be_widened_so_its_ceiling_is_the_faster_product(ceilings):
    assert (ceilings.peak_gflops("fp32"), ceilings.peak_gflops("bf16")) == (100.0, 100.0)
    gpu = roofline.Roofline({"fp32": 10.0, "bf16": 90.0}, 5.0)
    assert (gpu.peak_gflops("fp32"), gpu.peak_gflops("bf16")) == (10.0, 90.0)
    assert gpu.raised_to(ceilings) == roofline.Roofline({"fp32": 100.0, "bf16": 90.0}, 20.0)


def test_the_ceiling_is_that_of_registers_where_no_product_reaches_it():
    native = roofline.Roofline({"fp32": 70.0, "bf16": 80.0}, 5.0, {"fp32": 60.0, "bf16": 200.0}, threads=2)
    assert [native.peak_gflops(dtype) for dtype in ("fp32", "bf16")] == [70.0, 200.0]
    assert [native.peak_source(dtype) for dtype in ("fp32", "bf16")] == ["product", "registers"]
    later = roofline.Roofline({"fp32": 90.0, "bf16": 80.0}, 5.0, {"fp32": 80.0, "bf16": 100.0}, threads=2)
    assert native.raised_to(later).register_gflops == {"fp32": 80.0, "bf16": 200.0}
    assert native.raised_to(later).threads == 2
    product = roofline.Roofline({"fp32": 70.0, "bf16": 80.0}, 5.0, threads=1)
    assert product.peak_source("bf16") == "product"
    assert product.raised_to(native) == native._replace(threads=None)
    rows = [{"kind": "roofline", **found._asdict()} for found in (native, product)]
    assert roofline.highest(rows, 1) == product
    assert roofline.highest(rows, 2) == native
    assert roofline.highest(rows).peak_gflops("bf16") == 200.0


def test_the_loop_on_registers_is_there_with_native_kernels_only(monkeypatch):
    monkeypatch.setattr(roofline, "_product_gflops", lambda dtype, device: 1.0)
    monkeypatch.setattr(roofline, "_copy_gbps", lambda device: 1.0)
    monkeypatch.setattr(roofline.torch.ops, "vitreg_cpu", types.SimpleNamespace())
    assert roofline.measure(CPU) == roofline.Roofline({"fp32": 1.0, "bf16": 1.0}, 1.0, None, torch.get_num_threads())
    asked = []
    library = types.SimpleNamespace(peak_gflops=lambda dtype, seconds: asked.append((dtype, seconds)) or len(asked))
    monkeypatch.setattr(roofline.torch.ops, "vitreg_cpu", library)
    assert roofline.measure(CPU).register_gflops == {"fp32": 1, "bf16": 2}
    assert asked == [(torch.float32, roofline._BUDGET_S), (torch.bfloat16, roofline._BUDGET_S)]


@pytest.mark.skipif(not hasattr(torch.ops.vitreg_cpu, "peak_gflops"), reason="there are no native kernels here")
def test_the_loop_on_registers_uses_all_threads_and_is_no_slower_in_bf16():
    def measured(threads):
        with machine_module.threads(threads):
            return roofline._register_gflops(CPU)

    for _ in range(5):  # a busy machine has its quiet moments
        one, two = measured(1), measured(2)
        if one["bf16"] > 0.9 * one["fp32"] > 1.0 and two["fp32"] > 1.2 * one["fp32"]:
            break
    else:
        pytest.fail(f"{one} by one thread, {two} by two")
    with pytest.raises(RuntimeError, match="fp32, bf16 and fp16 only"):
        torch.ops.vitreg_cpu.peak_gflops(torch.float64, 0.01)


def test_a_cut_race_goes_on_where_it_stopped(tmp_path, monkeypatch, machine, ceilings, contenders):
    monkeypatch.setattr(timing, "last_level_cache", lambda device: 2**12)
    todo = [TINY, Case(2, 2, 7, "bf16", "forward", head_dim=16), Case(1, 1, 9, "fp32", "forward", head_dim=16)]
    monkeypatch.setattr(attention, "cases", lambda size, device: todo)
    monkeypatch.setattr(attention, "peers", lambda size: contenders)
    monkeypatch.setattr(attention, "_BUDGET_S", {"quick": 0.0})
    # A quiet machine before the cut, and a busy one after it.
    measured = iter([ceilings, roofline.Roofline({"fp32": 50.0, "bf16": 5.0}, 10.0)])
    monkeypatch.setattr(roofline, "measure", lambda device: next(measured))
    raced = []
    race = attention.race
    monkeypatch.setattr(attention, "race", lambda case, *rest: raced.append(case) or race(case, *rest))
    path = tmp_path / "run.json"
    progress = []

    def rows_of_run():
        return attention.run("quick", Writer(path, RUN, machine), lambda *p: progress.append(p), CPU)

    for row in rows_of_run():
        if (row["kind"], row.get("dtype"), row.get("variant")) == ("attention", "bf16", "vitreg:ours"):
            break  # in the middle of the second case, whose rows are all saved by now
    assert raced == todo[:2]

    raced.clear()
    progress.clear()
    rows = [row for row in rows_of_run() if row["kind"] == "attention"]
    assert raced == todo[2:]
    assert len(rows) == len(todo) * len(contenders)
    assert {(row["peak_gflops"], row["peak_gbps"]) for row in rows} == {(100.0, 20.0)}
    assert progress == [*((i, 3, str(case)) for i, case in enumerate(todo)), (3, 3, "")]
    assert [row for row in Writer(path, RUN, machine).rows if row["kind"] == "attention"] == rows


def test_machine_says_where_a_figure_is_from():
    described = machine_module.describe(CPU)
    assert described["device"] == described["processor"] != ""
    assert described["packages"]["torch"] == torch.__version__
    assert described["threads"] == torch.get_num_threads()


def test_machine_knows_the_commit_and_whether_it_is_all(tmp_path, monkeypatch):
    def described():
        return tuple(machine_module.describe(CPU)[field] for field in ("commit", "dirty"))

    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True)

    monkeypatch.setattr(machine_module, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert described() == ("unknown", False)
    git("init")
    git("commit", "--allow-empty", "-m", "first")
    commit, dirty = described()
    assert re.fullmatch("[0-9a-f]{40}", commit)
    assert not dirty
    (tmp_path / "run.json").touch()  # brought along to be gone on with
    assert described() == (commit, False)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "new.py").touch()
    assert described() == (commit, True)


def test_sources_are_the_code_and_the_measured_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(machine_module, "ROOT", tmp_path)
    seen = {machine_module.sources()}
    counted = ("vitreg_kernels/a.py", "vitreg_kernels/dispatch/configs/sm_90.json", "csrc/a.cu", "benchmarks/gpu/a.py")
    ignored = ("benchmarks/results/a.json", "tests/a.py", "README.md", "vitreg_kernels/__pycache__/a.pyc")
    for name in (*counted, *ignored):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    for text in ("first", "second"):
        for name in counted:
            (tmp_path / name).write_text(text)
            assert machine_module.sources() not in seen, name
            seen.add(machine_module.sources())
    (tmp_path / "vitreg_kernels/a.py").rename(tmp_path / "vitreg_kernels/b.py")
    renamed = machine_module.sources()
    assert renamed not in seen
    for name in ignored:
        (tmp_path / name).write_text("first")
    assert machine_module.sources() == renamed == machine_module.describe(CPU)["sources"]


def test_flex_attention_is_compiled_in_the_full_size_only_and_forward_only_on_a_cpu():
    flex = {size: next(p for p in peers.peers(size) if p.name == "torch:flex") for size in ("quick", "full")}
    qkv, _ = contest.inputs_of(TINY, CPU)()
    assert "the full size races it" in flex["quick"].refuses(qkv)
    assert flex["full"].refuses(qkv) is None
    assert "no backward" in flex["full"].refuses(qkv.requires_grad_())


def test_overhead_is_measured_with_and_without_gradients(tmp_path, machine, monkeypatch):
    monkeypatch.setattr(overhead, "_BUDGET_S", 0.05)
    writer = Writer(tmp_path / "run.json", RUN, machine)
    rows = list(overhead.run(writer))
    functions = ("register_attention", "register_attention_qkv")
    assert [(row["call"], row["requires_grad"]) for row in rows] == list(itertools.product(functions, (False, True)))
    assert all(row["overhead_us"] == row["ours_us"] - row["raw_us"] for row in rows)
    assert all(row["raw_us"] > 0 for row in rows)
    assert list(overhead.run(writer)) == rows == writer.rows


@pytest.mark.parametrize("call", overhead.CALLS.values(), ids=overhead.CALLS)
def test_overhead_compares_calls_that_do_the_same(call):
    tensors = call.tensors(False)
    torch.testing.assert_close(call.ours(*tensors), call.raw(*tensors))
