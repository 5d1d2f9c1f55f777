"""xformers' memory-efficient attention, by its public API only, imported when first used.

Serves plain, rotated and packed calls with autograd of its own; statistics come from ``statistics.py``.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ....dispatch import Backend, Request, Requirements
from ..._shared import probe, requirements
from .. import features, statistics
from ..packing import lengths
from ..rope import rotate_query_and_key
from ..types import AttentionInputs, AttentionResult


@cache
def _refusal(dtype: torch.dtype, head_dim: int) -> list[str]:
    """What xformers says to a call of a few tokens: one built for another torch, CUDA or GPU refuses that already."""
    try:
        from xformers.ops import memory_efficient_attention

        query = torch.zeros(1, 16, 1, head_dim, dtype=dtype, device="cuda")
        memory_efficient_attention(query, query, query)
    except ImportError as error:
        return [f"cannot be imported ({error}); pip install xformers"]
    except (NotImplementedError, RuntimeError) as error:
        return [f"refuses: {str(error).strip().splitlines()[0]}"]
    return []


def forward(inputs: AttentionInputs) -> AttentionResult:
    from xformers.ops import fmha, memory_efficient_attention

    if inputs.rope is not None:
        inputs = rotate_query_and_key(inputs)
    bias = None
    if inputs.cu_seqlens is not None:
        bias = fmha.BlockDiagonalMask.from_seqlens(
            lengths(inputs.cu_seqlens, inputs.query.shape[2]), device=inputs.query.device
        )
    query, key, value = (_to_bnhd(x) for x in (inputs.query, inputs.key, inputs.value))
    output = memory_efficient_attention(query, key, value, attn_bias=bias, scale=inputs.scale)
    output = output.contiguous().transpose(1, 2)
    return AttentionResult(output, statistics.of_output(inputs, output))


def _to_bnhd(x: Tensor) -> Tensor:
    """``[B, N, H, D]`` with neighbouring channels side by side, which every xformers kernel asks for."""
    x = x.transpose(1, 2)
    return x if x.stride(-1) == 1 else x.contiguous()


def _refuses(request: Request) -> list[str]:
    return probe.refuses(request, _REQUIREMENTS, _refusal)


_REQUIREMENTS = Requirements(
    devices=("cuda",),
    dtypes=(torch.float32, torch.float16, torch.bfloat16),
    head_dims=(8, 128),
    features=(features.ROPE, features.PACKING),
    capabilities=requirements.SM_80_AND_NEWER,
)

BACKEND = Backend(name="xformers", requirements=_REQUIREMENTS, forward=forward, default="if measured", refuses=_refuses)
