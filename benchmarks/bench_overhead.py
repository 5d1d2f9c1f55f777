"""pytest-benchmark entry point: a call through each public function, and the raw backend call, on tiny tensors.

``python -m benchmarks`` interleaves the two and reports the difference. Run with::

    pytest benchmarks/bench_overhead.py -o python_files='bench_*.py'
"""

from __future__ import annotations

import pytest

from benchmarks import overhead


@pytest.mark.parametrize("requires_grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("who", ["ours", "raw"])
@pytest.mark.parametrize("name", overhead.CALLS)
def test_overhead(name: str, who: str, requires_grad: bool, benchmark) -> None:
    call = overhead.CALLS[name]
    benchmark.group = f"{name}, requires_grad={requires_grad}"
    benchmark(getattr(call, who), *call.tensors(requires_grad))
