"""What tells one state of the native library's sources from another. ``setup.py`` runs this file by itself."""

from __future__ import annotations

import hashlib
from pathlib import Path


def digest(csrc: Path) -> str:
    """One digest of all that is compiled, names and contents.

    Args:
        csrc: the folder.
    """
    files = sorted(path.relative_to(csrc).as_posix() for path in csrc.rglob("*") if path.suffix in (".cpp", ".h"))
    contents = {name: hashlib.sha256((csrc / name).read_bytes()).hexdigest() for name in files}
    return hashlib.sha256(repr(contents).encode()).hexdigest()
