"""The command line as a user meets it: `vitreg info`, and a `vitreg check` that fails when a kernel is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from vitreg_kernels import __version__, cli
from vitreg_kernels.cli.info import support_table
from vitreg_kernels.measure import check
from vitreg_kernels.measure.cases import CASES, assemble, attention, residual_norm, token_norms
from vitreg_kernels.ops._shared import observers
from vitreg_kernels.ops.attention import features
from vitreg_kernels.ops.attention.backends import BACKENDS, sdpa
from vitreg_kernels.ops.attention.types import OUTPUT_NAMES
from vitreg_kernels.ops.catalogue import OPS
from vitreg_kernels.ops.token_norms.backends import composite as counting

ROOT = Path(__file__).parents[1]


@pytest.fixture
def few_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    def attentions(dtype, device):
        full = partial(attention.call, outputs=OUTPUT_NAMES)
        yield full(torch.randn(1, 21, 3, 2, 16, device=device).to(dtype), name="21 tokens", num_prefix_tokens=5)
        keep = torch.rand(1, 1, 1, 17, device=device) > 0.3
        yield full(torch.randn(1, 17, 3, 2, 16, device=device).to(dtype), name="17 tokens, padded", attn_mask=keep)

    monkeypatch.setitem(CASES, "attention", attentions)
    for op, cases in {"residual_norm": residual_norm, "token_norms": token_norms, "assemble": assemble}.items():
        monkeypatch.setitem(CASES, op, partial(cases.kinds, (3, 54, 100)))


@pytest.mark.parametrize(("command", "unbuffered"), [("info", ""), ("calibrate --clear", "1")])
def test_nobody_reads_on(command: str, unbuffered: str, tmp_path: Path) -> None:
    """As behind ``| head``: no traceback, and no complaint at Python's end or while it runs."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "vitreg_kernels", *command.split()],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered, "VITREG_CALIBRATION": str(tmp_path / "calibration.json")},
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_info_names_versions_and_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    shown = capsys.readouterr().out
    for word in (torch.__version__, *(b.name for b in BACKENDS), *features.ALL):
        assert word in shown


def test_support_table_says_what_is_declared() -> None:
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in support_table().split("\n")]
    assert header[1:] == [b.name for b in BACKENDS]
    by_feature = {row[0]: row[1:] for row in rows}
    for feature in (*features.ALL, *observers.ALL):
        for cell, needs in zip(by_feature[feature], (b.requirements for b in BACKENDS), strict=True):
            served = "if named" if feature in needs.features_if_named else "yes"
            assert cell == (served if feature in needs.features else "no")
    assert "if named" in by_feature[observers.TRACED]


def test_support_tables_of_the_other_ops(capsys: pytest.CaptureFixture[str]) -> None:
    header, _, *rows = support_table("residual_norm").split("\n")
    names = [b.name for b in OPS["residual_norm"].backends]
    assert [cell.strip() for cell in header.strip("|").split("|")] == ["residual norm", *names]
    sizes = ["channels", "1-4096", *["any"] * (len(names) - 1)]
    assert any([cell.strip() for cell in row.strip("|").split("|")] == sizes for row in rows)
    assert cli.main(["info"]) == 0
    shown = capsys.readouterr().out
    for op in ("attention", "residual_norm", "token_norms", "assemble"):
        assert support_table(op) in shown


@pytest.mark.usefixtures("few_cases")
def test_check_passes_and_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "FAIL" not in shown
    lines = [line.split() for line in shown.split("\n")]
    for op in OPS:
        backends = check.usable_backends(op, torch.device("cpu"))
        assert "reference" in backends
        assert {line[1] for line in lines if line[:1] == [op]} == set(backends)
    # Attention has two cases in three dtypes a backend.
    attentions = 6 * len(check.usable_backends("attention", torch.device("cpu")))
    assert sum(line[:1] == ["attention"] for line in lines) == attentions
    results = sum(line[0] in OPS for line in lines if line)
    assert f"{results - shown.count('not served')} passed, 0 failed" in shown


def broken_output(result):
    return result._replace(output=result.output * 1.02)


def broken_gradient(result):
    return result._replace(output=result.output + 0.02 * (result.output - result.output.detach()))


def broken_statistic(result):
    return result._replace(statistics=result.statistics._replace(lse=result.statistics.lse + 1e-3))


@pytest.mark.usefixtures("few_cases")
@pytest.mark.parametrize(
    ("broken", "named"),
    [(broken_output, "output"), (broken_gradient, "grad_query"), (broken_statistic, "lse")],
)
def test_check_fails_when_a_backend_is_wrong(broken, named, change_backends, capsys) -> None:
    right = sdpa.forward
    change_backends("sdpa", forward=lambda inputs: broken(right(inputs)))
    assert cli.main(["check", "--device", "cpu", "--backend", "sdpa"]) == 1
    failing = [line for line in capsys.readouterr().out.split("\n") if "FAIL" in line]
    assert failing
    assert all(named in line for line in failing if "fp32" in line)


@pytest.mark.usefixtures("few_cases")
@pytest.mark.parametrize(
    ("op", "broken", "named"),
    [
        ("residual_norm", lambda result: result._replace(residual=result.residual * 1.02), "residual"),
        ("token_norms", lambda norms: norms * 1.02, "token_norms"),
        ("assemble", lambda tokens: tokens * 1.02, "tokens"),
    ],
)
def test_check_fails_when_a_backend_of_another_op_is_wrong(op, broken, named, change_backends, capsys) -> None:
    (right,) = (backend.forward for backend in OPS[op].backends if backend.name == "composite")
    change_backends("composite", op=op, forward=lambda *inputs: broken(right(*inputs)))
    assert cli.main(["check", "--device", "cpu", "--backend", "composite"]) == 1
    failing = [line.split() for line in capsys.readouterr().out.split("\n") if "FAIL" in line]
    assert {line[0] for line in failing} == {op}
    assert all(named in " ".join(line) for line in failing)


@pytest.mark.usefixtures("few_cases")
def test_check_fails_when_a_count_is_off_by_one(change_backends, capsys) -> None:
    right = counting.accumulate

    def wrong(norms, layout, into):
        right(norms, layout, into)
        into.histogram[2, 7] += 1

    change_backends("composite", op="token_norms", accumulate=wrong)
    assert cli.main(["check", "--device", "cpu", "--op", "token_norms", "--backend", "composite"]) == 1
    failing = [line for line in capsys.readouterr().out.split("\n") if "FAIL" in line]
    assert len(failing) == 3  # dtypes
    assert all(line.endswith("FAIL: patches histogram") for line in failing)


def without_statistics(result):
    return result._replace(statistics=type(result.statistics)())


def statistics_in_half(result):
    return result._replace(statistics=type(result.statistics)(*(x.half() for x in result.statistics)))


def raising(result):
    raise RuntimeError("an illegal memory access")


@pytest.mark.usefixtures("few_cases")
@pytest.mark.parametrize(
    ("broken", "said"),
    [(without_statistics, "were asked for"), (statistics_in_half, "dtype"), (raising, "an illegal memory access")],
)
def test_check_fails_when_a_backend_does_not_answer_as_asked(broken, said, change_backends, capsys) -> None:
    right = sdpa.forward
    change_backends("sdpa", forward=lambda inputs: broken(right(inputs)))
    assert cli.main(["check", "--device", "cpu", "--backend", "sdpa"]) == 1
    shown = capsys.readouterr().out
    assert "0 passed, 6 failed" in shown
    assert said in shown


@pytest.mark.parametrize("device", ["tape", "meta", *(() if torch.cuda.is_available() else ("cuda",))])
def test_check_refuses_a_device_that_is_not_there(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "--device", device]) == 2
    assert f"cannot check on device '{device}'" in capsys.readouterr().err


def test_check_refuses_an_unknown_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "--backend", "flash"]) == 2
    assert "unknown backend 'flash'" in capsys.readouterr().err


def test_check_refuses_an_unknown_op(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "--op", "softmax"]) == 2
    expected = "unknown op 'softmax': expected any of attention, residual_norm, token_norms, assemble\n"
    assert capsys.readouterr().err == expected


@pytest.mark.usefixtures("few_cases")
def test_check_of_some_ops_by_the_backends_that_they_have(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["check", "--device", "cpu", "--op", "attention", "--op", "assemble"]
    assert cli.main([*chosen, "--backend", "composite", "--backend", "sdpa"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.split("\n")]
    assert {tuple(line[:2]) for line in lines if line and line[0] in OPS} == {
        ("attention", "sdpa"),
        ("assemble", "composite"),
    }
    assert cli.main(["check", "--device", "cpu", "--op", "assemble", "--backend", "sdpa"]) == 2
    expected = "unknown backend 'sdpa': expected any of triton, cpu, composite, reference\n"
    assert capsys.readouterr().err == expected


def test_check_that_checks_nothing_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["vitreg_kernels.cli.check"], "measure", lambda chosen, device: iter(()))
    assert cli.main(["check", "--device", "cpu", "--backend", "reference"]) == 1


@pytest.mark.parametrize("name", sorted({b.name for op in OPS.values() for b in op.backends}))
def test_a_backend_that_does_not_run_here_is_told_at_once(name, monkeypatch, capsys):
    """Nothing is measured then; what runs for one of the ops is checked."""
    measured = []
    command = sys.modules["vitreg_kernels.cli.check"]
    monkeypatch.setattr(command, "measure", lambda chosen, device: measured.append(chosen) or iter(()))
    having = [op for op in OPS if name in [b.name for b in OPS[op].backends]]
    usable = [op for op in having if name in check.usable_backends(op, torch.device("cpu"))]
    status = cli.main(["check", "--device", "cpu", "--backend", name])
    printed = capsys.readouterr()
    if usable:
        assert measured
        return
    assert (status, measured, printed.out) == (2, [], "")
    assert printed.err.startswith(f"backend {name!r} cannot be checked on cpu: ")
    assert printed.err.count("\n") == 1


def test_a_backend_that_runs_does_not_hide_one_that_does_not(capsys):
    assert cli.main(["check", "--device", "cpu", "--backend", "reference", "--backend", "xformers"]) == 2
    assert "backend 'xformers' cannot be checked on cpu" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out == f"vitreg_kernels {__version__}\n"


def test_support_names_classes(capsys):
    """``docs/command_line.md`` shows all of it, see ``test_docs.py``."""
    assert cli.main(["support"]) == 0
    printed = capsys.readouterr().out
    for cls in ("EvaAttention", "DINOv3ViTAttention", "MemEffAttention", "MultiheadAttention"):
        assert cls in printed
