"""torch's scaled_dot_product_attention, by whichever of its kernels torch picks for a call, or by one that is named.

``any_kernel`` is torch's own choice, the default in its place; ``one_kernel`` are the kernels it chooses from, each a
backend that only its name or a measurement takes; ``kernels`` calls these.

Not here: a kernel of this library's own, or any setting of torch's switches, which stay the user's.
"""

from __future__ import annotations

from .any_kernel import BACKEND, forward
from .one_kernel import KERNELS

__all__ = ["BACKEND", "KERNELS", "forward"]
