"""A method of a module, replaced on that instance alone and given back."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import nn

from ...nn.instance_method import bound, bound_to
from ...nn.tracing import as_leaf, traced
from ..attention.attend import Attend
from ..blocks.add_norm import AddNorm


class FusedMethod:
    """What a patched module has in the place of its class's method.

    A bound method of this stands in the instance's ``__dict__``, so nothing else of the module changes: neither its
    class, nor its parameters, nor its hooks. It holds the module weakly, which goes when its last user does. Deep
    copies, pickles and the replicas of ``DataParallel`` have one of their own.

    ``torch.jit.script`` compiles the class's own method; ``torch.fx`` takes the module as a leaf, and traces the
    class's own method if that is another than ``forward``.

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
        active: bool = True,
    ) -> None:
        self._module = ref(module)
        self.name = name
        self.compute = compute
        self.op = op
        self.covered = covered
        self.active = active
        if active:
            _methods[module] = ref(self)

    def __call__(self, *args: Any, **options: Any) -> Any:
        module = self._module()
        if module is None:
            raise RuntimeError(
                "this is a shallow copy of a module that was patched, and the module is gone; take copy.deepcopy, or "
                "unpatch before copying"
            )
        if not self.active:
            return self.replaced(module)(*args, **options)
        if any(map(traced, (*args, *options.values()))):
            if self.name == "forward":
                return as_leaf(module, *args, **options)
            return self.replaced(module)(*args, **options)
        if isinstance(self.op, Attend):
            self.op.begin()
        return self.compute(module, self.op, *args, **options)

    def replaced(self, module: nn.Module) -> Callable[..., Any]:
        """The method that this one stands in for."""
        return self.covered or getattr(type(module), self.name).__get__(module)

    @property
    def method(self) -> MethodType:
        """What stands in the instance."""
        return bound(self, getattr(type(self._module()), self.name))

    def replicate(self) -> nn.Module:
        """What ``DataParallel`` calls in the place of the module's own: a replica that computes by itself."""
        module = self._module()
        replica = type(module)._replicate_for_data_parallel(module)
        install(FusedMethod(replica, self.name, self.compute, self.op, self.covered, self.active), replica)
        return replica

    def __reduce__(self) -> tuple[Any, ...]:
        return FusedMethod, (self._module(), self.name, self.compute, self.op, self.covered, self.active)


# By module, because what stands over a method need not say what it covers.
_methods: WeakKeyDictionary[nn.Module, ref[FusedMethod]] = WeakKeyDictionary()
_REPLICATE = "_replicate_for_data_parallel"


def fused_method(module: nn.Module) -> FusedMethod | None:
    """What a module was patched with; None of one that is not patched."""
    return _methods.get(module, lambda: None)()


def replace(module: nn.Module, name: str, compute: Callable[..., Any], op: Attend | AddNorm | None) -> None:
    """Put a ``FusedMethod`` in the place of a method, and of one that was taken off under another's."""
    own = vars(module).get(name)
    left = bound_to(own)
    install(FusedMethod(module, name, compute, op, left.covered if isinstance(left, FusedMethod) else own), module)


def install(fused: FusedMethod, module: nn.Module) -> None:
    """Put it into the module's ``__dict__``."""
    setattr(module, fused.name, fused.method)
    setattr(module, _REPLICATE, fused.replicate)


def give_back(module: nn.Module) -> None:
    """Leave the module as it was before ``replace``."""
    fused = fused_method(module)
    del _methods[module]
    fused.active = False
    delattr(module, _REPLICATE)
    if bound_to(vars(module).get(fused.name)) is not fused:
        return
    if fused.covered is None:
        delattr(module, fused.name)
    else:
        setattr(module, fused.name, fused.covered)
