"""FlashAttention 2, 3 or 4, by their public functions only, imported when first used.

Three packages with nearly one interface: token-major tensors, and packs by ``cu_seqlens`` in place. Serves plain,
rotated and packed calls with autograd of its own; statistics come from ``statistics.py``. 4 compiles its kernels when
first asked, for seconds.
"""

from __future__ import annotations

from functools import cache, partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ....dispatch import Backend, Request, Requirements
from ..._shared import probe, requirements
from .. import features, statistics
from ..rope import rotate_query_and_key
from ..types import AttentionInputs, AttentionResult

# The modules of 3, 4 and 2, in the order they are asked: 3 is made for Hopper and refuses what is newer.
RELEASES = ("flash_attn_interface", "flash_attn.cute", "flash_attn")


class _Found(NamedTuple):
    """The release that runs here, or why none does; one of the two is empty."""

    release: str
    reasons: list[str]


@cache
def _find(dtype: torch.dtype) -> _Found:
    """The first release that runs a call of a few tokens, forward and backward."""
    reasons = []
    for release in RELEASES:
        words = probe.refusal(partial(_attempt, release, dtype), "cuda")
        if not words:
            return _Found(release, [])
        reasons.append(f"{release}: {words}")
    return _Found("", [f"no release of FlashAttention runs here ({'; '.join(reasons)})"])


def _attempt(release: str, dtype: torch.dtype, device: torch.device) -> None:
    query = torch.zeros(1, 16, 1, 64, dtype=dtype, device=device, requires_grad=True)
    attend(release, query, query, query).sum().backward()


def attend(release: str, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """``[B, N, H, D]`` from the same; ``options`` are those that all releases share."""
    return call(release, "flash_attn_func", query, key, value, **options)


def attend_packed(
    release: str, query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int, **options: Any
) -> Tensor:
    """``[T, H, D]`` from the same, the images one after another as ``cu_seqlens`` says."""
    # By name: their places differ between the releases.
    bounds = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
    longest = {"max_seqlen_q": max_seqlen, "max_seqlen_k": max_seqlen}
    return call(release, "flash_attn_varlen_func", query, key, value, **bounds, **longest, **options)


def call(release: str, function: str, *arguments: Any, **options: Any) -> Tensor:
    """The output of a function of a release. Older builds of 3, and 4, give the log-sum-exp beside it."""
    # Imported by each call, which costs nothing from the second on.
    result = getattr(import_module(release), function)(*arguments, **options)
    return result[0] if isinstance(result, tuple) else result


def forward(inputs: AttentionInputs) -> AttentionResult:
    if inputs.rope is not None:
        inputs = rotate_query_and_key(inputs)
    release = _find(inputs.query.dtype).release
    query, key, value = (x.transpose(1, 2) for x in (inputs.query, inputs.key, inputs.value))  # [B, N, H, D]
    options = {"softmax_scale": inputs.scale, "deterministic": torch.are_deterministic_algorithms_enabled()}
    if not query.numel():  # which 2 refuses
        output = value
    elif inputs.cu_seqlens is None:
        output = attend(release, query, key, value, **options)
    else:
        output = attend_packed(
            release, query[0], key[0], value[0], inputs.cu_seqlens, inputs.max_seqlen, **options
        ).unsqueeze(0)
    output = output.contiguous().transpose(1, 2)
    return AttentionResult(output, statistics.of_output(inputs, output))


def _refuses(request: Request) -> list[str]:
    return probe.refuses(request, _REQUIREMENTS, lambda dtype, _: _find(dtype).reasons)


_REQUIREMENTS = Requirements(
    devices=("cuda",),
    dtypes=(torch.float16, torch.bfloat16),
    head_dims=(8, 128),
    features=(features.ROPE, features.PACKING, features.DETERMINISTIC),
    capabilities=requirements.SM_80_AND_NEWER,
)

BACKEND = Backend(
    name="flash_attn", requirements=_REQUIREMENTS, forward=forward, default="if measured", refuses=_refuses
)
