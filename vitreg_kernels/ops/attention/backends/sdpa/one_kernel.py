"""torch's kernels of scaled_dot_product_attention one by one: flash, cuDNN, memory-efficient, and the formula.

Each is ``any_kernel`` by one of ``kernels``, and no fallback. A second derivative and a forward-mode one are the
formula's, as of every fused kernel, and so is an empty batch. A call that names none gets one only where a measurement
made it the default and the user has not switched it off, with ``torch.nn.attention.sdpa_kernel`` or for good.
"""

from __future__ import annotations

from functools import cache, partial

import torch
from torch import Tensor
from torch.backends import cuda

from ....._symbolic import exporting
from .....dispatch import Backend, Request, Requirements, unmet
from .....errors import UnsupportedError
from ...._shared import observers, probe, requirements
from ...._shared.arguments import DTYPES
from ... import features
from ...types import AttentionInputs, AttentionResult
from . import any_kernel, kernels

_ATTEND: dict[str, kernels.Attend] = {
    "flash": kernels.flash,
    "cudnn": kernels.cudnn,
    "efficient": kernels.efficient,
    "math": kernels.formula,
}

# What tells whether the user lets torch take a kernel.
_SWITCHES = {
    "flash": cuda.flash_sdp_enabled,
    "cudnn": cuda.cudnn_sdp_enabled,
    "efficient": cuda.mem_efficient_sdp_enabled,
    "math": cuda.math_sdp_enabled,
}

_MOST_OF_A_LAUNCH = 65_535  # images, and heads, that a launch on a GPU can count
# Errors that say nothing about whether a kernel serves a call.
_NO_REFUSALS = (torch.OutOfMemoryError, torch.AcceleratorError)


def forward(inputs: AttentionInputs, *, kernel: str) -> AttentionResult:
    """By one kernel, or not at all.

    Raises:
        UnsupportedError: for what the request does not tell, such as one token by cuDNN.
    """
    return any_kernel.forward(inputs, kernels.formula if kernel == "math" else partial(_fused, kernel))


def _fused(kernel: str, query: Tensor, *rest: Tensor | float | None) -> Tensor:
    if query.numel() == 0:
        return kernels.formula(query, *rest)
    if reason := _beyond(kernel, query):
        raise _unsupported(kernel, reason)
    try:
        return _ATTEND[kernel](query, *rest)
    except RuntimeError as error:
        # Strides that a kernel cannot load, or a plan that cuDNN does not find: nobody but the kernel knows.
        if torch.compiler.is_compiling() or isinstance(error, _NO_REFUSALS):
            raise
        raise _unsupported(kernel, probe.first_line(error)) from error


def _beyond(kernel: str, query: Tensor) -> str:
    """What a kernel would not notice of tensors that it does not serve; empty if nothing."""
    if query.device.type == "cpu" or exporting():  # a program is of any size
        return ""
    batch, heads, tokens, _ = query.shape
    if batch > _MOST_OF_A_LAUNCH or heads > _MOST_OF_A_LAUNCH:
        return f"takes at most {_MOST_OF_A_LAUNCH} images and heads, not {batch} and {heads}"
    if kernel == "cudnn" and tokens == 1:
        return "takes more than one token"
    return ""


def _unsupported(kernel: str, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"backend 'sdpa_{kernel}' cannot serve this call: {reason}. Name another backend, such as 'sdpa'"
    )


def _switched_off(*, kernel: str) -> str:
    return "" if _SWITCHES[kernel]() else "is switched off in torch; name it to use it all the same"


def _refusal(kernel: str, device: str, dtype: torch.dtype) -> str:
    return _probed(kernel, device, dtype)


# The compiler takes these answers for constants: it can trace neither torch's switches nor a cache nor a thread. As in
# observers.py.
_switched_off._dynamo_marked_constant = True
_refusal._dynamo_marked_constant = True


@cache
def _probed(kernel: str, device: str, dtype: torch.dtype) -> str:
    """What torch says to a call of a few tokens, forward and backward; empty if it runs."""

    def call(device: torch.device) -> None:
        query = torch.zeros(1, 1, 16, 64, dtype=dtype, device=device, requires_grad=True)
        _ATTEND[kernel](query, query, query, None, 0.0, 0.125).sum().backward()

    return probe.refusal(call, device)


def _refuses(request: Request, *, kernel: str, needs: Requirements, granule: int) -> list[str]:
    """What a kernel has against a call beyond ``needs``; it loads ``granule`` bytes of a head at once."""
    divisor = max(1, 8 * granule // torch.finfo(request.dtype).bits)
    if request.head_dim % divisor:
        return [f"takes head dims divisible by {divisor}, not {request.head_dim}"]
    if unmet(needs, request):
        return []
    words = _refusal(kernel, request.device, request.dtype)
    return [f"torch refuses: {words}"] if words else []


def _backend(kernel: str, needs: Requirements, *, granule: int = 1) -> Backend:
    return Backend(
        name=f"sdpa_{kernel}",
        requirements=needs,
        forward=partial(forward, kernel=kernel),
        default="if measured",
        refuses=partial(_refuses, kernel=kernel, needs=needs, granule=granule),
        switched_off=partial(_switched_off, kernel=kernel),
    )


_HALF = (torch.float16, torch.bfloat16)
_TRACED = (observers.TRACED, observers.TRACED_WITH_GRADIENTS)
# cuDNN builds a plan for every new shape, which takes about a second, and packs are of new shapes at every step.
_OF_CUDNN = (features.ROPE, observers.TRANSFORMS)
_OF_FLASH = (features.ROPE, features.PACKING, features.DETERMINISTIC, observers.TRANSFORMS, *_TRACED)
_OF_MATH = (*features.OF_SDPA, observers.TRANSFORMS, *_TRACED)
# Its backward adds up in any order.
_OF_EFFICIENT = (*(x for x in features.OF_SDPA if x != features.DETERMINISTIC), observers.TRANSFORMS)
_SM_80 = requirements.SM_80_AND_NEWER

# What torch documents. That flash has fp32 and fp64 on CPUs alone, and who has what on AMD's GPUs, it says itself.
KERNELS = (
    _backend("flash", Requirements(("cpu", "cuda"), DTYPES, (1, 256), _OF_FLASH, _SM_80)),
    _backend("cudnn", Requirements(("cuda",), _HALF, (8, 128), _OF_CUDNN, _SM_80), granule=16),
    _backend("efficient", Requirements(("cuda",), (torch.float32, *_HALF), features=_OF_EFFICIENT), granule=16),
    _backend("math", requirements.anywhere(())._replace(features=_OF_MATH)),
)
