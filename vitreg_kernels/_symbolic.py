"""torch.export, which leaves sizes open: whether it is at work, and asking about a size without limiting it.

Not here: shapes or layouts of this library's.
"""

from __future__ import annotations

import torch


def exporting() -> bool:
    """Whether torch.export is at work, and not torch.compile."""
    # Where torch.compile of torch 2.10 meets the first question, it takes the answer to be yes.
    return torch.compiler.is_exporting() and getattr(torch.compiler, "_is_exporting_flag", True)


def known(condition: bool | torch.SymBool) -> bool:
    """Whether a condition on sizes holds, as far as that can be told without limiting them.

    torch.export turns every question about an open size into a bound on it, so a check of its own would forbid the
    sizes that it was not asked about. There, what is not certain counts as False, and the check is left to the kernels.
    """
    if not exporting():
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)
