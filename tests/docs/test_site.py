"""The documentation against the code: each public name once among the API pages, and parts of pages that scripts write.

That the site itself builds is ``make docs``, which is strict.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import sys
from collections import Counter
from pathlib import Path
from types import FunctionType, ModuleType

import pytest

import vitreg_kernels
from tools.docs import benchmarks, blocks, command_line, pages
from tools.docs.loads import loads
from vitreg_kernels import analysis, functional, monitor

API = pages.DOCS / "api"
PACKAGE = Path(vitreg_kernels.__file__).parent
ROOMS = sorted(PACKAGE.rglob("__init__.py"))
# Parts of a run, which nobody calls by themselves, and a rule's arithmetic.
WITHIN_ANALYSIS = {"mixture", "page", "page.colours", "page.maps", "page.page", "page.svg", "study", "survey"}


def shown() -> list[object]:
    """What the API pages have, in order: objects, and of a module its public classes and functions."""
    found: list[object] = []
    for page in sorted(API.rglob("*.md")):
        for block in re.split(r"^::: ", page.read_text(), flags=re.M)[1:]:
            what = resolved(block.split()[0])
            if not isinstance(what, ModuleType):
                found.append(what)
            elif "members: false" not in block:
                found += [what, *public(what)]
    return found


def resolved(name: str) -> object:
    """The object of a dotted name."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition(".")
        return getattr(importlib.import_module(module), attribute)


def public(module: ModuleType) -> list[object]:
    """The classes and functions that a module itself defines."""
    return [
        value
        for name, value in vars(module).items()
        if not name.startswith("_") and isinstance(value, (type, FunctionType)) and value.__module__ == module.__name__
    ]


def expected() -> dict[str, object]:
    """What a user may import, by name."""
    names = {
        f"{module.__name__}.{name}": getattr(module, name)
        for module in (vitreg_kernels, functional, monitor)
        for name in module.__all__
        if name not in ("__version__", "functional")
    }
    for found in pkgutil.walk_packages(analysis.__path__, f"{analysis.__name__}."):
        if found.name.removeprefix(f"{analysis.__name__}.") not in WITHIN_ANALYSIS:
            names |= {f"{found.name}.{one.__name__}": one for one in public(importlib.import_module(found.name))}
    return names


def test_every_public_name_is_on_one_api_page_once():
    times = Counter(map(id, shown()))
    assert {name: times[id(one)] for name, one in expected().items() if times[id(one)] != 1} == {}


def test_nothing_is_on_two_api_pages():
    assert [one for one in shown() if Counter(map(id, shown()))[id(one)] > 1] == []


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: path.parent.relative_to(PACKAGE).as_posix())
def test_every_room_says_what_it_is_and_what_it_is_not(path):
    said = ast.get_docstring(ast.parse(path.read_text()))
    assert said
    assert "Not here" in said


def test_the_benchmark_page_says_what_the_result_files_say():
    """After a results file is committed: python -m tools.docs."""
    page = (pages.DOCS / "benchmarks.md").read_text()
    assert blocks.written(page, benchmarks.blocks()) == page


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="argparse of Python 3.13 writes options otherwise")
def test_the_command_line_page_says_what_the_commands_say():
    """After a change to a command: python -m tools.docs."""
    page = (pages.DOCS / "command_line.md").read_text()
    assert blocks.written(page, command_line.blocks()) == page


def test_the_page_of_backends_says_what_they_declare():
    page = (API / "dispatch.md").read_text()
    assert blocks.written(page, command_line.support_tables()) == page


def test_every_command_has_its_help_on_the_page():
    assert set(blocks.names((pages.DOCS / "command_line.md").read_text())) == set(command_line.blocks())


def test_a_page_with_other_parts_than_there_is_text_for_is_refused():
    page = "a\n<!-- b: begin, written by python -m tools.docs -->\nold\n<!-- b: end -->\nc"
    assert blocks.written(page, {"b": "new"}) == page.replace("old", "\nnew\n")
    for parts in ({}, {"b": "", "d": ""}):
        with pytest.raises(ValueError, match="has the parts"):
            blocks.written(page, parts)


def test_files_of_the_repository_that_a_page_links_to_come_with_the_site():
    pytest.importorskip("mkdocs", reason="the documentation is built where the extra `docs` is installed")
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.plugins import PluginCollection
    from mkdocs.structure.files import File, Files
    from mkdocs.structure.pages import Page

    from tools.docs import links

    config = MkDocsConfig()
    config.load_dict({"site_name": "x", "docs_dir": str(pages.DOCS), "site_dir": "site", "use_directory_urls": False})
    config.plugins = PluginCollection()
    config.plugins._current_plugin = None
    page = Page(None, File.generated(config, "guide/a.md", content=""), config)
    files = Files([])
    text = (
        "[a](../../examples/train.py) ![b](../analyze.png) [c](../../setup.py#L3) [d](../../nothing) [e](https://f.g)"
    )
    assert links.on_page_markdown(text, page=page, config=config, files=files) == (
        "[a](../files/examples/train.py.txt) ![b](../analyze.png) [c](../files/setup.py.txt#L3) [d](../../nothing) "
        "[e](https://f.g)"
    )
    assert [file.src_uri for file in files] == ["files/examples/train.py.txt", "files/setup.py.txt"]


def test_a_text_of_several_names_is_told_of_each():
    pytest.importorskip("griffe", reason="the documentation is built where the extra `docs` is installed")
    from tools.docs.docstrings import split

    assert split("A.\n\nArgs:\n    a, b: one\n        more\n    c: two\n\nRaises:\n    D, E: three") == (
        "A.\n\nArgs:\n    a: one\n        more\n    b: one\n        more\n    c: two\n\nRaises:\n    D, E: three"
    )
    assert split("A.\n\nAttributes:\n    a, b: one") == "A.\n\nAttributes:\n    a: one\n    b: one"
    assert split("    a, b: of no section") == "    a, b: of no section"


@pytest.mark.parametrize(
    ("suffix", "text", "found"),
    [
        (".html", '<a href="https://a.b">x</a><link rel="canonical" href="https://a.b"><img src="x.png">', 0),
        (".html", '<script src="https://a.b/c.js"></script>', 1),
        (".html", '<script src="//a.b/c.js"></script>', 1),
        (".html", '<link rel="stylesheet" href="https://a.b/c.css"><link rel="preconnect" href="https://a.b">', 2),
        (".html", "<style>@import 'https://a.b/c.css'; a { background: url(https://a.b/c.png) }</style>", 2),
        (".html", '<p style="background: url(https://a.b/c.png)">https://a.b</p>', 1),
        (".css", "@font-face { src: url('https://a.b/c.woff') }", 1),
        (".js", 'fetch("https://a.b/c")', 1),
        (".js", 'if (x == "https://a.b") {}', 0),
    ],
)
def test_what_a_page_would_load_is_found(suffix, text, found):
    assert len(loads(text, suffix)) == found
