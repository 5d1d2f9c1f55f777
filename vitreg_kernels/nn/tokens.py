"""Learnable register tokens, put into a sequence and taken out again."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._symbolic import known
from ..layout import TokenLayout
from .tracing import as_leaf, traced


class RegisterTokens(nn.Module):
    """Registers (Darcet et al., "Vision Transformers Need Registers", arXiv 2309.16588) between CLS tokens and patches.

    Registers carry no position embedding: call this after it is added, and ``remove`` after the last block. They start
    as normal noise of standard deviation 1e-6, as CLS and register tokens do in DINOv2 and timm: unequal, so that they
    can learn different things. The LayerNorm of the first block blows such noise up, so a model trained without
    registers moves at once when given these; those of ``patch_like_registers`` move it far less. ``torch.fx`` takes the
    module as a leaf.

    Args:
        dim: C, channels of a token.
        num_registers: R; with 0 there is no parameter and the sequence passes unchanged.
        num_cls_tokens: tokens in front of the registers.
        device, dtype: of the parameter.

    Attributes:
        register_tokens: the parameter, ``[1, R, C]`` (DINOv2's and Hugging Face's name), or ``None`` if R is 0.
        layout: the order of the tokens once the registers are in.

    Raises:
        ValueError: if ``dim`` is not a positive int or a count is not a non-negative int.
    """

    def __init__(
        self,
        dim: int,
        num_registers: int = 4,
        *,
        num_cls_tokens: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(dim, int) or dim < 1:
            raise ValueError(f"dim must be a positive int, not {dim!r}")
        self.dim = dim
        self.layout = TokenLayout(num_registers=num_registers, num_cls_tokens=num_cls_tokens)
        # No parameter rather than an empty one: an empty one would never receive a gradient, which DDP objects to.
        self.register_tokens = (
            nn.Parameter(torch.empty(1, num_registers, dim, device=device, dtype=dtype)) if num_registers else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the registers anew, for instance after ``to_empty`` on a module built on the meta device."""
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Insert the registers.

        Args:
            x: ``[B, number of CLS tokens + M, C]``, CLS tokens first, on the registers' device.

        Returns:
            ``[B, number of CLS tokens + R + M, C]`` in the dtype of ``x``; ``x`` itself if R is 0.

        Raises:
            ValueError: if ``x`` has another rank, other channels, or fewer tokens than CLS tokens.
        """
        if traced(x):
            return as_leaf(self, x)
        _check(x, self.dim)
        cls_tokens = self.layout.num_cls_tokens
        if known(x.shape[1] < cls_tokens):
            raise ValueError(f"x has {x.shape[1]} tokens, fewer than the {cls_tokens} CLS tokens registers go behind")
        if self.register_tokens is None:
            return x
        registers = self.register_tokens.to(x.dtype).expand(x.shape[0], -1, -1)
        return torch.cat((x[:, :cls_tokens], registers, x[:, cls_tokens:]), dim=1)

    def remove(self, x: Tensor) -> Tensor:
        """Take the registers out: ``[B, N, C]`` to ``[B, N - R, C]``.

        Raises:
            ValueError: if ``x`` has another rank, other channels, or fewer tokens than the prefix.
        """
        return _removed(x, self.dim, self.layout)

    def extra_repr(self) -> str:
        return f"{self.dim}, num_registers={self.layout.num_registers}, num_cls_tokens={self.layout.num_cls_tokens}"


@torch.fx.wrap  # it reads the shape of its input, and so is a leaf of torch.fx, as the module is
def _removed(x: Tensor, dim: int, layout: TokenLayout) -> Tensor:
    _check(x, dim)
    return layout.strip_registers(x)


def _check(x: Tensor, dim: int) -> None:
    if x.dim() != 3 or x.shape[2] != dim:
        raise ValueError(f"x must be [B, N, {dim}], not of shape {tuple(x.shape)}")


def patch_like_registers(pos_embed: Tensor, patch_bias: Tensor, num_registers: int) -> Tensor:
    """Initial registers that leave a model trained without them close to what it was.

    Each is the embedding of a patch of the mean colour (the bias of the patch embedding, because normalised images have
    mean 0) at the mean position of one horizontal band of the image. To the model it is one more dull patch, so little
    attention goes to it, and no two are equal. Tokens near 0 and copies of CLS, the obvious choices, are unlike any
    patch: the model attends to them, and its features move several times further.

    Args:
        pos_embed: ``[1, M, C]``, position rows of the patches alone, row by row.
        patch_bias: ``[C]``, bias of the patch embedding.
        num_registers: R.

    Returns:
        ``[1, R, C]``, in the dtype and on the device of the two.

    Raises:
        ValueError: if the shapes do not fit together or R is not a positive int.
    """
    if pos_embed.dim() != 3 or patch_bias.shape != pos_embed.shape[2:]:
        raise ValueError(
            f"pos_embed must be [1, M, C] and patch_bias [C], not of shapes {tuple(pos_embed.shape)} and "
            f"{tuple(patch_bias.shape)}"
        )
    if not isinstance(num_registers, int) or num_registers < 1:
        raise ValueError(f"num_registers must be a positive int, not {num_registers!r}")
    return F.adaptive_avg_pool1d(pos_embed.transpose(1, 2), num_registers).transpose(1, 2) + patch_bias
