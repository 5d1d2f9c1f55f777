"""What the nodes of opaque ops have in common."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def forward_of(function: Callable[..., Any]) -> staticmethod:
    """The ``forward`` of a ``torch.autograd.Function`` that calls ``function``, which may be an op.

    torch asks for the signature of a forward at every call. An op has none to find, and to work out that of a function
    takes longer than a small kernel; here it is told.
    """

    def forward(*arguments: Any) -> Any:
        return function(*arguments)

    forward.__signature__ = inspect.signature(forward)
    return staticmethod(forward)
