"""The asked-for statistics by blocks of query rows, for backends whose kernels do not give them.

Logits are recomputed in fp32 a block at a time, so memory grows with N and not with N x N.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._shared.arguments import without_autocast
from .._shared.transforms import Rules, transformable
from .packing import as_batch, runs_of_equal_length
from .transforms import fold_statistics
from .types import NO_STATISTICS, AttentionInputs, AttentionOutputs

LOGIT_STATISTICS = ("lse", "prefix_attention", "received_attention", "max_logit")

# Logits held at once: 2**22 fp32 values are 16 MiB, near a CPU's last-level cache and enough rows to fill a GPU.
_LOGITS_AT_ONCE = 2**22


def of_output(inputs: AttentionInputs, output: Tensor) -> AttentionOutputs:
    """Statistics of a call whose rotation is already carried out (``inputs.rope`` is None) and of its output."""
    if not inputs.outputs:
        return NO_STATISTICS
    asked = dict.fromkeys(inputs.outputs)
    if "token_norms" in asked:
        dtype = torch.promote_types(output.dtype, torch.float32)
        asked["token_norms"] = torch.linalg.vector_norm(output.detach(), dim=(1, 3), dtype=dtype)
    of_logits = [name for name in inputs.outputs if name != "token_norms"]
    if of_logits:
        computed = _statistics(
            inputs.query.detach(),
            inputs.key.detach(),
            None if inputs.attn_mask is None else inputs.attn_mask.detach(),
            inputs.cu_seqlens,
            inputs.num_prefix_tokens,
            inputs.scale,
            " ".join(of_logits),
        )
        asked |= zip(of_logits, computed, strict=True)
    return AttentionOutputs(**asked)


def blockwise(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    num_prefix_tokens: int,
    scale: float,
    outputs: str,
) -> list[Tensor]:
    """Body of ``vitreg::attention_statistics``: those that ``outputs`` names, each one of ``LOGIT_STATISTICS``."""
    with without_autocast(query):  # fp32 is meant where it is written
        statistics = _of_call(query, key, attn_mask, cu_seqlens, num_prefix_tokens, scale, outputs)
    return [statistics[LOGIT_STATISTICS.index(name)] for name in outputs.split()]


def _of_call(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    prefix: int,
    scale: float,
    outputs: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if cu_seqlens is None:
        return _of_batch(query, key, attn_mask, prefix, scale, outputs)
    runs = []
    for run in runs_of_equal_length(cu_seqlens, query.shape[2]):
        *by_token, max_logit = _of_batch(as_batch(query, *run), as_batch(key, *run), None, prefix, scale, outputs)
        # [images, H, ..., N] -> [1, H, ..., images x N]: the pack's own token axis
        runs.append((*(x.movedim(0, -2).flatten(-2).unsqueeze(0) for x in by_token), max_logit))
    lse, prefix_attention, received, max_logit = zip(*runs, strict=True)
    return torch.cat(lse, -1), torch.cat(prefix_attention, -1), torch.cat(received, -1), torch.cat(max_logit)


def _of_batch(
    query: Tensor, key: Tensor, attn_mask: Tensor | None, prefix: int, scale: float, outputs: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, tokens, _ = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    rows = prefix if outputs == "prefix_attention" else tokens
    key = key.to(dtype).transpose(-2, -1)

    lse = query.new_empty(batch, heads, rows, dtype=dtype)
    prefix_attention = query.new_empty(batch, heads, prefix, tokens, dtype=dtype)
    received = query.new_zeros(batch, heads, tokens, dtype=dtype)
    max_logit = query.new_full((batch, heads), -torch.inf, dtype=dtype)
    step = max(16, _LOGITS_AT_ONCE // max(1, batch * heads * tokens))
    for start in range(0, rows, step):
        block = slice(start, min(start + step, rows))
        logits = query[:, :, block].to(dtype) @ key * scale
        if attn_mask is not None:
            mask = attn_mask if attn_mask.shape[2] == 1 else attn_mask[:, :, block]
            logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
        max_logit = torch.maximum(max_logit, logits.amax((-2, -1)))
        lse[:, :, block] = logits.logsumexp(-1)
        # Not exp(logits - lse), which takes on the rounding of a large lse.
        probabilities = logits.softmax(-1)
        if attn_mask is not None:  # a query all of whose keys are masked attends to nothing
            probabilities.masked_fill_(lse[:, :, block, None] == -torch.inf, 0.0)
        received += probabilities.sum(-2)
        prefix_rows = slice(start, min(block.stop, prefix))
        prefix_attention[:, :, prefix_rows] = probabilities[:, :, : max(0, prefix - start)]
    return lse, prefix_attention, received.div_(tokens), max_logit


_statistics = transformable(
    "AttentionStatistics",
    lambda *arguments: tuple(torch.ops.vitreg.attention_statistics(*arguments)),
    Rules(formula=lambda *arguments: tuple(blockwise(*arguments)), fold=fold_statistics),
)
