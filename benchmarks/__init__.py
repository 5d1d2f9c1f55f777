"""The benchmark suite of vitreg_kernels: ``python -m benchmarks``.

Every figure comes from variants interleaved in one run, next to the ceilings of the same machine in the same run, and
carries the machine, the versions and the commit it was measured with.

Not here: how a call is timed and judged, which users need as well (``vitreg_kernels.measure``).
"""
