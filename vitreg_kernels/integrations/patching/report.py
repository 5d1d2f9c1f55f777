"""What ``patch`` did with every module of a model that attends, and with its blocks."""

from __future__ import annotations

from typing import NamedTuple


class Patched(NamedTuple):
    """One module of a model that attends, or a block of it.

    Attributes:
        name: its path in the model.
        cls: the name of its class.
        backend: the backend that a call takes here, with the size of that call; empty of a module that is left alone,
            and of one whose weights are on no device yet.
        reason: why it is left alone; empty if it is patched.
    """

    name: str
    cls: str
    backend: str = ""
    reason: str = ""


class PatchReport(NamedTuple):
    """Which modules of a model attend by this library now, and which do not.

    Printing it gives a line a kind of layer.

    Attributes:
        modules: every module that attends, and of ``level="block"`` every block, in the model's order.
        num_prefix_tokens: the CLS and register tokens that lead the model's sequence; ``None`` if that is not known,
            or not the same in all its parts.
    """

    modules: list[Patched]
    num_prefix_tokens: int | None

    @property
    def patched(self) -> list[Patched]:
        """Those that attend by this library."""
        return [module for module in self.modules if not module.reason]

    @property
    def left(self) -> list[Patched]:
        """Those left as they were."""
        return [module for module in self.modules if module.reason]

    def __str__(self) -> str:
        kinds: dict[tuple[str, ...], list[str]] = {}
        for module in self.modules:
            kinds.setdefault(module[1:], []).append(module.name)
        lines = []
        for (cls, backend, reason), names in kinds.items():
            where = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
            what = f"left alone: {reason}" if reason else f"patched{backend and ', ' + backend}"
            lines.append(f"{len(names):3d} x {cls} ({where or 'the model'}): {what}")
        prefix = "not known" if self.num_prefix_tokens is None else self.num_prefix_tokens
        return "\n".join([*lines, f"prefix tokens (CLS and registers): {prefix}"])
