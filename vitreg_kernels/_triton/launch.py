"""A Triton launch as data: one description for a GPU, the interpreter and the offline compiler."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

from .keys import settle

Constant: TypeAlias = int | float | bool | str | tuple[int, ...] | None
Argument: TypeAlias = "Tensor | int | float | tuple[Argument, ...] | None"


class Strided(NamedTuple):
    """A tensor as one kernel argument: kernels read ``x.pointer`` and ``x.strides[i]``."""

    pointer: Tensor
    strides: tuple[int, ...]


def strided(x: Tensor) -> Strided:
    """A tensor as one kernel argument."""
    return Strided(x, x.stride())


class Launch(NamedTuple):
    """One kernel launch, fully described.

    Attributes:
        kernel: a ``@triton.jit`` function.
        grid: up to three program counts.
        arguments: run-time arguments by parameter name: tensors, ints, floats, tuples of these such as ``Strided``, and
            ``None`` for an absent tensor.
        constants: ``tl.constexpr`` arguments by parameter name.
        num_warps, num_stages: compiler options.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Argument]
    constants: dict[str, Constant]
    num_warps: int
    num_stages: int

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments, in order."""
        return list(tensors_in(self.arguments.values()))

    @property
    def options(self) -> dict[str, int | bool]:
        """What triton's compiler is told, the same on a GPU and offline.

        Sums and products are fused, and not by triton's default, which a version or an environment variable may turn
        off: the attention kernels count on a logit being summed alike in all of them.
        """
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}

    def run(self) -> Any:
        """Launch on the current device, and return what triton compiled.

        A grid with no programs launches nothing, and the interpreter compiles nothing; both return ``None``.
        """
        if 0 in self.grid:
            return None
        settle(self.kernel)
        return self.kernel[self.grid](**self.arguments, **self.constants, **self.options)


def tensors_in(arguments: Iterable[Argument]) -> Iterator[Tensor]:
    """Every tensor among kernel arguments, in order."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, tuple):
            yield from tensors_in(argument)
