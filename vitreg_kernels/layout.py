"""The order of a sequence's tokens, ``[CLS | registers | patches]``, and everything that depends on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ._symbolic import known


class TokenGroups(NamedTuple):
    """The tokens of a ``[B, N, ...]`` tensor by group, all views of it.

    Attributes:
        cls: ``[B, number of CLS tokens, ...]``.
        registers: ``[B, R, ...]``.
        patches: ``[B, M, ...]``.
    """

    cls: Tensor
    registers: Tensor
    patches: Tensor


@dataclass(frozen=True)
class TokenLayout:
    """Which tokens of a sequence are CLS tokens, registers and patches, in that order.

    Attributes:
        num_patches: M; ``None`` if it varies from call to call, and then any number of patches fits.
        num_registers: R.
        num_cls_tokens: CLS tokens (two with a distillation token, none in a pooled model).
        grid: ``(rows, columns)`` of the patches; gives ``num_patches``.

    Raises:
        ValueError: if a count is not a non-negative int, or ``grid`` and ``num_patches`` disagree.
    """

    num_patches: int | None = None
    num_registers: int = field(default=4, kw_only=True)
    num_cls_tokens: int = field(default=1, kw_only=True)
    grid: tuple[int, int] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("num_registers", "num_cls_tokens"):
            if not _is_count(getattr(self, name)):
                raise ValueError(f"{name} must be a non-negative int, not {getattr(self, name)!r}")
        if self.num_patches is not None and not _is_count(self.num_patches):
            raise ValueError(f"num_patches must be a non-negative int or None, not {self.num_patches!r}")
        if self.grid is None:
            return
        grid = self.grid
        if not isinstance(grid, (tuple, list)) or len(grid) != 2 or not all(_is_count(n) for n in grid):
            raise ValueError(f"grid must be (rows, columns), two non-negative ints, not {grid!r}")
        rows, columns = grid
        if self.num_patches not in (None, rows * columns):
            raise ValueError(
                f"num_patches={self.num_patches} disagrees with grid={rows}x{columns}, which has {rows * columns} "
                f"patches; give only one of them"
            )
        object.__setattr__(self, "grid", (rows, columns))
        object.__setattr__(self, "num_patches", rows * columns)

    @property
    def num_prefix_tokens(self) -> int:
        """P, the CLS tokens and registers."""
        return self.num_cls_tokens + self.num_registers

    @property
    def num_tokens(self) -> int:
        """N = P + M.

        Raises:
            ValueError: if the number of patches is not known.
        """
        if self.num_patches is None:
            raise ValueError(
                "num_tokens needs the number of patches, which this layout lacks; give num_patches or grid"
            )
        return self.num_prefix_tokens + self.num_patches

    @property
    def cls(self) -> slice:
        """The CLS tokens."""
        return slice(0, self.num_cls_tokens)

    @property
    def registers(self) -> slice:
        """The registers."""
        return slice(self.num_cls_tokens, self.num_prefix_tokens)

    @property
    def patches(self) -> slice:
        """The patches: every token after the prefix."""
        return slice(self.num_prefix_tokens, None)

    def split(self, x: Tensor) -> TokenGroups:
        """Views of the CLS tokens, registers and patches of ``x``.

        Args:
            x: ``[B, N, ...]``, any dtype: token features ``[B, N, C]`` or one number a token ``[B, N]``.

        Raises:
            ValueError: if ``x`` has no token dimension, or its N does not fit the layout.
        """
        self.check(x)
        return TokenGroups(x[:, self.cls], x[:, self.registers], x[:, self.patches])

    def strip_registers(self, x: Tensor) -> Tensor:
        """``x`` without its registers: ``[B, N, ...]`` to ``[B, N - R, ...]``; ``x`` itself if R is 0.

        Raises:
            ValueError: if ``x`` has no token dimension, or its N does not fit the layout.
        """
        cls, _, patches = self.split(x)
        return torch.cat((cls, patches), dim=1) if self.num_registers else x

    def check(self, x: Tensor) -> None:
        """Raises ValueError if ``x`` ``[B, N, ...]`` has no token dimension, or its N does not fit the layout."""
        if x.dim() < 2:
            raise ValueError(f"x must be [B, N, ...] with its tokens along dimension 1, not of shape {tuple(x.shape)}")
        prefix = f"{self.num_cls_tokens} CLS and {self.num_registers} register tokens"
        if known(x.shape[1] < self.num_prefix_tokens):
            raise ValueError(f"x has {x.shape[1]} tokens, too few for the layout's {prefix}")
        if self.num_patches is not None and known(x.shape[1] != self.num_tokens):
            raise ValueError(
                f"x has {x.shape[1]} tokens where the layout has {self.num_tokens}: {prefix} and "
                f"{self.num_patches} patches"
            )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
