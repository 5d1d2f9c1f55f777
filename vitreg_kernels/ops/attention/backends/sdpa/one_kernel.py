"""torch's kernels of scaled_dot_product_attention one by one: flash, cuDNN, memory-efficient, and the formula.

Each is ``any_kernel`` with the other kernels switched off, and no fallback. A second derivative and a forward-mode one
are the formula's, as of every fused kernel. Exported and traced programs do not keep the switches, so none is served.
torch's switches are the whole process's, so threads that call these at once disturb each other, and whoever calls
scaled_dot_product_attention beside them. A call that names no backend is therefore never served by one of these.
"""

from __future__ import annotations

from functools import cache, partial

import torch
from torch.backends import cuda
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from .....dispatch import Backend, Request, Requirements, unmet
from .....errors import UnsupportedError
from ...._shared import observers, probe, requirements
from ...._shared.arguments import DTYPES
from ... import features
from ...types import AttentionInputs, AttentionResult
from . import any_kernel

_NONE_LEFT = "No available kernel"  # how torch's error begins where the kernels that are left do not serve a call


def forward(inputs: AttentionInputs, *, kernel: str) -> AttentionResult:
    """By one kernel, a member of ``SDPBackend``, or not at all.

    Raises:
        UnsupportedError: for what the request does not tell, such as one token by cuDNN; in torch's words.
    """
    try:
        return _switched(inputs, kernel)
    except RuntimeError as error:
        if torch.compiler.is_compiling() or not str(error).startswith(_NONE_LEFT):
            raise
        reasons = probe.words_against(partial(_switched, inputs, kernel))
        message = f"torch's {kernel} cannot serve this call: {reasons}. Name another backend, such as 'sdpa'"
        raise UnsupportedError(message) from error


# What says whether torch may take a kernel, and what changes that. ``sdpa_kernel`` does the same, but takes the host as
# long as a small call does.
_SWITCHES = {
    "FLASH_ATTENTION": (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
    "CUDNN_ATTENTION": (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
    "EFFICIENT_ATTENTION": (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
    "MATH": (cuda.math_sdp_enabled, cuda.enable_math_sdp),
}


def _switched(inputs: AttentionInputs, kernel: str) -> AttentionResult:
    if torch.compiler.is_compiling():  # the compiler keeps this one in its graph
        with sdpa_kernel(getattr(SDPBackend, kernel)):
            return any_kernel.forward(inputs)
    before = [enabled() for enabled, _ in _SWITCHES.values()]
    try:
        for name, (_, enable) in _SWITCHES.items():
            enable(name == kernel)
        return any_kernel.forward(inputs)
    finally:
        for (_, enable), was in zip(_SWITCHES.values(), before, strict=True):
            enable(was)


def _refusal(kernel: str, device: str, dtype: torch.dtype) -> str:
    return _probed(kernel, device, dtype)


# The compiler takes the answer for a constant: it can trace neither a cache nor a thread. As in observers.py.
_refusal._dynamo_marked_constant = True


@cache
def _probed(kernel: str, device: str, dtype: torch.dtype) -> str:
    """What torch says to a call of a few tokens, forward and backward; empty if it runs."""

    def call(device: torch.device) -> None:
        query = torch.zeros(1, 1, 16, 64, dtype=dtype, device=device, requires_grad=True)
        with sdpa_kernel(getattr(SDPBackend, kernel)):
            functional.scaled_dot_product_attention(query, query, query).sum().backward()

    return probe.refusal(call, device)


def _refuses(request: Request, *, kernel: str, needs: Requirements, granule: int) -> list[str]:
    """What a kernel has against a call beyond ``needs``; it loads ``granule`` bytes of a head at once."""
    reasons = []
    divisor = max(1, 8 * granule // torch.finfo(request.dtype).bits)
    if request.head_dim % divisor:
        reasons.append(f"takes head dims divisible by {divisor}, not {request.head_dim}")
    if torch.compiler.is_exporting():
        reasons.append("cannot be kept by torch.export, whose programs choose among torch's kernels when they run")
    if reasons or unmet(needs, request):
        return reasons
    words = _refusal(kernel, request.device, request.dtype)
    return [f"torch refuses: {words}"] if words else []


def _backend(kernel: str, needs: Requirements, *, granule: int = 1) -> Backend:
    return Backend(
        name=f"sdpa_{kernel.removesuffix('_ATTENTION').lower()}",
        requirements=needs,
        forward=partial(forward, kernel=kernel),
        default="never",
        refuses=partial(_refuses, kernel=kernel, needs=needs, granule=granule),
    )


_HALF = (torch.float16, torch.bfloat16)
_PLAIN = (features.ROPE, features.PACKING, observers.TRANSFORMS)
_STEADY = (*_PLAIN, features.DETERMINISTIC)
_ALL = (*features.OF_SDPA, observers.TRANSFORMS)
_UNSTEADY = tuple(feature for feature in _ALL if feature != features.DETERMINISTIC)  # its backward adds up in any order
_SM_80 = requirements.SM_80_AND_NEWER

# What torch documents. That flash has fp32 and fp64 on CPUs alone, and who has what on AMD's GPUs, it says itself.
KERNELS = (
    _backend("FLASH_ATTENTION", Requirements(("cpu", "cuda"), DTYPES, (1, 256), _STEADY, _SM_80)),
    _backend("CUDNN_ATTENTION", Requirements(("cuda",), _HALF, (8, 128), _PLAIN, _SM_80), granule=16),
    _backend("EFFICIENT_ATTENTION", Requirements(("cuda",), (torch.float32, *_HALF), features=_UNSTEADY), granule=16),
    _backend("MATH", requirements.anywhere(())._replace(features=_ALL)),
)
