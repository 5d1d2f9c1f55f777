"""Which function transforms a call runs in: torch.func's levels, and forward-mode differentiation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import forward_ad


def are_active() -> bool:
    """Whether a transform of torch.func, or forward-mode differentiation, would see what is called now.

    ``functionalize`` sees ops as they are, and needs no rule.
    """
    in_forward_mode = forward_ad._current_level >= 0
    if in_forward_mode or not torch._C._are_functorch_transforms_active():
        return in_forward_mode
    return torch.compiler.is_compiling() or any(kind != TransformType.Functionalize for kind in _levels())


def need_more_than_a_gradient(tensors: Sequence[Tensor]) -> bool:
    """Whether a call runs under forward-mode differentiation, or within two gradients, as far as can be told."""
    if torch.compiler.is_compiling():  # which cannot look at the levels of torch.func
        return forward_ad._current_level >= 0
    if not are_active():
        return False
    gradients = _levels().count(TransformType.Grad) + any(_innermost(x).requires_grad for x in tensors)
    return forward_ad._current_level >= 0 or gradients > 1 or TransformType.Jvp in _levels()


def refuse_to_be_traced() -> None:
    """For a kernel that torch.compile is about to trace.

    Raises:
        NotImplementedError: within a transform; what the compiler cannot trace it runs eagerly.
    """
    if are_active():
        raise NotImplementedError(
            "a kernel cannot be traced by torch.compile inside torch.func or forward mode; compile without fullgraph "
            "or name a backend that is torch code, such as 'reference'"
        )


def is_mapped(x: Tensor) -> bool:
    """Whether ``torch.vmap`` maps a tensor, at any level."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        if torch._C._functorch.is_batchedtensor(x):
            return True
        x = torch._C._functorch.get_unwrapped(x)
    return False


def _innermost(x: Tensor) -> Tensor:
    """A tensor without what torch.func's levels wrap around it."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def forward_mode_is_nested() -> bool:
    """Whether a call runs in forward mode within forward mode."""
    return not torch.compiler.is_compiling() and _levels().count(TransformType.Jvp) > 1


def _levels() -> list[TransformType]:
    """The transforms of torch.func that a call runs in, outermost first."""
    return [level.key() for level in torch._C._functorch.get_interpreter_stack() or ()]
