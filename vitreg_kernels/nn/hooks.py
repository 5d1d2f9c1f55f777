"""Whether somebody hooked or replaced a module that fusion does not call, or calls with more than one tensor.

Such a module is then called as timm calls its namesake, with one tensor for one tensor, at the price of the fusion
around it. FSDP2's hooks, which it puts on every block, do not ask for that.

All this is asked for every block of every forward, so each question is one look at a module's ``__dict__``.
"""

from __future__ import annotations

import sys
import warnings
from types import MethodType
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

_warned_of: WeakSet[nn.Module] = WeakSet()


class Watcher:
    """A forward hook that changes nothing and leaves ``torch.fx``'s proxies alone."""


class Transparent:
    """A ``forward`` that an instance has and that does what its class's does, unless it covers another.

    Attributes:
        covered: the ``forward`` that the instance had before, or ``None``.
    """

    covered: Any = None


def hooked(module: nn.Module | None) -> bool:
    """Whether a module is there and has a hook that wants to see its tensors, before or after, forward or backward."""
    if module is None:
        return False
    state = module.__dict__
    before, after = state["_forward_pre_hooks"], state["_forward_hooks"]
    if state["_backward_hooks"] or state["_backward_pre_hooks"]:
        return True
    if not (before or after):
        return False
    return any(not _of_fsdp(hook) for hook in (*after.values(), *before.values()))


def touched(module: nn.Module) -> bool:
    """Whether a module is ``hooked`` or has a ``forward`` beside its class's."""
    if "forward" in module.__dict__:
        own = module.__dict__["forward"]
        if not isinstance(own, Transparent) or own.covered is not None:
            return True
    return hooked(module)


def untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of this very class and not ``touched``, so that what it would do is known."""
    return type(module) is kind and not touched(module)


def hooked_for_tracing(module: nn.Module) -> bool:
    """Whether a module has a hook that ``torch.fx`` would trace, and that would run again when the trace does."""
    state = module.__dict__
    if state["_backward_hooks"] or state["_backward_pre_hooks"]:
        return True
    hooks = (*state["_forward_hooks"].values(), *state["_forward_pre_hooks"].values())
    return any(not (_of_fsdp(hook) or isinstance(hook, Watcher)) for hook in hooks)


def warn_of_hook_on_list(blocks: nn.ModuleList) -> None:
    """Warn, once for each list and at the line that called the model, that nobody calls a list."""
    if blocks in _warned_of or torch.compiler.is_compiling():
        return
    _warned_of.add(blocks)
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("torch", "vitreg_kernels"):
        frame, level = frame.f_back, level + 1
    warnings.warn(
        "blocks has a hook but is a list, which is never called: to see the stream after all of them, hook the last, "
        "blocks[-1]",
        stacklevel=level,
    )


def _of_fsdp(hook: object) -> bool:
    # torch.compile traces this, and what it traces here must not tell one block from another.
    return isinstance(hook, MethodType) and type(hook.__self__).__module__.startswith("torch.distributed.fsdp.")
