"""The compiled libraries of ``csrc``: loading the one for CPUs, and telling whether it was built from these sources.

Not here: what calls it (``ops/<op>/backends/cpu.py``) or what builds it (``setup.py``).
"""
