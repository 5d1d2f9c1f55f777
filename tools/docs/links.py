"""A hook of MkDocs: files of the repository that a page links to are copied into the site.

Pages link to such files as a reader of the repository would, ``../benchmarks/results/FILE.json``; the site has them
under ``files/``. A link to a file that is not there is left as it is, and the strict build refuses it.
"""

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

# The target of [text](target) and of ![text](target), which leads out of the folder of the page.
_TARGET = re.compile(r"(?<=\]\()(?:\.\./)+[^)\s#]+")
_FOLDER = "files"
# What a browser shows as it is; of all else it shows the text, if the name says that it is one.
_SHOWN = {".csv", ".html", ".json", ".pdf", ".png", ".svg", ".txt"}


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with its links to files outside ``docs`` turned to their copies."""
    docs = Path(config.docs_dir).resolve()
    root = docs.parent
    folder = (docs / page.file.src_uri).parent

    def turned(match: re.Match[str]) -> str:
        path = (folder / match[0]).resolve()
        if path.is_relative_to(docs) or not path.is_relative_to(root) or not path.is_file():
            return match[0]
        copy = f"{_FOLDER}/{path.relative_to(root).as_posix()}" + ("" if path.suffix in _SHOWN else ".txt")
        if files.get_file_from_path(copy) is None:
            files.append(File.generated(config, copy, abs_src_path=str(path), inclusion=InclusionLevel.NOT_IN_NAV))
        return "../" * page.file.src_uri.count("/") + copy

    return _TARGET.sub(turned, markdown)
