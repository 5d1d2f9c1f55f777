"""How fast the compiled Triton kernels should be on GPUs that are not there: a static performance model."""
