"""The smoke test: a kernel that is wrong or breaks is named and forbids timing; the memory checker is heard."""

from __future__ import annotations

import math
import os
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu import memcheck, pieces, smoke
from benchmarks.gpu.stage import Setup
from benchmarks.results import Writer
from vitreg_kernels import dispatch
from vitreg_kernels.ops.attention.backends import BACKENDS
from vitreg_kernels.ops.attention.types import AttentionInputs, AttentionOutputs, AttentionResult

CPU = torch.device("cpu")
DRY = Setup(CPU, dry=True, deadline=math.inf)


@pytest.fixture
def writer(tmp_path, machine) -> Writer:
    return Writer(tmp_path / "run.json", {"command": "gpu"}, machine)


@pytest.fixture
def kernel(change_backends):
    """The Triton backend, computed by torch on a CPU; its output and its gradients are changed as told."""

    def kernel(output=lambda x: x, gradient=lambda x: x):
        def forward(inputs: AttentionInputs) -> AttentionResult:
            logits = inputs.scale * inputs.query @ inputs.key.transpose(-1, -2)
            attended = F.scaled_dot_product_attention(*inputs[:3], scale=inputs.scale)
            return AttentionResult(output(attended), AttentionOutputs(lse=logits.logsumexp(-1)))

        def backward(inputs: AttentionInputs, _output: Tensor, _lse: Tensor, upstream: Tensor, *into: Tensor) -> None:
            with torch.enable_grad():
                leaves = [x.detach().requires_grad_() for x in inputs[:3]]
                attended = F.scaled_dot_product_attention(*leaves, scale=inputs.scale)
                found = torch.autograd.grad(attended, leaves, upstream)
            for grad, x in zip(into, found, strict=True):
                grad.copy_(gradient(x))

        requirements = dispatch.find(BACKENDS, "triton").requirements._replace(devices=("cpu",))
        fields = {"requirements": requirements, "faults": list, "forward": forward, "backward": backward}
        change_backends("triton", op="attention", **fields)

    return kernel


def test_a_right_kernel_passes_and_may_be_timed(writer, kernel):
    kernel()
    rows = list(smoke.run(DRY, writer))
    assert [row["kind"] for row in rows] == ["smoke", "memcheck"]
    assert rows[0]["errors"].keys() == {"output", "grad_query", "grad_key", "grad_value"}
    assert smoke.failures(rows) == []
    assert not smoke.forbids_timing(rows)
    assert smoke.unfinished(DRY, writer) == 0
    assert list(smoke.run(DRY, writer)) == []


@pytest.mark.parametrize("wrong", [{"output": lambda x: 1.01 * x}, {"gradient": lambda x: 1.01 * x}], ids=str)
def test_a_wrong_kernel_is_named_and_forbids_timing(writer, kernel, wrong):
    kernel(**wrong)
    rows = list(smoke.run(DRY, writer))
    told = smoke.failures(rows)
    assert len(told) == (1 if "output" in wrong else 3)
    assert all(sentence.startswith("triton at N = 22, 2 heads in fp32: ") for sentence in told)
    assert smoke.forbids_timing(rows)


def test_a_kernel_that_breaks_is_named(writer, kernel):
    def fault(x):
        raise IndexError("out of\nits bounds")

    kernel(output=fault)
    rows = list(smoke.run(DRY, writer))
    assert smoke.failures(rows) == ["triton at N = 22, 2 heads in fp32: IndexError: out of its bounds"]
    assert smoke.forbids_timing(rows)


def test_a_kernel_that_hung_forbids_timing_and_a_memory_checker_that_did_does_not(writer):
    (case,) = smoke._cases(DRY)
    for piece, forbids in ((memcheck.NAME, False), (smoke._named(case), True)):
        writer.extend([pieces.row("smoke", piece, "hung")])
        assert smoke.forbids_timing(writer.rows) is forbids
    assert smoke.unfinished(DRY, writer) == 0


def test_the_cases_are_few_and_many_heads_of_every_kind_of_kernel():
    cases = smoke._cases(DRY._replace(dry=False))
    assert {(case.tokens, case.batch * case.heads) for case in cases} == {
        (n, heads) for n in (54, 261, 1029) for heads in (2, 1024)
    }
    assert {(case.dtype, case.mode) for case in cases} == {("bf16", "forward+backward")}


def checker(tmp_path, monkeypatch, text: str) -> None:
    """A memory checker of a few lines of shell."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\n{text}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("text", "failed", "told"),
    [
        ("exit 0", False, "no error in 0 s"),
        ("echo; echo '========= ERROR SUMMARY: 0 errors'", False, "no error in 0 s"),
        (
            "echo hello; echo '========= Invalid __global__ read of size 4 bytes'; exit 1",
            True,
            "========= Invalid __global__ read of size 4 bytes",
        ),
        ("echo '========= ERROR SUMMARY: 3 errors'", True, "========= ERROR SUMMARY: 3 errors"),
        (
            "echo 'Device not supported'; exit 1",
            False,
            "not run: compute-sanitizer cannot run here: Device not supported",
        ),
        ("sleep 30", False, "not run: compute-sanitizer took longer than 1 s"),
    ],
    ids=["silent", "right", "wrong, which broke the program", "wrong", "not here", "slow"],
)
def test_what_the_memory_checker_says(tmp_path, monkeypatch, text, failed, told):
    checker(tmp_path, monkeypatch, text)
    monkeypatch.setattr(memcheck, "_SECONDS", 1.0)
    row = memcheck.check(torch.device("cuda"))
    assert row["failed"] is failed
    assert memcheck.told(row) == told
    named = [f"memory checker: {told}"] if failed else []
    assert smoke.failures([row]) == named


def test_without_a_memory_checker_it_is_a_sentence(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(memcheck, "_USUAL_PLACES", ())
    assert memcheck.told(memcheck.check(torch.device("cuda"))) == "not run: compute-sanitizer is not installed"
    assert memcheck.told(memcheck.check(CPU)) == "not run: there is no GPU"


def test_the_memory_checker_watches_one_tensor_a_block(tmp_path, monkeypatch):
    checker(tmp_path, monkeypatch, f'echo "$PYTORCH_NO_CUDA_MEMORY_CACHING $@" > {tmp_path}/told')
    memcheck.check(torch.device("cuda"))
    told = (tmp_path / "told").read_text().split()
    options = ["--tool", "memcheck", "--report-api-errors", "no"]
    assert told == ["1", *options, sys.executable, "-m", "benchmarks.gpu.memcheck"]
