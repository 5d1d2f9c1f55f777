"""A figure as SVG inside the page: its text is the page's text, and turns light on dark paper."""

from __future__ import annotations

import io
import re
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from .colours import GRID, INK

_NAMESPACE = re.compile(r"\{[^}]*\}")
_REFERENCE = re.compile(r"url\(#")
_FONT = re.compile(r"'DejaVu Sans'[^;]*")


def inline(figure: Figure, name: str, alt: str) -> Markup:
    """The figure as an ``<svg>`` element.

    Args:
        figure: of ``figures``.
        name: unique on the page, a word; figures number their parts alike, and a page may have each number once.
        alt: what it shows, in words, for a reader who does not see it.
    """
    file = io.StringIO()
    # Text stays text, and the numbers of the parts are the same on every run.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(
            file, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    root = ElementTree.fromstring(file.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            # A style inside an SVG holds for the whole page.
            if _NAMESPACE.sub("", child.tag) in ("style", "metadata"):
                parent.remove(child)
    for element in root.iter():
        element.tag = _NAMESPACE.sub("", element.tag)
        element.attrib = {_NAMESPACE.sub("", key): _own(key, x, name) for key, x in element.attrib.items()}
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": alt}
    return Markup(ElementTree.tostring(root, encoding="unicode", short_empty_elements=False))


def _own(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key.endswith("href"):
        return value.replace("#", f"#{name}-", 1)
    value = _REFERENCE.sub(f"url(#{name}-", value)
    value = value.replace(INK, "currentColor").replace(GRID, "var(--line)")
    return _FONT.sub("inherit", value)
