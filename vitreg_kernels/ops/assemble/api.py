"""The public function: validate, select a backend, run it."""

from __future__ import annotations

from torch import Tensor

from ... import dispatch
from . import autograd, backends, features
from .validation import validated


def assemble_tokens(
    patches: Tensor,
    cls_token: Tensor | None = None,
    register_tokens: Tensor | None = None,
    pos_embed: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """The sequence that the first block of a Vision Transformer reads: ``[CLS | registers | patches]`` with positions.

    How many rows the position embedding (Dosovitskiy et al., arXiv 2010.11929, eq. 1) has says which tokens it belongs
    to: M, the patches alone (timm with ``no_embed_class=True``); K + M, CLS tokens and patches (DINOv2 and Hugging
    Face, which insert the registers of Darcet et al., arXiv 2309.16588, after it is added); K + R + M, every token
    (timm otherwise). Differentiable in everything; the gradients of the parameters are summed over the batch in fp32
    (fp64 for fp64).

    Args:
        patches: ``[B, M, C]``; fp32, fp16, bf16 or fp64, any strides: those of a convolution's
            ``[B, C, h, w].flatten(2).transpose(1, 2)`` are read in place.
        cls_token: ``[1, K, C]``.
        register_tokens: ``[1, R, C]``.
        pos_embed: ``[1, M, C]``, ``[1, K + M, C]`` or ``[1, K + R + M, C]``, at the resolution of the patches.
        backend: a backend's name, which then runs or raises; ``None`` takes the default for such a call.

    Returns:
        ``[B, K + R + M, C]``, contiguous and no view of an argument, in the dtype that torch promotes all arguments
        to, under autocast too. A sum is rounded once.

    Raises:
        TypeError, ValueError: for arguments that do not fit together; nothing has run then.
        UnsupportedError: if the named backend, or every backend, cannot serve the call.
    """
    inputs = validated(patches, cls_token, register_tokens, pos_embed)
    chosen = dispatch.select(backends.BACKENDS, features.request_of(inputs), backend)
    return autograd.assemble(inputs, chosen.name) if chosen.opaque else chosen.forward(inputs)
