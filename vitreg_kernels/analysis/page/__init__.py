"""Findings as one HTML file that needs nothing else, and as figures for a notebook.

Not here: measuring anything. What the page says stands in ``findings``; here it is only drawn.
"""

from __future__ import annotations

from .page import write_page

__all__ = ["write_page"]
