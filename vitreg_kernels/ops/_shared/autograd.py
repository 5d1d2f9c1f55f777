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
    """An opaque op for calls by position: its implementation itself in plain eager calls.

    torch's way from an op to an implementation in Python takes longer than a small kernel. It is taken where something
    transforms or intercepts ops: torch.compile, torch.func, modes, tensor subclasses. A profiler of plain eager calls
    shows what the implementation calls.

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

    # torch looks at each argument of a node, one by one. Those without a gradient travel as one.
    def eager_forward(ctx: Any, *bundled: Any) -> Any:
        *differentiable, others = bundled
        arguments = (*differentiable, *others)
        output = forward(*arguments)
        save(ctx, arguments, output)
        return output

    def eager_backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        # Grad mode is on in a backward only where its result may be differentiated: with create_graph.
        found = _underivable(backward, ctx, gradients) if torch.is_grad_enabled() else backward(ctx, *gradients)
        return (*found[:tensors], None)

    traced_backward = once_differentiable(backward)

    def transformed_backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        if torch.compiler.is_compiling():
            return traced_backward(ctx, *gradients)
        return _underivable(backward, ctx, gradients)

    node, bases = type(torch.autograd.Function), (torch.autograd.Function,)
    eager = node(name, bases, {"forward": staticmethod(eager_forward), "backward": staticmethod(eager_backward)})
    apart = {"setup_context": staticmethod(save), "backward": staticmethod(transformed_backward)}
    transformed = node(name, bases, {"forward": staticmethod(forward), **apart})

    def apply(*arguments: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return transformed.apply(*arguments)
        return eager.apply(*arguments[:tensors], arguments[tensors:])

    return apply


def _underivable(backward: Callable[..., Any], ctx: Any, gradients: tuple) -> tuple[Tensor | None, ...]:
    """The gradients of a backward, which raise if they are differentiated in turn, at any level of torch.func.

    torch's ``once_differentiable`` looks at the incoming gradients alone, which are constants where a plain sum was
    differentiated, and tells the innermost level alone. To all others the result would be a constant.
    """
    unpacked = _Unpacked(ctx)
    with torch.no_grad():
        found = backward(unpacked, *gradients)
    tensors = [x for x in found if x is not None]
    made_of = [x for x in (*gradients, *unpacked.saved_tensors) if isinstance(x, Tensor)]
    marked = iter(_Underivable.apply(len(tensors), *tensors, *made_of))
    return tuple(None if x is None else next(marked) for x in found)


class _Unpacked:
    """A node's context whose saved tensors have been taken out: activation checkpointing lets that be done once."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx
        self.saved_tensors = ctx.saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


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
