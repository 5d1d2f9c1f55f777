"""``python -m tools.docs``: write the parts of pages that come from the code and from result files."""

from __future__ import annotations

from tools.docs import pages
from tools.docs.blocks import written

if __name__ == "__main__":
    for path, blocks in pages.WRITTEN.items():
        path.write_text(written(path.read_text(), blocks()))
        print(path)
