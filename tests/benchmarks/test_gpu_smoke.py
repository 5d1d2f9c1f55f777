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


def against(writer, tokens=22, backend="triton", **changes):
    """What is said of a training step and of a forward."""
    setup = DRY._replace(**changes)
    said = [smoke.against(backend, tokens, backward=backward, setup=setup, writer=writer) for backward in (True, False)]
    return tuple(map(bool, said))


def test_a_right_kernel_passes_and_may_be_timed(writer, kernel):
    kernel()
    rows = list(smoke.run(DRY, writer))
    assert [row["kind"] for row in rows] == ["smoke", "memcheck"]
    assert rows[0]["errors"].keys() == {"output", "grad_query", "grad_key", "grad_value"}
    assert smoke.failures(rows) == []
    assert against(writer) == (False, False)
    assert smoke.unfinished(DRY, writer) == 0
    assert list(smoke.run(DRY, writer)) == []


@pytest.mark.parametrize("wrong", [{"output": lambda x: 1.01 * x}, {"gradient": lambda x: 1.01 * x}], ids=str)
def test_a_wrong_kernel_is_named_and_is_not_to_be_timed(writer, kernel, wrong):
    kernel(**wrong)
    told = smoke.failures(list(smoke.run(DRY, writer)))
    assert len(told) == (1 if "output" in wrong else 3)
    assert all(sentence.startswith("triton at N = 22, 2 heads in fp32: ") for sentence in told)
    assert against(writer) == (True, "output" in wrong)
    assert against(writer, backend="another") == (False, False)


def test_a_kernel_that_breaks_is_named(writer, kernel):
    def fault(x):
        raise IndexError("out of\nits bounds")

    kernel(output=fault)
    rows = list(smoke.run(DRY, writer))
    assert smoke.failures(rows) == ["triton at N = 22, 2 heads in fp32: IndexError: out of its bounds"]
    assert against(writer) == (True, True)


@pytest.mark.parametrize(("wrong", "lengths"), [(54, {54}), (261, {69, 201, 261}), (1029, {300, 1029, 1374})])
def test_what_is_wrong_at_a_length_says_nothing_of_other_kernels(writer, wrong, lengths):
    for case in smoke._cases(DRY._replace(dry=False)):
        if case.tokens == wrong:
            writer.extend([pieces.row("smoke", smoke._named(case), "hung")])
    of_all = (54, 69, 201, 261, 300, 1029, 1374)
    assert {tokens for tokens in of_all if any(against(writer, tokens, dry=False))} == lengths


def test_a_kernel_that_hung_is_not_timed_and_a_memory_checker_that_did_forbids_nothing(writer):
    (case,) = smoke._cases(DRY)
    for piece, forbids in ((memcheck.NAME, False), (smoke._named(case), True)):
        writer.extend([pieces.row("smoke", piece, "hung")])
        assert against(writer) == (forbids, forbids)
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
