"""The smallest complete op in the shape of this library's own, outside the package: ``unit_tokens``.

Read in this order; in ``vitreg_kernels/ops/<op>/`` the same parts have the same names, some in more files:

- ``reference.py``: the specification, in plain torch.
- ``api.py``: the public function, which checks its arguments, selects a backend and runs it.
- ``backends.py``: every way to compute it, one ``Backend`` object each, and the tuple that lists them.
- ``kernels.py``: the Triton kernels, forward and backward.
- ``op.py``: what torch sees of a kernel: operators, fakes, autograd, function transforms.
- ``contract.py``: how the tests of all ops call this one.

``tests/examples/test_minimal_op.py`` holds it to everything that the library's own ops are held to.
"""

from __future__ import annotations

from .api import unit_tokens

__all__ = ["unit_tokens"]
