"""Lets ``torch.compile`` notice that a module is monitored, or no longer is.

Its graphs do not check whether modules have hooks, unless they had some when they were compiled: one that was compiled
of a model without a monitor would serve a monitored one, and count nothing. What they do check of every module they
call is whether it has a ``forward`` of its own beside its class's. So a monitored module gets one, the same function.
"""

from __future__ import annotations

from functools import partial
from types import MethodType

from torch import nn


def mark(module: nn.Module) -> None:
    """Rule out the graphs that were compiled of the module as it is; it computes what it did."""
    own = module.__dict__.get("forward")
    module.forward = MethodType(type(module).forward, module) if own is None else partial(own)


def unmark(module: nn.Module) -> None:
    """Take the mark off, and the graphs from before it fit again; nothing if it is covered by another's forward."""
    own = module.__dict__.get("forward")
    if isinstance(own, partial):
        module.forward = own.func
    elif isinstance(own, MethodType) and own.__func__ is type(module).forward:
        del module.forward
