"""Parts of a page that a script writes, each between two comments that name it; all else is written by hand."""

from __future__ import annotations

import re
from collections.abc import Mapping

_PART = re.compile(
    r"(?P<begin><!-- (?P<name>[^\n]+?): begin, written by python -m tools\.docs -->\n)"
    r".*?(?P<end><!-- (?P=name): end -->)",
    re.DOTALL,
)


def names(page: str) -> list[str]:
    """The names of a page's written parts, in order."""
    return [match["name"] for match in _PART.finditer(page)]


def written(page: str, blocks: Mapping[str, str]) -> str:
    """The page with its parts written anew.

    Args:
        page: Markdown with ``<!-- NAME: begin, written by python -m tools.docs -->`` and ``<!-- NAME: end -->``.
        blocks: the Markdown of each part, by name.

    Raises:
        ValueError: if the page has other parts than these, or one of them twice.
    """
    if sorted(names(page)) != sorted(blocks):
        raise ValueError(f"the page has the parts {sorted(names(page))}, and there is text for {sorted(blocks)}")
    return _PART.sub(lambda part: f"{part['begin']}\n{blocks[part['name']].strip()}\n\n{part['end']}", page)
