"""Sizes that torch.export leaves open: asking about one without limiting it. No shapes or layouts of this library's."""

from __future__ import annotations

import torch


def known(condition: bool | torch.SymBool) -> bool:
    """Whether a condition on sizes holds, as far as that can be told without limiting them.

    torch.export turns every question about an open size into a bound on it, so a check of its own would forbid the
    sizes that it was not asked about. There, what is not certain counts as False, and the check is left to the kernels.
    """
    if not torch.compiler.is_exporting():
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)
