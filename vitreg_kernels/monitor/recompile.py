"""Lets ``torch.compile`` notice that a module is monitored, or no longer is.

Its graphs do not check whether modules have hooks, unless they had some when they were compiled: one that was compiled
of a model without a monitor would serve a monitored one, and count nothing. What they do check of every module they
call is whether it has a ``forward`` of its own beside its class's. So a monitored module gets one, the same function.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

from torch import nn


class _Mark(partial):
    """What covers a forward that a module has of its own already; ``func`` is not that where that is a partial too."""

    covered: Callable[..., Any]


def mark(module: nn.Module) -> None:
    """Rule out the graphs that were compiled of the module as it is; it computes what it did."""
    own = module.__dict__.get("forward")
    if own is None:
        module.forward = MethodType(type(module).forward, module)
    else:
        module.forward = _Mark(own)
        module.forward.covered = own


def unmark(module: nn.Module) -> None:
    """Take the mark off, and the graphs from before it fit again; nothing if it is covered by another's forward."""
    own = module.__dict__.get("forward")
    if isinstance(own, _Mark):
        module.forward = own.covered
    elif isinstance(own, MethodType) and own.__func__ is type(module).forward:
        del module.forward
