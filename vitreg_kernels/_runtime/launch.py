"""A Triton launch as data: one description for a GPU, the interpreter and the offline compiler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

Constant: TypeAlias = int | float | bool | str | tuple[int, ...] | None


class Launch(NamedTuple):
    """One kernel launch, fully described.

    Attributes:
        kernel: a ``@triton.jit`` function.
        grid: up to three program counts.
        arguments: run-time arguments by parameter name (tensors, ints, floats, ``None`` for an absent tensor).
        constants: ``tl.constexpr`` arguments by parameter name.
        num_warps, num_stages: compiler options.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Tensor | int | float | None]
    constants: dict[str, Constant]
    num_warps: int
    num_stages: int

    def run(self) -> None:
        """Launch on the arguments' device; a grid with no programs launches nothing."""
        if 0 in self.grid:
            return
        self.kernel[self.grid](**self.arguments, **self.constants, num_warps=self.num_warps, num_stages=self.num_stages)


def run_all(launches: Sequence[Launch], on: Tensor) -> None:
    """Run launches in order, on the device of a tensor."""
    with torch.cuda.device_of(on):  # triton launches on the current device
        for launch in launches:
            launch.run()
