"""What the nodes of opaque ops have in common."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def refuse_unseen_derivatives(tensors: Iterable[Tensor], backend: str, *, instead: str) -> None:
    """For a call that no node joins to autograd, as no tensor asks for gradients.

    Raises:
        NotImplementedError: where a derivative is wanted all the same; the op would have none, and torch go on without.
    """
    if torch.compiler.is_compiling():
        # Its tensors do not say that torch.func.grad is at work. What the compiler cannot trace it runs eagerly.
        if torch._C._are_functorch_transforms_active():
            raise NotImplementedError(
                f"backend {backend!r} cannot be traced inside torch.func; take backend={instead!r}"
            )
    elif any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(f"backend {backend!r} has no forward-mode derivative; take backend={instead!r}")


class _Positional(inspect.Signature):
    """Of a function that takes whatever stands in its place, by position; there is nothing to sort or to fill in."""

    def bind(self, *arguments: Any) -> inspect.BoundArguments:
        return _Bound(self, {"arguments": arguments})


class _Bound(inspect.BoundArguments):
    __slots__ = ()

    @property
    def args(self) -> tuple:
        return self.arguments["arguments"]

    @property
    def kwargs(self) -> dict[str, Any]:
        return {}

    def apply_defaults(self) -> None:
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
