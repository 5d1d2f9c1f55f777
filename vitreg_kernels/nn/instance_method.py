"""A method of a module that stands in one instance, in the place of its class's.

It is a bound method, of an object that computes: ``torch.compile`` has one graph for all blocks with such, and a graph
for each block with callables of another kind.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType, MethodType
from typing import Any, Protocol


class Computes(Protocol):
    """What such a method is bound to.

    Attributes:
        method: ``bound`` to it; what pickles the module asks for it by this name.
    """

    method: MethodType

    def __call__(self, *args: Any, **options: Any) -> Any:
        """What the method gives."""


def bound(computes: Computes, original: Callable[..., Any]) -> MethodType:
    """The method that calls an object, with the signature and the source of a class's.

    TorchScript compiles that source, in the globals that it finds with it: the class's own method.
    """
    return MethodType(_disguised(original), computes)


def bound_to(method: object) -> object | None:
    """The object that a ``bound`` method calls; None of any other method."""
    is_such = isinstance(method, MethodType) and getattr(method.__func__, "__code__", None) is _CODE
    return method.__self__ if is_such else None


def _call(computes: Computes, *args: Any, **options: Any) -> Any:
    return computes(*args, **options)


_CODE = _call.__code__


@cache
def _disguised(original: Callable[..., Any]) -> FunctionType:
    disguised = FunctionType(_CODE, original.__globals__, "method")
    disguised.__wrapped__ = original
    return disguised
