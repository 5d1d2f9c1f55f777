"""A class of modules whose computation this library can take over."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from .modules import derives_from


class Heads(NamedTuple):
    """What an attention module asks of the op, as far as it knows before it is called.

    Attributes:
        number: H.
        head_dim: D.
    """

    number: int
    head_dim: int


def heads_of(module: nn.Module) -> Heads:
    """What most attention modules ask, which have ``num_heads`` and ``head_dim``."""
    return Heads(module.num_heads, module.head_dim)


class Kind(NamedTuple):
    """One class of modules, told by name and shape: importing its library to ask would load it.

    Attributes:
        classes: names of the class.
        package: its package; ``None`` where other packages have copies.
        compute: the class's ``method`` by means of this library: ``compute(module, op, *args, **options)``, with the
            parameters of the method after the first two. ``op`` is an ``Attend``, of a block an ``AddNorm``. One that
            takes ``**options`` hands them to that method.
        heads: what a module asks of the op; ``None`` of a class that attends to nothing: a block, or what prepares
            masks for others.
        needs: attributes that every such module has.
        method: the method that is replaced.
        refuses: why a module must be left alone; empty if it need not.
        tells: what tells a module of this class where others have a class of that name.
        in_blocks: whether such modules also stand where tokens of other kinds attend, in text towers, decoders and
            pools. Then only those in the blocks of a known Vision Transformer are taken, and those that ``patch`` was
            given by themselves.
        serves: in words, what the op takes over of such a module; empty of what makes masks for others.
        leaves: in words, the calls that the class's own computation takes, and what is done before the op, and why.
    """

    classes: tuple[str, ...]
    package: str | None
    compute: Callable[..., Any]
    heads: Callable[[nn.Module], Heads] | None
    needs: tuple[str, ...] = ()
    method: str = "forward"
    refuses: Callable[[nn.Module], str] = lambda module: ""
    tells: Callable[[nn.Module], bool] = lambda module: True
    in_blocks: bool = False
    serves: str = ""
    leaves: str = ""

    def fits(self, module: nn.Module) -> bool:
        """Whether a module is of this class, or of one that derives from it."""
        return derives_from(module, self.package, *self.classes) and self.tells(module)

    def reason_against(self, module: nn.Module) -> str:
        """Why a module that fits is left alone, in a few words; empty if nothing speaks against it."""
        definer = next(cls for cls in type(module).__mro__ if self.method in vars(cls))
        if definer.__name__ not in self.classes or self.package not in (None, definer.__module__.partition(".")[0]):
            return f"{definer.__name__} has a {self.method} of its own"
        if missing := [name for name in self.needs if not hasattr(module, name)]:
            return f"has no {', '.join(missing)}, as the class known here has"
        known = list(inspect.signature(self.compute).parameters.values())[2:]
        theirs = list(inspect.signature(getattr(definer, self.method)).parameters)[1:]
        unknown = set(theirs) - {parameter.name for parameter in known}
        if unknown and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in known):
            return f"its {self.method} takes {', '.join(sorted(unknown))}, which is not known here"
        return self.refuses(module)
