"""``vitreg support``: the classes of other libraries that ``patch`` knows."""

from __future__ import annotations

import textwrap

from ..integrations.libraries import LIBRARIES

_WIDTH = 118
_NOT_HERE = (
    "Left alone everywhere, and reported: windows and decomposed biases (SAM, Swin, Hiera), differential attention, "
    "attention inlined in a block, cross-attention and pools, causal text."
)


def support() -> str:
    """By library: classes, what the op takes over of them, and what it does not, and why."""
    lines = []
    for library in LIBRARIES:
        lines.append(library.name)
        classes: dict[tuple[str, str], list[str]] = {}
        for kind in (*library.attention, *library.blocks):
            if kind.serves:
                classes.setdefault((kind.serves, kind.leaves), []).extend(kind.classes)
        for (serves, leaves), names in classes.items():
            for text, indent in ((", ".join(names), 2), (f"served: {serves}", 6), (f"left: {leaves}", 6)):
                lines += textwrap.wrap(text, _WIDTH, initial_indent=" " * indent, subsequent_indent=" " * (indent + 2))
    return "\n".join([*lines, "", *textwrap.wrap(_NOT_HERE, _WIDTH)])
