"""Lets ``torch.compile`` notice that a module is monitored, or no longer is.

Its graphs do not check whether modules have hooks, unless they had some when they were compiled: one that was compiled
of a model without a monitor would serve a monitored one, and count nothing. What they do check of every module they
call is whether it has a ``forward`` of its own beside its class's. So a monitored module gets one that does the same.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn

from ..nn.hooks import Transparent
from ..nn.instance_method import bound, bound_to


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
        if not self.needed and not torch.compiler.is_compiling() and mark_of(module) is self:
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
    def method(self) -> MethodType:
        """What stands in the instance."""
        return bound(self, type(self.module()).forward)

    def __reduce__(self) -> tuple[Any, ...]:
        # What copies the model copies the module before this, or meets it again: the copy's mark is of the copy.
        return Mark, (self.module(), self.covered)


_COPIED = (
    "this is a shallow copy of a module that was monitored, or its forward from then, and would compute with the "
    "weights of the original; copy it after TokenNormMonitor.remove(), or with copy.deepcopy"
)
_marks: WeakKeyDictionary[nn.Module, ref[Mark]] = WeakKeyDictionary()


def mark_of(module: nn.Module) -> Mark | None:
    """What a module's forward is bound to, if that is a mark, its own or a copy's."""
    instead = bound_to(module.__dict__.get("forward"))
    return instead if isinstance(instead, Mark) else None


def mark(module: nn.Module) -> None:
    """Rule out the graphs that were compiled of the module as it is; it computes what it did."""
    if (old := mark_of(module)) is not None:  # of a monitor that was removed while another's forward was over it
        old.take_off(module)
    new = Mark(module, module.__dict__.get("forward"), needed=True)
    module.forward = new.method
    _marks[module] = ref(new)


def unmark(module: nn.Module) -> None:
    """Take the mark off, and the graphs from before it fit again; once it is uncovered if another's covers it."""
    its = _marks.pop(module, lambda: None)()
    if its is None:
        return
    its.needed = False
    if mark_of(module) is its:
        its.take_off(module)


def refuse_copy(module: nn.Module) -> None:
    """Refuse a module that has another's mark.

    Raises:
        RuntimeError: if it is a shallow copy of the module that was marked.
    """
    mark = mark_of(module)
    if mark is not None and mark.module() is not module:
        raise RuntimeError(_COPIED)
