"""Who looks at a call while it runs, as features that a backend must serve: function transforms and tracers."""

from __future__ import annotations

import torch

from . import levels

TRANSFORMS = "torch.func and forward-mode derivatives"
TRACED = "torch.jit.trace"
TRACED_WITH_GRADIENTS = "torch.jit.trace outside torch.no_grad()"
ONNX = "ONNX export"

ALL = (TRANSFORMS, TRACED, TRACED_WITH_GRADIENTS, ONNX)

# What torch code serves, and what kernels behind an op do. A trace of an op has no gradients, so nobody gets one by
# default; torch.jit.trace checks itself without gradients, and must find the same backend.
OF_TORCH = ALL
OF_KERNELS = (TRANSFORMS, TRACED)
OF_NAMED_KERNELS = (TRACED,)


def present(*, gradients: bool = True) -> tuple[str, ...]:
    """The features that a call made now asks for.

    Args:
        gradients: whether the op has any. A trace loses those of a kernel, and asks nothing of an op without.
    """
    if torch.compiler.is_compiling():  # where torch.compile itself says what it cannot trace
        return (ONNX,) if _in_onnx_export() else ()
    transformed = (TRANSFORMS,) if levels.are_active() else ()
    if torch._C._get_tracing_state() is None:
        return transformed
    if _in_onnx_export():
        return (*transformed, ONNX)
    if not gradients:
        return transformed
    return (*transformed, TRACED, TRACED_WITH_GRADIENTS) if torch.is_grad_enabled() else (*transformed, TRACED)


def _in_onnx_export() -> bool:
    return torch.onnx.is_in_onnx_export()


# The compiler takes torch's function to answer False, and runs this one. What torch.compiler.assume_constant_result
# does, which would import the compiler here.
_in_onnx_export._dynamo_marked_constant = True
