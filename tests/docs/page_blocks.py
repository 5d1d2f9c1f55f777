"""The fenced blocks of Markdown pages: found, run, and held against the output that the page shows.

What a page's author must know:

- Blocks of ``python`` run in order, all of a page in one namespace. One whose title begins with "Needs", as in
  ``title="Needs a GPU"``, is shown with that title to the reader and only compiled here.
- A block without a language, or of ``text``, that follows a block of ``python`` is its output. A line ``...`` in it
  stands for any lines. Whole numbers and words must be equal. Numbers with a point may differ by 2%, since processors
  round differently, and those below 1e-4 are rounding errors, of which only that is asked. Dates are not compared, nor
  the names of instruction sets.
- Between two lines ``--8<--`` stand files of the repository that are put there: ``path``, or ``path:first:last`` for
  some lines of it. (ruff takes the form that puts both on one line for Python, and reformats it.)

``python tests/docs/page_blocks.py --write PAGE...`` puts what the blocks print into the pages, where that differs.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

_FENCE = re.compile(r"(?P<indent> *)(?P<ticks>`{3,})(?P<info>.*)")
_TITLE = re.compile(r'title="([^"]*)"')
_SNIPPET = re.compile(r"(?P<path>[^:]+)(?::(?P<first>\d+):(?P<last>\d+))?")
_DATE = re.compile(r"\d{4}-\d\d-\d\d")
_NUMBER = re.compile(r"\d+\.?\d*(?:e[+-]?\d+)?")
_INSTRUCTIONS = re.compile(r"\bcpu_[a-z0-9]+")  # of the processor, as ``explain`` calls them
_TOLERANCE, _ROUNDING = 0.02, 1e-4


@dataclass
class Block:
    """One fenced block.

    Attributes:
        language: ``"python"``, ``"bash"``, ``"text"``; empty where none is given.
        title: as the page shows it; empty where there is none.
        lines: what stands in it, without the indentation of the block.
        start, end: places of the opening and closing fence among the page's lines, from 0.
        output: the block right behind it that shows what it prints.
    """

    language: str
    title: str
    lines: list[str]
    start: int
    end: int
    output: Block | None = None

    @property
    def runs(self) -> bool:
        """Whether it can run here."""
        return not self.title.startswith("Needs")

    @property
    def code(self) -> str:
        """What it stands for, as far down as in the page, so that a traceback names the page's lines."""
        lines, within = [], False
        for line in self.lines:
            if line.strip() == "--8<--":
                within = not within
            else:
                lines += _included(line.strip()) if within else [line]
        return "\n" * (self.start + 1) + "\n".join(lines) + "\n"


def blocks_of(text: str) -> list[Block]:
    """All blocks of a page, in order; those that are the output of another also stand in its ``output``.

    Raises:
        ValueError: if a fence is not closed.
    """
    lines, found, place = text.split("\n"), [], 0
    while place < len(lines):
        opening = _FENCE.fullmatch(lines[place])
        if opening is None:
            place += 1
            continue
        closing = opening["indent"] + opening["ticks"]
        end = next((i for i in range(place + 1, len(lines)) if lines[i].rstrip() == closing), None)
        if end is None:
            raise ValueError(f"the fence of line {place + 1} is not closed")
        language, _, rest = opening["info"].strip().partition(" ")
        title = _TITLE.search(rest)
        inside = [line.removeprefix(opening["indent"]) for line in lines[place + 1 : end]]
        block = Block(language, title[1] if title else "", inside, place, end)
        if found and language in ("", "text") and not "".join(lines[found[-1].end + 1 : place]).strip():
            found[-1].output = block
        found.append(block)
        place = end + 1
    return found


def run(text: str, name: str) -> Iterator[tuple[Block, str]]:
    """Run the ``python`` blocks of a page; gives each with what it prints, as it is done.

    Args:
        text: of the page.
        name: of the page, for tracebacks.
    """
    namespace: dict[str, Any] = {"__name__": "__page__"}
    for block in blocks_of(text):
        if block.language != "python":
            continue
        compiled = compile(block.code, name, "exec")
        if block.runs:
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compiled, namespace)
            yield block, printed.getvalue()


def difference(shown: list[str], printed: list[str]) -> str:
    """The first thing in which an output is not what a page shows; empty if there is none."""
    shown, printed = ([line.split() for line in lines if line.strip()] for lines in (shown, printed))
    place = 0
    runs: list[list[list[str]]] = [[]]
    for line in shown:
        if line == ["..."]:
            runs.append([])
        else:
            runs[-1].append(line)
    for number, lines in enumerate(runs):
        last = number == len(runs) - 1
        starts = range(place, len(printed) - len(lines) + 1)
        if number == 0:
            starts = starts[:1]
        elif last and lines:
            starts = starts[-1:]
        at = next((i for i in starts if all(map(_alike, lines, printed[i:]))), None)
        if at is None:
            return f"the page shows\n{_text(lines)}\nand this is printed\n{_text(printed[place:])}"
        place = at + len(lines)
    if (runs[-1] or len(runs) == 1) and place < len(printed):
        return f"behind what the page shows, this is printed\n{_text(printed[place:])}"
    return ""


def _alike(shown: list[str], printed: list[str]) -> bool:
    """Whether two lines say the same, by their words."""
    one, other = (_INSTRUCTIONS.sub("cpu_*", _DATE.sub("date", " ".join(words))) for words in (shown, printed))
    if _NUMBER.sub("#", one) != _NUMBER.sub("#", other):
        return False
    return all(map(_same_number, _NUMBER.findall(one), _NUMBER.findall(other)))


def _same_number(shown: str, printed: str) -> bool:
    if shown == printed:
        return True
    if not any(mark in x for mark in ".e" for x in (shown, printed)):
        return False
    one, other = float(shown), float(printed)
    return max(one, other) < _ROUNDING or abs(one - other) <= _TOLERANCE * max(one, other)


def _included(what: str) -> list[str]:
    """The lines of a file of the repository that a page puts in.

    Raises:
        ValueError: if it names lines that are not a whole definition: somebody has moved them.
    """
    snippet = _SNIPPET.fullmatch(what)
    lines = (ROOT / snippet["path"]).read_text().splitlines()
    if snippet["first"] is None:
        return lines
    first, last = int(snippet["first"]), int(snippet["last"])
    if not lines[first - 1].startswith(("class ", "def ", "@")) or not lines[last - 1].strip() or any(lines[last:][:2]):
        raise ValueError(f"{what} is no longer a whole class or function")
    return lines[first - 1 : last]


def _text(lines: list[list[str]]) -> str:
    return "\n".join(" ".join(line) for line in lines)


def _write(path: Path) -> None:
    """Put what the blocks of a page print into it, where that is not what it shows."""
    text = path.read_text()
    lines, new = text.split("\n"), []
    for block, printed in run(text, str(path)):
        if block.output is not None and difference(block.output.lines, printed.splitlines()):
            new.append((block.output, printed.rstrip().splitlines()))
        elif block.output is None and printed:
            print(f"{path}:{block.start + 1} prints what the page does not show:\n{printed}")
    for output, printed_lines in reversed(new):
        indent = lines[output.start][: -len(lines[output.start].lstrip())] if lines[output.start][:1] == " " else ""
        lines[output.start + 1 : output.end] = [indent + line for line in printed_lines]
    path.write_text("\n".join(lines))


if __name__ == "__main__":
    if sys.argv[1:2] != ["--write"]:
        raise SystemExit(__doc__)
    for page in sys.argv[2:]:
        _write(Path(page))
