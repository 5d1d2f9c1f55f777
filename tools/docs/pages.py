"""Which pages have parts that are written, and by what."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tools.docs import benchmarks, command_line

DOCS = Path(__file__).parents[2] / "docs"

WRITTEN: dict[Path, Callable[[], dict[str, str]]] = {
    DOCS / "benchmarks.md": benchmarks.blocks,
    DOCS / "command_line.md": command_line.blocks,
    DOCS / "api" / "dispatch.md": command_line.support_tables,
}
