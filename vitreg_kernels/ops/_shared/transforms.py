"""What function transforms do with a kernel, which they cannot look into.

A first derivative is a kernel's too (``autograd.py``). A second or forward-mode derivative is that of a formula, torch
code that gives what the kernel gives. ``vmap`` makes one call of many: the mapped dimension joins one that the kernel
goes through anyway, or else the formula is mapped.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import levels

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
        constant: what to say where a derivative of another argument is asked for; empty where such an argument is a
            function of the derivable ones, and its derivative is part of theirs.
    """

    formula: Callable[..., tuple[Tensor, ...]]
    fold: Callable[[int, Dims, tuple, Callable[..., tuple[Tensor, ...]]], Mapped | None]
    derivable: tuple[int, ...] = ()
    constant: str = ""


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
        _refuse_derivatives(rules, inputs, ctx.needs_input_grad)
        save(ctx, inputs, output)
        statistics = ctx.non_differentiable or ()
        ctx.has_tangent = [not any(x is y for y in statistics) for x in output]
        # For jvp, which runs before this call returns; they are not kept any longer.
        ctx.save_for_forward(*(x for x in inputs if isinstance(x, Tensor)))
        ctx.arguments_but_tensors = _without_tensors(inputs)

    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        arguments = _with_tensors(ctx.arguments_but_tensors, ctx.saved_tensors)
        _refuse_derivatives(rules, arguments, [x is not None for x in tangents])
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


def run(function: type[torch.autograd.Function], rules: Rules, arguments: tuple) -> Any:
    """A call of a node with rules, under some transform."""
    # torch runs a node's jvp with forward mode off, so that a second one around it would see a constant.
    if levels.forward_mode_is_nested():
        return rules.formula(*arguments)
    # What torch.compile leaves to eager code it looks at again, frame by frame, and these are none that it can trace.
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
            levels.refuse_to_be_traced()
            return kernel(*arguments)
        if levels.are_active() or (torch.is_grad_enabled() and _want_derivatives(rules, arguments)):
            return run(function, rules, arguments)
        try:
            return kernel(*arguments)
        except Exception as error:
            if not any(isinstance(x, Tensor) and torch._C._functorch.is_legacy_batchedtensor(x) for x in arguments):
                raise
            raise NotImplementedError(
                "a kernel has no rule for is_grads_batched=True or vectorize=True; take torch.func.vmap, jacrev or "
                "hessian instead, or name a backend that is torch code, such as 'reference'"
            ) from error

    return call


def pulled_back(
    rules: Rules, arguments: tuple, gradients: Sequence[Tensor], wanted: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The formula's vector-Jacobian product: a gradient for each argument that one is wanted of, ``None`` for others.

    Differentiable in turn.
    """
    places = [place for place in rules.derivable if wanted[place]]
    _, pull = vjp(*_of_places(rules, arguments, places))
    found: list[Tensor | None] = [None] * len(arguments)
    for place, gradient in zip(places, pull(*gradients), strict=True):
        found[place] = gradient
    return tuple(found)


def pushed_forward(rules: Rules, arguments: tuple, tangents: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The formula's Jacobian-vector product: a tangent for each output.

    Made of two vector-Jacobian products, since forward mode is off where a node is asked for it: what pulls a gradient
    back is linear in it, and its transpose pushes a tangent forward.
    """
    places = [place for place in rules.derivable if tangents[place] is not None]
    with torch.enable_grad():
        outputs, pull = vjp(*_of_places(rules, arguments, places))
        if not places:
            return (None,) * len(outputs)
        _, push = vjp(pull, [torch.zeros_like(x) for x in outputs])
    return push(*(tangents[place] for place in places))


def _of_places(
    rules: Rules, arguments: tuple, places: Sequence[int]
) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    """The formula as a function of the arguments in some places, and these."""

    def of_places(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = list(arguments)
        for place, tensor in zip(places, tensors, strict=True):
            given[place] = tensor
        return rules.formula(*given)

    return of_places, [arguments[place] for place in places]


def vjp(
    function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], Callable[..., tuple[Tensor, ...]]]:
    """A function's outputs, and what pulls gradients of them back to its inputs, both differentiable in turn."""
    if not inputs:
        return function(), lambda *gradients: ()
    if torch._C._are_functorch_transforms_active():
        outputs, pull = torch.func.vjp(function, *inputs)
        return outputs, lambda *gradients: pull(gradients)
    # Within eager autograd by its own means: torch.func knows no hooks of saved tensors. Nor do they see these, which
    # are used at once: those of a checkpoint would run the forward again, of which this is a part.
    further = torch.is_grad_enabled()
    with torch.enable_grad(), _unhooked():
        # Views, so that one tensor in two places is two inputs.
        inputs = [x.view_as(x) if further and x.requires_grad else x.detach().requires_grad_() for x in inputs]
        outputs = function(*inputs)
    derived = [i for i, x in enumerate(outputs) if x.requires_grad]

    def pull(*gradients: Tensor) -> tuple[Tensor, ...]:
        with _unhooked():
            return torch.autograd.grad(
                [outputs[i] for i in derived],
                inputs,
                [gradients[i] for i in derived],
                create_graph=torch.is_grad_enabled(),
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )

    return outputs, pull


def _unhooked() -> AbstractContextManager:
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)


def _refuse_derivatives(rules: Rules, arguments: tuple, wanted: Sequence[bool]) -> None:
    """Raises: ValueError: if a derivative is wanted of an argument that has none; it would be missing in silence."""
    if rules.constant and any(
        asked and isinstance(x, Tensor) and place not in rules.derivable
        for place, (x, asked) in enumerate(zip(arguments, wanted, strict=True))
    ):
        raise ValueError(rules.constant)


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
    """A mapped tensor whose mapped dimension has joined one of its own, ``axis``, call after call.

    Contiguous, as kernels expect what they gave themselves: one tensor for all calls would have a stride of 0.
    """
    return None if x is None else side_by_side(x, dim, size).movedim(0, axis).flatten(axis, axis + 1).contiguous()


def parted(x: Tensor, size: int, axis: int = 0) -> Tensor:
    """What ``joined`` joined, apart again: the calls lie along ``axis``."""
    return x.unflatten(axis, (size, x.shape[axis] // size))
