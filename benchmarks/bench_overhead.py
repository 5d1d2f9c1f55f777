"""pytest-benchmark entry point: a call through the public function, and the raw backend call, on tiny tensors.

``python -m benchmarks`` interleaves the two and reports the difference. Run with::

    pytest benchmarks/bench_overhead.py -o python_files='bench_*.py'
"""

from __future__ import annotations

import pytest

from benchmarks import overhead


@pytest.mark.parametrize("requires_grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("name", overhead.CALLS)
def test_overhead(name: str, requires_grad: bool, benchmark) -> None:
    benchmark.group = f"requires_grad={requires_grad}"
    benchmark(overhead.CALLS[name], *overhead.tiny_tensors(requires_grad))
