"""An extension of griffe, which reads docstrings for the pages of the API.

``a, b: text`` in a docstring tells two parameters, or attributes, by one text. On a page each has an entry, with a type
and a default of its own.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_SECTIONS = ("Args:", "Attributes:")
_SEVERAL = re.compile(r"    (?P<names>\w+(?:, \w+)+)(?P<text>: .*)")


def split(docstring: str) -> str:
    """A docstring with an entry for each name."""
    told: list[str] = []
    names: list[str] = []  # of the entry that is being read
    entry: list[str] = []
    within = False
    for line in [*docstring.splitlines(), ""]:
        if names and not line.startswith("     "):
            told += [part for name in names for part in (f"    {name}{entry[0]}", *entry[1:])]
            names = []
        if names:
            entry.append(line)
        elif within and (several := _SEVERAL.fullmatch(line)):
            names, entry = several["names"].split(", "), [several["text"]]
        else:
            told.append(line)
        within = line in _SECTIONS or (within and (names != [] or line.startswith("    ")))
    return "\n".join(told[:-1])


class OneEntryEach(griffe.Extension):
    """Splits what ``a, b: text`` tells of several names."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called with every module, class, function and attribute that was read."""
        if obj.docstring is not None:
            obj.docstring.value = split(obj.docstring.value)
