"""Makes modules leaves of ``torch.fx``: a call of one is a node of the graph, and nothing within it is traced.

Tracers decide what is a leaf themselves, and none can be told of these modules beforehand. So each asks when it is
called with a proxy, and records the call the way that a tracer records that of a leaf.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy

from .hooks import hooked_for_tracing


def traced(x: object) -> bool:
    """Whether x is ``torch.fx``'s stand-in for a tensor, or a tuple of tensors that begins with one."""
    if type(x) is Tensor:  # nearly always, and quickly told
        return False
    return isinstance(x[0] if isinstance(x, tuple) and x else x, Proxy)


def as_leaf(module: nn.Module, *args: Any, **options: Any) -> Proxy:
    """What calling the module with these arguments, one of them ``traced``, will give: one node.

    Raises:
        TypeError: if the module is not within the model that is traced but that model itself.
        RuntimeError: if the module has hooks. They have run on the proxies then, or will; what they do would be in the
            graph, and be done again by the leaf.
    """
    first = next(x for x in (*args, *options.values()) if traced(x))
    tracer = (first[0] if isinstance(first, tuple) else first).tracer
    if tracer.root is module:
        raise TypeError(
            f"torch.fx takes a {type(module).__name__} as a leaf and traces nothing within it; trace a model that "
            f"holds it"
        )
    path = tracer.path_of_module(module)
    if hooked_for_tracing(module):
        raise RuntimeError(
            f"{path} has hooks, which torch.fx would trace here and the leaf would run again; register hooks after "
            f"tracing, on the modules of the traced model"
        )
    return tracer.create_proxy("call_module", path, args, options)
