"""What the nodes of opaque ops have in common."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any


class _Positional(inspect.Signature):
    """Of a function that takes whatever stands in its place, by position; there is nothing to sort or to fill in."""

    def bind(self, *arguments: Any) -> Any:
        return SimpleNamespace(args=arguments, kwargs={}, apply_defaults=_nothing)


def _nothing() -> None:
    pass


def forward_of(function: Callable[..., Any]) -> staticmethod:
    """The ``forward`` of a ``torch.autograd.Function`` that calls ``function``, which may be an op.

    torch asks for the signature of a forward at every call and binds the arguments to it. An op has none to find, and
    to work out that of a function takes longer than a small kernel; here it is told, and binds in no time.
    """

    def forward(*arguments: Any) -> Any:
        return function(*arguments)

    forward.__signature__ = _Positional([inspect.Parameter("arguments", inspect.Parameter.VAR_POSITIONAL)])
    return staticmethod(forward)
