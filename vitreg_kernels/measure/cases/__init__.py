"""The named cases of every op: a file an op makes its calls, from the sizes of ViTs to each feature once.

Not here: what is right (``oracle``, ``accuracy``), or calls drawn at random, which are the tests'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from ..oracle import Call
from . import assemble, attention, residual_norm, token_norms

# By op, in the order of ``catalogue.OPS``; each gives the calls in a dtype on a device.
CASES: dict[str, Callable[[torch.dtype, torch.device], Iterator[Call]]] = {
    "attention": attention.calls,
    "residual_norm": residual_norm.calls,
    "token_norms": token_norms.calls,
    "assemble": assemble.calls,
}
