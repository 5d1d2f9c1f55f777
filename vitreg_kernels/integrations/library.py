"""What this package knows of one model library, and what each file needs to say it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from ..layout import TokenLayout
from ..nn.config import ViTConfig


class ResidualStream(NamedTuple):
    """Where a Vision Transformer's tokens pass on their way from the embedding to the final norm.

    Attributes:
        layers: name and module of each place, first to last. What the module gives is the stream: ``[B, N, C]`` tokens,
            a tuple that begins with them, or a list of such tensors, one for each size of crop. A ``RegisterViT`` never
            has the stream between two blocks in memory; its modules give the norms of the tokens, ``[B, N]``.
        layout: the order of the tokens.
    """

    layers: list[tuple[str, nn.Module]]
    layout: TokenLayout


class Library(NamedTuple):
    """One model library.

    Attributes:
        name: its package.
        residual_stream: where the stream of a module of its passes; ``None`` of any other module.
        convert: a state dict of one of its models as ``RegisterViT``'s configuration and weights, ``None`` of any
            other; no function where its checkpoints are not read. Takes ``num_heads``, which may be ``None``.
    """

    name: str
    residual_stream: Callable[[nn.Module], ResidualStream | None]
    convert: Callable[..., tuple[ViTConfig, dict[str, Tensor]] | None] | None = None


def derives_from(model: nn.Module, package: str | None, *names: str) -> bool:
    """Whether a model's class, or one it derives from, has one of the names, and is of the package if one is given.

    Told by names, because importing the library to ask would load it.
    """
    return any(
        cls.__name__ in names and package in (None, cls.__module__.partition(".")[0]) for cls in type(model).__mro__
    )


def named(path: str, modules: nn.Module) -> list[tuple[str, nn.Module]]:
    """The children of a list of modules, under their full names."""
    return [(f"{path}.{name}", module) for name, module in modules.named_children()]
