"""A Triton launch as data, and the three ways to take it: on a GPU, in the interpreter, and compiled ahead for any GPU.

On a GPU, a call that comes again is launched without being described again (``replay``).

Not here: kernels, and what decides their tiles (``ops/<op>/backends/triton``).
"""
