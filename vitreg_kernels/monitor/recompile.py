"""Lets ``torch.compile`` notice that a module is monitored, or no longer is.

Its graphs do not check whether modules have hooks, unless they had some when they were compiled: one that was compiled
of a model without a monitor would serve a monitored one, and count nothing. What they do check of every module they
call is whether it has a ``forward`` of its own beside its class's. So a monitored module gets one that does the same.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import Signature, signature
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn

from ..nn.hooks import Transparent


class Mark(Transparent):
    """The ``forward`` of a monitored module, which does what the one it covers does, or else its class's.

    It holds the module weakly, which so goes when its last user does. A shallow copy of the module has this too, and
    not its own: it is refused.

    Attributes:
        needed: whether the module is monitored still. If another's forward covered the mark when the monitor was
            removed, it stays until that is gone, and takes itself off when the module calls it next.
    """

    def __init__(self, module: nn.Module, covered: Callable[..., Any] | None = None, needed: bool = False) -> None:
        self.module = ref(module)
        self.covered = covered
        self.needed = needed
        self.off = False

    def __call__(self, *args: Any, **options: Any) -> Any:
        module = self.module()
        if module is None or self.off:
            raise RuntimeError(_COPIED)
        if not self.needed and not torch.compiler.is_compiling() and module.__dict__.get("forward") is self:
            self.take_off(module)
        if self.covered is not None:
            return self.covered(*args, **options)
        return type(module).forward(module, *args, **options)

    def take_off(self, module: nn.Module) -> None:
        """Leave the module as it was before the mark."""
        self.off = True
        if self.covered is None:
            del module.forward
        else:
            module.forward = self.covered

    @property
    def __signature__(self) -> Signature:
        return signature(self.covered or type(self.module()).forward.__get__(self.module()))

    def __reduce__(self) -> tuple:
        # What copies the model copies the module before this, or meets it again: the copy's mark is of the copy.
        return Mark, (self.module(), self.covered)


_COPIED = (
    "this is a shallow copy of a module that was monitored, or its forward from then, and would compute with the "
    "weights of the original; copy it after TokenNormMonitor.remove(), or with copy.deepcopy"
)
_marks: WeakKeyDictionary[nn.Module, ref[Mark]] = WeakKeyDictionary()


def mark(module: nn.Module) -> None:
    """Rule out the graphs that were compiled of the module as it is; it computes what it did."""
    own = module.__dict__.get("forward")
    if isinstance(own, Mark):  # of a monitor that was removed while another's forward was over it
        own.take_off(module)
        own = own.covered
    module.forward = Mark(module, own, needed=True)
    _marks[module] = ref(module.forward)


def unmark(module: nn.Module) -> None:
    """Take the mark off, and the graphs from before it fit again; once it is uncovered if another's covers it."""
    its = _marks.pop(module, lambda: None)()
    if its is None:
        return
    its.needed = False
    if module.__dict__.get("forward") is its:
        its.take_off(module)


def refuse_copy(module: nn.Module) -> None:
    """Refuse a module that has another's mark.

    Raises:
        RuntimeError: if it is a shallow copy of the module that was marked.
    """
    own = module.__dict__.get("forward")
    if isinstance(own, Mark) and own.module() is not module:
        raise RuntimeError(_COPIED)
