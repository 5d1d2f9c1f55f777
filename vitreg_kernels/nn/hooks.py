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

from .instance_method import bound_to

_warned_of: WeakSet[nn.Module] = WeakSet()


class Watcher:
    """A forward hook that changes nothing and leaves ``torch.fx``'s proxies alone."""


class Transparent:
    """What a ``forward`` of an instance is bound to that does what its class's does, unless it covers another.

    Attributes:
        covered: the ``forward`` that the instance had before, or ``None``.
    """

    covered: Any = None


def hooked(module: nn.Module) -> bool:
    """Whether a module has a hook that wants to see its tensors, before or after, forward or backward."""
    state = module.__dict__
    return bool(
        state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or ((state["_forward_hooks"] or state["_forward_pre_hooks"]) and not all(map(_of_fsdp, _around(state))))
    )


def untouched(module: nn.Module) -> bool:
    """Whether a module is not ``hooked`` and has no ``forward`` beside its class's."""
    state = module.__dict__
    if not (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
    ):
        return True  # nearly always, and quickly told
    own = state.get("forward")
    instead = bound_to(own)
    return (own is None or (isinstance(instead, Transparent) and instead.covered is None)) and not hooked(module)


def does_nothing(module: nn.Module) -> bool:
    """Whether calling a module does nothing that anybody would notice: an ``Identity`` that is ``untouched``."""
    return type(module) is nn.Identity and untouched(module)


def only_drops(dropout: nn.Module) -> bool:
    """Whether a module between the softmax and the values is a dropout that is ``untouched``.

    Anything else there is to see the probabilities, N x N, or to change them.
    """
    return type(dropout) is nn.Dropout and untouched(dropout)


def hooked_for_tracing(module: nn.Module) -> bool:
    """Whether a module has a hook that ``torch.fx`` would trace, and that would run again when the trace does."""
    state = module.__dict__
    if state["_backward_hooks"] or state["_backward_pre_hooks"]:
        return True
    return any(not (_of_fsdp(hook) or isinstance(hook, Watcher)) for hook in _around(state))


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


def _around(state: dict[str, Any]) -> tuple[object, ...]:
    """The forward hooks of a module, before and after."""
    return *state["_forward_hooks"].values(), *state["_forward_pre_hooks"].values()


def _of_fsdp(hook: object) -> bool:
    # torch.compile traces this, and what it traces here must not tell one block from another.
    return isinstance(hook, MethodType) and type(hook.__self__).__module__.startswith("torch.distributed.fsdp.")
