"""Whether somebody hooked a module that fusion does not call, or calls with more than one tensor.

Such a module is then called as timm calls its namesake, with one tensor for one tensor, at the price of the fusion
around it. FSDP2's hooks, which it puts on every block, do not ask for that.
"""

from __future__ import annotations

from types import MethodType

from torch import nn


def hooked(module: nn.Module | None) -> bool:
    """Whether a module is there and has a hook that wants to see its tensors, before or after, forward or backward."""
    if module is None:
        return False
    if module._backward_hooks or module._backward_pre_hooks:
        return True
    if not (module._forward_hooks or module._forward_pre_hooks):
        return False
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(not _of_fsdp(hook) for hook in hooks)


def _of_fsdp(hook: object) -> bool:
    # torch.compile traces this, and what it traces here must not tell one block from another.
    return isinstance(hook, MethodType) and type(hook.__self__).__module__.startswith("torch.distributed.fsdp.")
