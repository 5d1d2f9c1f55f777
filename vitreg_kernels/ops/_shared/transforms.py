"""What function transforms do with a kernel, which they cannot look into.

A first derivative is a kernel's too (``autograd.py``). A second or forward-mode derivative is that of a formula, torch
code that gives what the kernel gives. ``vmap`` makes one call of many: the mapped dimension joins one that the kernel
goes through anyway, or else the formula is mapped.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import forward_ad

Dims = Sequence[int | None]
Mapped = tuple[tuple[Tensor, ...], tuple[int, ...]]


class Rules(NamedTuple):
    """What transforms need to know of a kernel that is called by position and gives a tuple of tensors.

    Attributes:
        formula: torch code that takes the same arguments and gives the same tensors, by operations that transforms can
            look into.
        fold: called as ``fold(size, in_dims, arguments, kernel)``: makes ``size`` calls, whose tensors lie side by side
            along ``in_dims`` (``None``: the same for all), with one call of the kernel; gives the outputs and the
            dimension of each along which the calls lie. ``None`` where no one call can do it.
        derivable: places of the arguments that have a derivative.
    """

    formula: Callable[..., tuple[Tensor, ...]]
    fold: Callable[[int, Dims, tuple, Callable[..., tuple[Tensor, ...]]], Mapped | None]
    derivable: tuple[int, ...] = ()


def are_active() -> bool:
    """Whether a transform of torch.func, or forward-mode differentiation, would see what is called now."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def need_more_than_a_gradient() -> bool:
    """Whether a call runs under forward-mode differentiation, or within two gradients of torch.func."""
    if not are_active():
        return False
    kinds = [level.key() for level in torch._C._functorch.get_interpreter_stack() or ()]
    return forward_ad._current_level >= 0 or kinds.count(TransformType.Grad) > 1 or TransformType.Jvp in kinds


def node(
    name: str,
    forward: Callable[..., tuple[Tensor, ...]],
    save: Callable[[Any, tuple, Any], None],
    backward: Callable[..., tuple[Tensor | None, ...]],
    rules: Rules,
) -> type[torch.autograd.Function]:
    """A node of the autograd graph that every transform has a rule for.

    Args:
        name: of the node.
        forward: of the arguments.
        save: called as ``save(ctx, arguments, output)``, keeps what the backward needs.
        backward: called as ``backward(ctx, *gradients)``, gives a gradient or ``None`` for each argument.
        rules: of the forward.
    """

    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        save(ctx, inputs, output)
        statistics = ctx.non_differentiable or ()
        ctx.has_tangent = [not any(x is y for y in statistics) for x in output]
        ctx.save_for_forward(*(x for x in inputs if isinstance(x, Tensor)))  # torch frees them when jvp has run
        ctx.arguments_but_tensors = _without_tensors(inputs)

    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        arguments = _with_tensors(ctx.arguments_but_tensors, ctx.saved_tensors)
        pushed = pushed_forward(rules, arguments, tangents)
        return tuple(x if has else None for x, has in zip(pushed, ctx.has_tangent, strict=True))

    def vmap(info: Any, in_dims: Dims, *arguments: Any) -> Mapped:
        mapped = rules.fold(info.batch_size, in_dims, arguments, function.apply) if info.batch_size else None
        if mapped is None:
            outputs = torch.vmap(rules.formula, tuple(in_dims))(*arguments)
            mapped = outputs, (0,) * len(outputs)
        return mapped

    methods = {"forward": forward, "setup_context": setup_context, "backward": backward, "jvp": jvp, "vmap": vmap}
    function = type(torch.autograd.Function)(
        name, (torch.autograd.Function,), {name: staticmethod(method) for name, method in methods.items()}
    )
    return function


def apply(function: type[torch.autograd.Function], arguments: tuple) -> Any:
    """A node with rules for transforms, out of the compiler's sight.

    What torch.compile leaves to eager code it looks at again, frame by frame, and these are none that it can trace.
    """
    if "torch._dynamo" in sys.modules:
        return torch.compiler.disable(function.apply)(*arguments)
    return function.apply(*arguments)


def transformable(name: str, kernel: Callable[..., tuple[Tensor, ...]], rules: Rules) -> Callable[..., Any]:
    """A kernel, for calls by position, that transforms see through: all its derivatives are the formula's.

    Meant for a kernel that is itself a derivative, and for one that has none.
    """

    def save(ctx: Any, arguments: tuple, output: tuple[Tensor, ...]) -> None:
        if rules.derivable:
            ctx.save_for_backward(*(x for x in arguments if isinstance(x, Tensor)))
        else:
            ctx.mark_non_differentiable(*output)

    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        arguments = _with_tensors(ctx.arguments_but_tensors, ctx.saved_tensors)
        return pulled_back(rules, arguments, gradients, ctx.needs_input_grad)

    function = node(name, kernel, save, backward, rules)

    def call(*arguments: Any) -> tuple[Tensor, ...]:
        if torch.compiler.is_compiling():
            return kernel(*arguments)
        if are_active() or (torch.is_grad_enabled() and _want_derivatives(rules, arguments)):
            return apply(function, arguments)
        return kernel(*arguments)

    return call


def pulled_back(
    rules: Rules, arguments: tuple, gradients: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The formula's vector-Jacobian product: a gradient for each argument that one is wanted of, ``None`` for others.

    Differentiable in turn.
    """
    places = [place for place in rules.derivable if wanted[place]]
    _, pull = _linearized(rules, arguments, places)
    found: list[Tensor | None] = [None] * len(arguments)
    for place, gradient in zip(places, pull(tuple(gradients)), strict=True):
        found[place] = gradient
    return tuple(found)


def pushed_forward(rules: Rules, arguments: tuple, tangents: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The formula's Jacobian-vector product: a tangent for each output.

    Made of two vector-Jacobian products, because torch's own forward mode does not nest within itself: what pulls a
    gradient back is linear in it, and its transpose pushes a tangent forward.
    """
    places = [place for place in rules.derivable if tangents[place] is not None]
    outputs, pull = _linearized(rules, arguments, places)
    if not places:
        return (None,) * len(outputs)
    _, push = torch.func.vjp(pull, tuple(torch.zeros_like(x) for x in outputs))
    (pushed,) = push(tuple(tangents[place] for place in places))
    return pushed


def _linearized(
    rules: Rules, arguments: tuple, places: Sequence[int]
) -> tuple[tuple[Tensor, ...], Callable[[tuple], tuple[Tensor, ...]]]:
    """The formula's outputs, and what pulls gradients of them back to the arguments in some places."""

    def of_places(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = list(arguments)
        for place, tensor in zip(places, tensors, strict=True):
            given[place] = tensor
        return rules.formula(*given)

    if not places:
        return of_places(), lambda gradients: ()
    return torch.func.vjp(of_places, *(arguments[place] for place in places))


def _want_derivatives(rules: Rules, arguments: tuple) -> bool:
    return any(arguments[place] is not None and arguments[place].requires_grad for place in rules.derivable)


_TENSOR = object()  # stands where a tensor was: a node that kept one itself would keep it alive, and at another level


def _without_tensors(arguments: tuple) -> tuple:
    return tuple(_TENSOR if isinstance(x, Tensor) else x for x in arguments)


def _with_tensors(arguments: tuple, tensors: Sequence[Tensor]) -> tuple:
    left = iter(tensors)
    return tuple(next(left) if x is _TENSOR else x for x in arguments)


def side_by_side(x: Tensor, dim: int | None, size: int) -> Tensor:
    """``[size, ...]``: a mapped tensor with its mapped dimension in front, or the same tensor for all."""
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def joined(x: Tensor | None, dim: int | None, size: int, axis: int = 0) -> Tensor | None:
    """A mapped tensor whose mapped dimension has joined one of its own, ``axis``, call after call."""
    return None if x is None else side_by_side(x, dim, size).movedim(0, axis).flatten(axis, axis + 1)


def parted(x: Tensor, size: int, axis: int = 0) -> Tensor:
    """What ``joined`` joined, apart again: the calls lie along ``axis``."""
    return x.unflatten(axis, (size, x.shape[axis] // size))
