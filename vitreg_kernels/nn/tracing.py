"""Makes modules leaves of ``torch.fx``: a call of one is a node of the graph, and nothing within it is traced.

Tracers decide what is a leaf themselves, and none can be told of these modules beforehand. So each asks when it is
called with a proxy, and records the call the way that a tracer records that of a leaf.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Proxy


def traced(x: object) -> bool:
    """Whether x is ``torch.fx``'s stand-in for a tensor, or a tuple of tensors that begins with one."""
    return isinstance(_first(x), Proxy)


def as_leaf(module: nn.Module, *args: Any, **options: Any) -> Proxy:
    """What calling the module with these arguments, one of them ``traced``, will give: one node.

    Raises:
        TypeError: if the module is not within the model that is traced but that model itself.
    """
    tracer = next(_first(x).tracer for x in args if traced(x))
    if tracer.root is module:
        raise TypeError(
            f"torch.fx takes a {type(module).__name__} as a leaf and traces nothing within it; trace a model that "
            f"holds it"
        )
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, options)


def _first(x: object) -> object:
    return x[0] if isinstance(x, tuple) and x else x
