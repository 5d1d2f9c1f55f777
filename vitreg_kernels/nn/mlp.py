"""The MLPs of a block: GELU or SwiGLU between two linear layers, with timm's parameter names."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Mlp(nn.Module):
    """``fc2(gelu(fc1(x)))`` with the exact GELU (Hendrycks and Gimpel, arXiv 1606.08415).

    Args:
        dim: C, channels in and out.
        hidden_dim: channels between the two linear layers.
        drop: dropout after each linear layer, in training only.
        device, dtype: of the parameters.
    """

    _PARTS = 1  # of fc1's output, each hidden_dim wide

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, self._PARTS * hidden_dim, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden_dim, dim, device=device, dtype=dtype)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., C]`` to the same."""
        return self.drop(self.fc2(self.drop(self._activate(self.fc1(x)))))

    def _activate(self, x: Tensor) -> Tensor:
        return F.gelu(x)


class SwiGLU(Mlp):
    """``fc2(silu(gate) * value)`` with gate and value both from ``fc1`` (Shazeer, arXiv 2002.05202, eq. 6).

    The weight of ``fc1`` is ``[2 * hidden_dim, C]``, the gate's rows before the value's, as in timm and DINOv2.
    """

    _PARTS = 2

    def _activate(self, x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value
