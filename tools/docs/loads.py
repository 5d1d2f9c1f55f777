"""``python -m tools.docs.loads FOLDER``: pages and style sheets of a built site that load anything from a network.

A link that a reader may follow loads nothing; a script, a style, a font, a picture or a frame does.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

_REMOTE = re.compile(r"\s*(?:https?:)?//", re.I)
_IN_STYLE = re.compile(r"""(?:url\(\s*|@import\s+)['"]?((?:https?:)?//[^'")\s]+)""", re.I)
# What a browser fetches by itself of an address in an attribute. Of <link> that hangs on what it is for.
_LOADING = {"src", "srcset", "poster", "data", "background"}
_MERE_LINKS = {"canonical", "prev", "next", "alternate", "edit"}
# Of a script, what looks like a call with an address; the scripts of the theme name a few which it never fetches here.
_FETCHES = re.compile(r"""(?:fetch|importScripts|import|open)\(\s*["'`]((?:https?:)?//[^"'`]+)""")


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._style = False

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        names = set(_LOADING)
        if tag == "link" and not set(given.get("rel", "").split()) & _MERE_LINKS:
            names.add("href")
        if tag in ("image", "use"):
            names |= {"href", "xlink:href"}
        self.found += [f"<{tag} {name}={given[name]}>" for name in names & given.keys() if _REMOTE.match(given[name])]
        self.found += _IN_STYLE.findall(given.get("style", ""))
        self._style = tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._style = False

    def handle_data(self, data: str) -> None:
        if self._style:
            self.found += _IN_STYLE.findall(data)


def loads(text: str, suffix: str) -> list[str]:
    """What a file of a site loads from a network: of a page, a style sheet or a script."""
    if suffix == ".css":
        return _IN_STYLE.findall(text)
    if suffix == ".js":
        return _FETCHES.findall(text)
    page = _Page()
    page.feed(text)
    return page.found


def loads_of(folder: Path) -> Iterator[str]:
    """The same of a whole site, a line each."""
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".html", ".css", ".js", ".svg"):
            yield from (f"{path}: {what}" for what in loads(path.read_text(), path.suffix))


if __name__ == "__main__":
    found = list(loads_of(Path(sys.argv[1])))
    print("\n".join(found) or "nothing is loaded from a network")
    sys.exit(1 if found else 0)
