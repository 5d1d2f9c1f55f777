"""How kernels behind opaque ops are called and joined to autograd, the same for every op."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import levels, transforms
from .transforms import Rules


def needs_node(tensors: Iterable[Tensor]) -> bool:
    """Whether a call is to be a node of the autograd graph: somebody may ask for a derivative, or maps the call."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return True
    return levels.are_active()


def op_or_implementation(op: Callable[..., Any], implementation: Callable[..., Any]) -> Callable[..., Any]:
    """An opaque op for calls by position: its implementation itself in plain eager calls.

    torch's way from an op to an implementation in Python takes longer than a small kernel. It is taken where something
    transforms or intercepts ops: torch.compile, torch.func, modes, tensor subclasses, torch.jit.trace. A profiler of
    plain eager calls shows what the implementation calls.

    Args:
        op: of torch.library, with one kernel for all dispatch keys.
        implementation: that kernel.

    Raises:
        NotImplementedError: where torch.compile traces a transform of torch.func; what it cannot trace it runs eagerly.
    """

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            levels.refuse_to_be_traced()
            return op(*arguments)
        return op(*arguments) if _are_observed(arguments) else implementation(*arguments)

    return call


def differentiable(
    name: str,
    forward: Callable[..., Any],
    save: Callable[[Any, tuple, Any], None],
    backward: Callable[..., tuple[Tensor | None, ...]],
    rules: Rules,
    *,
    tensors: int,
) -> Callable[..., Any]:
    """``forward`` as a node of the autograd graph, for calls by position.

    torch has two ways to define a node. One keeps what its backward needs in a function of its own, which torch.func
    and the compiler ask for, and which costs an eager call as much as a small kernel; the other does so within the
    forward. Each is used where it is the better. The compiler knows no node with rules for torch.func.

    Args:
        name: of the node.
        forward: of the arguments.
        save: called as ``save(ctx, arguments, output)``, keeps what the backward needs.
        backward: called as ``backward(ctx, *gradients)``, gives a gradient or ``None`` for each argument. The kernel it
            calls is ``transforms.transformable``, and so a node itself where the gradients are differentiated in turn.
        rules: of the forward, for transforms.
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
        return (*backward(ctx, *gradients)[:tensors], None)

    kind, bases = type(torch.autograd.Function), (torch.autograd.Function,)
    eager = kind(name, bases, {"forward": staticmethod(eager_forward), "backward": staticmethod(eager_backward)})
    methods = {"forward": forward, "setup_context": save, "backward": once_differentiable(backward)}
    compiled = kind(name, bases, {name: staticmethod(method) for name, method in methods.items()})
    transformed = transforms.node(name, forward, save, backward, rules)

    def apply(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():
            levels.refuse_to_be_traced()
            return compiled.apply(*arguments)
        if levels.are_active():
            return transforms.run(transformed, rules, arguments)
        return eager.apply(*arguments[:tensors], arguments[tensors:])

    return apply


# What the arguments of an op may be; a subclass of Tensor is none of these.
_PLAIN = frozenset((Tensor, torch.nn.Parameter, torch.dtype, type(None), bool, int, float, str, list, tuple))


def _are_observed(arguments: tuple) -> bool:
    """Whether a mode, a transform, a tracer or a subclass of Tensor would see an op that is called with these."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or not _PLAIN.issuperset(map(type, arguments))
    )
