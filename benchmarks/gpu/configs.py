"""The measured tables that ship with the library, a file an architecture, as ``_runtime/tuning.py`` reads them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def merge(folder: Path, arch: int, entries: dict[str, Any]) -> Path:
    """Puts ``entries``, nested as in such a file, into that of an architecture; all others stay. Returns the file.

    Args:
        folder: of the files; made if missing.
        arch: compute capability times ten.
        entries: for example ``{"fastest": {"16-bit,64,272": "triton"}}``.
    """
    path = folder / f"sm{arch}.json"
    table = json.loads(path.read_text()) if path.exists() else {}
    folder.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")  # a cut leaves either the old file or the new one
    beside.write_text(json.dumps(_merged(table, entries), indent=1, sort_keys=True) + "\n")
    os.replace(beside, path)
    return path


def _merged(old: Any, new: Any) -> Any:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    return old | {name: _merged(old.get(name), value) for name, value in new.items()}
