"""What the library needs to measure itself: the accuracy rule, the oracle, cases of every op, timing and races.

Not here: what is measured beside it (``benchmarks`` has the peers, suites, results and reports), or tests.
"""
