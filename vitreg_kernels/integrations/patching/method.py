"""A method of a module, replaced on that instance alone and given back."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from ...nn.tracing import as_leaf, traced
from ..attention.attend import Attend
from ..blocks.add_norm import AddNorm


class FusedMethod:
    """What a patched module has in the place of its class's method.

    It stands in the instance's ``__dict__``, so nothing else of the module changes: neither its class, nor its
    parameters, nor its hooks. It holds the module weakly, which goes when its last user does; copies and pickles of
    the module have one of their own.

    ``torch.jit.script`` compiles the class's own method, for whose attributes it looks here; ``torch.fx`` takes the
    module as a leaf, and traces the class's own method if that is another than ``forward``. What is called on the meta
    device, for the shapes, is the class's own too.

    Attributes:
        name: of the method.
        compute: takes the module, ``op`` and the method's arguments, and gives what the method gives.
        op: its way into the op; ``None`` of a method that makes masks for others.
        covered: the method that the instance had before, or ``None``.
        active: whether it computes by ``compute``. If another's method stands over it when it is to be taken off,
            it stays and does what it covers.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        compute: Callable[..., Any],
        op: Attend | AddNorm | None,
        covered: Callable[..., Any] | None,
    ) -> None:
        self._module = ref(module)
        self.name = name
        self.compute = compute
        self.op = op
        self.covered = covered
        self.active = True
        _methods[module] = self

    def __call__(self, *args: Any, **options: Any) -> Any:
        given = (*args, *options.values())
        if not self.active or any(isinstance(each, Tensor) and each.is_meta for each in given):
            return self._replaced()(*args, **options)
        module = self._module()
        if any(map(traced, given)):
            return as_leaf(module, *args, **options) if self.name == "forward" else self._replaced()(*args, **options)
        return self.compute(module, self.op, *args, **options)

    @property
    def __class__(self) -> type:
        """A method's while TorchScript compiles: ``inspect``, by which it reads a source, knows no other callables."""
        return FusedMethod if torch.jit._script._TOPLEVEL else MethodType

    def _replaced(self) -> Callable[..., Any]:
        """The method that this one stands in for."""
        module = self._module()
        return self.covered or getattr(type(module), self.name).__get__(module)

    def __getattr__(self, name: str) -> Any:
        if name in ("_module", "name", "covered"):  # of an object that is being made
            raise AttributeError(name)
        return getattr(self._replaced(), name)

    def __reduce__(self) -> tuple[Any, ...]:
        return FusedMethod, (self._module(), self.name, self.compute, self.op, self.covered)


# By module, because what stands over a method need not say what it covers.
_methods: WeakKeyDictionary[nn.Module, FusedMethod] = WeakKeyDictionary()


def fused_method(module: nn.Module) -> FusedMethod | None:
    """What a module was patched with; None of one that is not patched."""
    return _methods.get(module)


def replace(module: nn.Module, name: str, compute: Callable[..., Any], op: Attend | AddNorm | None) -> None:
    """Put a ``FusedMethod`` in the place of a method."""
    setattr(module, name, FusedMethod(module, name, compute, op, vars(module).get(name)))


def give_back(module: nn.Module) -> None:
    """Leave the module as it was before ``replace``."""
    method = _methods.pop(module)
    method.active = False
    if vars(module).get(method.name) is not method:
        return
    if method.covered is None:
        delattr(module, method.name)
    else:
        setattr(module, method.name, method.covered)
