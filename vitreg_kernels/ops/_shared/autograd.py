"""How kernels behind opaque ops are called and joined to autograd, the same for every op."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable


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
    elif forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(f"backend {backend!r} has no forward-mode derivative; take backend={instead!r}")


def op_or_implementation(op: Callable[..., Any], implementation: Callable[..., Any]) -> Callable[..., Any]:
    """An opaque op for calls by position: its implementation itself wherever nobody could tell the difference.

    torch's way from an op to an implementation in Python takes longer than a small kernel. It is taken where something
    transforms or watches ops: torch.compile, torch.func, modes, tensor subclasses.

    Args:
        op: of torch.library, with one kernel for all dispatch keys.
        implementation: that kernel.
    """

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling() or _are_observed(arguments):
            return op(*arguments)
        return implementation(*arguments)

    return call


def differentiable(
    name: str,
    forward: Callable[..., Any],
    save: Callable[[Any, tuple, Any], None],
    backward: Callable[..., tuple[Tensor | None, ...]],
    *,
    tensors: int,
) -> Callable[..., Any]:
    """``forward`` as a node of the autograd graph, for calls by position.

    torch has two ways to define a node. One keeps what its backward needs in a function of its own, which torch.func
    and the compiler ask for, and which costs an eager call as much as a small kernel; the other does so within the
    forward. Each is used where it is the better.

    Args:
        name: of the node.
        forward: of the arguments.
        save: called as ``save(ctx, arguments, output)``, keeps what the backward needs.
        backward: called as ``backward(ctx, *gradients)``, gives a gradient or ``None`` for each argument. It has no
            derivative of its own.
        tensors: how many of the arguments, the first ones, can have a gradient.
    """
    once = once_differentiable(backward)

    # torch looks at each argument of a node, one by one. Those without a gradient travel as one.
    def eager_forward(ctx: Any, *bundled: Any) -> Any:
        *differentiable, others = bundled
        arguments = (*differentiable, *others)
        output = forward(*arguments)
        save(ctx, arguments, output)
        return output

    def eager_backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        return (*once(ctx, *gradients)[:tensors], None)

    def transformed_backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        if torch.compiler.is_compiling():
            return once(ctx, *gradients)
        with torch.no_grad():
            found = backward(ctx, *gradients)
        return _without_derivative(found, (*gradients, *ctx.saved_tensors))

    node, bases = type(torch.autograd.Function), (torch.autograd.Function,)
    eager = node(name, bases, {"forward": staticmethod(eager_forward), "backward": staticmethod(eager_backward)})
    apart = {"setup_context": staticmethod(save), "backward": staticmethod(transformed_backward)}
    transformed = node(name, bases, {"forward": staticmethod(forward), **apart})

    def apply(*arguments: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return transformed.apply(*arguments)
        return eager.apply(*arguments[:tensors], arguments[tensors:])

    return apply


def _without_derivative(found: tuple[Tensor | None, ...], made_of: Iterable[Any]) -> tuple[Tensor | None, ...]:
    """Gradients that raise if they are differentiated in turn, at any level of torch.func.

    ``once_differentiable`` says so to the innermost level alone; the gradients would be constants to all others.
    """
    tensors = [x for x in found if x is not None]
    marked = iter(_Underivable.apply(len(tensors), *tensors, *(x for x in made_of if isinstance(x, Tensor))))
    return tuple(None if x is None else next(marked) for x in found)


class _Underivable(torch.autograd.Function):
    @staticmethod
    def forward(count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple:
        raise NotImplementedError(
            "a kernel's backward, which is once_differentiable, has no derivative of its own; name a backend that is "
            "torch code, such as 'reference'"
        )


# What the arguments of an op may be; a subclass of Tensor is none of these.
_PLAIN = frozenset((Tensor, torch.nn.Parameter, torch.dtype, type(None), bool, int, float, str, list, tuple))


def _are_observed(arguments: tuple) -> bool:
    """Whether a mode, a transform or a subclass of Tensor would see an op that is called with these."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or not _PLAIN.issuperset(map(type, arguments))
    )
