"""``tests.peers`` on a library and tests made up here: what is printed, counted and failed."""

from __future__ import annotations

import pytest

pytest.importorskip("timm")

from tests.peers.__main__ import compare
from tests.peers.compare import Comparison
from tests.peers.peer import Peer

LIBRARY = """
from timm.layers import Attention

def build():
    return Attention(32, num_heads=2)
"""
TESTS = """
import torch
from made_up import build

def test_same_shape():
    assert build()(torch.randn(1, 5, 32)).shape == (1, 5, 32)

def test_nothing_on_the_instance():
    assert "forward" not in vars(build())

def test_fails_anyway():
    assert build() is None

def test_of_the_network():
    raise AssertionError("this is left out")
"""
PEER = Peer(
    name="timm",
    built_by="made_up:build",
    tests=("test_made_up.py",),
    groups=(),
    all_groups=tuple,
    left_out=("test_of_the_network",),
)


@pytest.mark.slow
def test_a_lost_test_is_named_and_the_baseline_is_not_run_again(tmp_path, capsys):
    (tmp_path / "made_up.py").write_text(LIBRARY)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "timm_tests").mkdir()
    (tmp_path / "timm_tests" / "test_made_up.py").write_text(TESTS)

    assert compare(PEER, tmp_path, ("test_same_*", "*")) == 1
    table = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert table["test_same_*"].split() == ["test_same_*", "1", "passed", "1", "passed", "Attention", "1", "nothing"]
    assert table["*"].split() == ["*", "1", "passed,", "1", "failed", "2", "failed", "none", "nothing"]
    assert "LOST timm_tests/test_made_up.py::test_nothing_on_the_instance: AssertionError" in table["LOST"]
    assert "3 tests, 1 lost" in table["timm"]

    (baseline,) = tmp_path.glob("baseline*.jsonl")
    before = baseline.read_text()
    assert compare(PEER, tmp_path, ("test_same_*",)) == 0
    assert "is not run again" in capsys.readouterr().out
    assert [line for line in baseline.read_text().removeprefix(before).splitlines() if '"test"' in line] == []


def test_a_run_without_a_fused_call_has_failed():
    comparison = Comparison()
    comparison.chosen = {"test_a": "a", "test_b": "b"}
    row = {"outcome": "passed", "error": "", "fused": {}, "left": {}}
    comparison.baseline = {test: {**row, "built": []} for test in comparison.chosen}
    comparison.patched["test_a"] = {**row, "built": ["Attention"]}
    assert comparison.faults() == [
        "LOST test_b: not run",
        "Attention was patched, and no call of it was fused",
        "no call was fused",
    ]
    comparison.patched["test_a"]["fused"] = {"Attention": 2}
    comparison.patched["test_b"] = {**row, "built": [], "left": {"Pool": "not known"}}
    assert comparison.faults() == []
    assert comparison.line("a") == ("a", "1 passed", "1 passed", "Attention 2", "nothing")
    assert comparison.line("b") == ("b", "1 passed", "1 passed", "none", "Pool: not known")
