"""How fast the compiled Triton kernels should be on GPUs that are not there: a static performance model.

Not here: any measurement. What it writes is ``docs/predictions.md``, and says so of itself.
"""
