"""A method of a module, replaced on that instance alone and given back."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any
from weakref import ref

from torch import nn

from ...nn.hooks import Transparent
from ...nn.tracing import as_leaf, traced
from ..attention.attend import Attend
from ..attention.kind import Kind


class FusedMethod:
    """What a patched module has in the place of its class's method.

    It stands in the instance's ``__dict__``, so nothing else of the module changes: neither its class, nor its
    parameters, nor its hooks. It holds the module weakly, which goes when its last user does; copies and pickles of
    the module have one of their own.

    ``torch.jit.script`` compiles the class's own method, for whose attributes it looks here; ``torch.fx`` takes the
    module as a leaf, and traces the class's own method if that is another than ``forward``.

    Attributes:
        name: of the method.
        compute: takes the module, ``attend`` and the method's arguments, and gives what the method gives.
        attend: its way into the op.
        covered: the method that the instance had before, or ``None``.
        active: whether it computes by ``compute``. If another's method stands over it when it is to be taken off,
            it stays and does what it covers.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        compute: Callable[..., Any],
        attend: Attend,
        covered: Callable[..., Any] | None,
    ) -> None:
        self._module = ref(module)
        self.name = name
        self.compute = compute
        self.attend = attend
        self.covered = covered
        self.active = True

    def __call__(self, *args: Any, **options: Any) -> Any:
        if not self.active:
            return self._replaced()(*args, **options)
        module = self._module()
        if any(map(traced, (*args, *options.values()))):
            return as_leaf(module, *args, **options) if self.name == "forward" else self._replaced()(*args, **options)
        return self.compute(module, self.attend, *args, **options)

    @property
    def __class__(self) -> type:
        """A method's, for ``inspect``, by which TorchScript reads the source and which knows no other callables."""
        return MethodType

    def _replaced(self) -> Callable[..., Any]:
        """The method that this one stands in for."""
        module = self._module()
        return self.covered or getattr(type(module), self.name).__get__(module)

    def __getattr__(self, name: str) -> Any:
        if name in ("_module", "name", "covered"):  # of an object that is being made
            raise AttributeError(name)
        return getattr(self._replaced(), name)

    def __reduce__(self) -> tuple[Any, ...]:
        return FusedMethod, (self._module(), self.name, self.compute, self.attend, self.covered)


def fused_method(module: nn.Module) -> FusedMethod | None:
    """What a module was patched with, under whatever stands over it that says so; None of one that was not."""
    for name in ("forward", *(n for n, own in vars(module).items() if isinstance(own, FusedMethod))):
        own = vars(module).get(name)
        while isinstance(own, Transparent):
            own = own.covered
        if isinstance(own, FusedMethod) and own.active:
            return own
    return None


def replace(module: nn.Module, kind: Kind, attend: Attend) -> None:
    """Put a ``FusedMethod`` where the kind says."""
    method = FusedMethod(module, kind.method, kind.compute, attend, vars(module).get(kind.method))
    setattr(module, kind.method, method)


def give_back(module: nn.Module) -> None:
    """Leave the module as it was before ``replace``."""
    method = fused_method(module)
    method.active = False
    if vars(module).get(method.name) is not method:
        return
    if method.covered is None:
        delattr(module, method.name)
    else:
        setattr(module, method.name, method.covered)
