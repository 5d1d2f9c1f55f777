"""Control flow of a kernel's machine code: which basic blocks a program runs, and in which loops they stand.

Machine code says how many instructions a loop has, not how often it runs, and a kernel may hold code for several kinds
of program (the program of the prefix tile, those of the patch tiles). So a kernel becomes a few `Path`s whose blocks
know their loops; `predict.py` finds by the work that a program has to do which path it takes and how often each loop
runs.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

_LINE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([\w.]+)\s*(.*?)\s*;", re.MULTILINE)
_LABEL = re.compile(r"^\.(L_x_\d+):", re.MULTILINE)
_TARGET = re.compile(r"`\(\.(L_x_\d+)\)")
MATRIX = ("HMMA", "HGMMA", "UTCHMMA")
_ENDS = ("BRA", "EXIT", "RET")
# ptxas leaves some loops by a conditional call that never returns; unconditional calls are to slow paths of divisions.
_JUMPS = ("BRA", "CALL")


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
        opcode: with its modifiers: ``HGMMA.64x64x16.F32.BF16``.
        guarded: it is predicated, and may not run.
        operands: as printed.
    """

    opcode: str
    guarded: bool
    operands: str

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]


class Loop(NamedTuple):
    """A natural loop.

    Attributes:
        header: the block it is entered by.
        blocks: all its blocks, those of inner loops included.
    """

    header: int
    blocks: frozenset[int]


class Step(NamedTuple):
    """One basic block of a path.

    Attributes:
        instructions: what it runs.
        loops: headers of the loops around it, outermost first.
    """

    instructions: list[Instruction]
    loops: tuple[int, ...]


Path = list[Step]


class _Way(NamedTuple):
    """A path as a linked list, from some block on.

    Attributes:
        exps: exponentials by the loops around them: every score has one. (Products may stand behind branches.)
        length: instructions.
        step, rest: the first block and what follows it; ``None`` at the end.
    """

    exps: frozenset[tuple[tuple[int, ...], int]]
    length: int
    step: Step | None
    rest: _Way | None

    def steps(self) -> Iterator[Step]:
        way: _Way | None = self
        while way is not None:
            if way.step is not None:
                yield way.step
            way = way.rest


_END = _Way(frozenset(), 0, None, None)


class Code:
    """The basic blocks of one kernel and the loops among them.

    Args:
        text: what nvdisasm prints of a cubin with a single kernel.
    """

    def __init__(self, text: str) -> None:
        self._known: dict[tuple[int, int | None], list[_Way]] = {}
        self.blocks: list[list[Instruction]] = []
        self.successors: list[list[int]] = []
        labels, jumps = self._cut(text)
        for block, (target, falls_through) in enumerate(jumps):
            following = [block + 1] if falls_through and block + 1 < len(self.blocks) else []
            self.successors.append(following + ([labels[target]] if target else []))

    def _cut(self, text: str) -> tuple[dict[str, int], list[tuple[str | None, bool]]]:
        """Fills ``blocks``. Gives the block of each label, and each block's target and whether it falls through."""
        labels: dict[str, int] = {}
        jumps: list[tuple[str | None, bool]] = []
        instructions: list[Instruction] = []

        def end(target: str | None, falls_through: bool) -> None:
            nonlocal instructions
            self.blocks.append(instructions)
            jumps.append((target, falls_through))
            instructions = []

        for line in text.splitlines():
            if label := _LABEL.match(line):
                if instructions:
                    end(None, True)
                labels[label[1]] = len(self.blocks)
            elif found := _LINE.match(line):
                guard, opcode, operands = found.groups()
                instructions.append(Instruction(opcode, guard is not None, operands))
                if instructions[-1].name in _ENDS or (instructions[-1].name == "CALL" and guard):
                    target = _TARGET.search(operands) if instructions[-1].name in _JUMPS else None
                    conditional = guard is not None or operands.startswith(("P", "!P", "UP", "!UP"))
                    end(target and target[1], conditional)
        if instructions:
            end(None, False)
        return labels, jumps

    def paths(self) -> list[Path]:
        """Ways through the kernel that differ in what they compute, each loop taken as one.

        Which of them its programs take, their work must tell. Of ways that compute the same, such as those around a
        slow path or a wait, the one with the most instructions stands for all.
        """
        return [list(way.steps()) for way in self._ways(0, None, ())]

    def _ways(self, block: int, within: Loop | None, around: tuple[int, ...]) -> list[_Way]:
        """Ways from a block to the kernel's end, or to the end of the body of the loop ``within``."""
        key = block, within and within.header
        if key not in self._known:
            loop = self.loops.get(block)
            if loop is not None and (within is None or loop.header != within.header):
                begun = [list(way.steps()) for way in self._ways(block, loop, (*around, block))]
                following = {s for b in loop.blocks for s in self.successors[b]} - loop.blocks
            else:
                begun = [[Step(self.blocks[block], around)]]
                following = set(self.successors[block])
            if within is not None:
                following &= within.blocks - {within.header}
            rests = [way for side in following for way in self._ways(side, within, around)] or [_END]
            different: dict[frozenset, _Way] = {}
            for steps, way in itertools.product(begun, rests):
                for step in reversed(steps):
                    way = _after(step, way)
                if way.exps not in different or way.length > different[way.exps].length:
                    different[way.exps] = way
            self._known[key] = list(different.values())
        return self._known[key]

    def _reachable(self, block: int) -> set[int]:
        seen, todo = set(), [block]
        while todo:
            block = todo.pop()
            if block not in seen:
                seen.add(block)
                todo += self.successors[block]
        return seen

    @cached_property
    def loops(self) -> dict[int, Loop]:
        """Loops by header: the targets of edges from blocks that they dominate."""
        bodies: dict[int, set[int]] = defaultdict(set)
        for latch, following in enumerate(self.successors):
            for header in following:
                if header in self._dominators.get(latch, ()):
                    bodies[header] |= self._body(header, latch)
        return {header: Loop(header, frozenset(blocks)) for header, blocks in bodies.items()}

    def _body(self, header: int, latch: int) -> set[int]:
        body, todo = {header}, [latch]
        while todo:
            block = todo.pop()
            if block not in body:
                body.add(block)
                todo += self._predecessors[block]
        return body

    @cached_property
    def _predecessors(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = defaultdict(list)
        for block in self._reachable(0):
            for successor in self.successors[block]:
                found[successor].append(block)
        return found

    @cached_property
    def _dominators(self) -> dict[int, set[int]]:
        """Of each reachable block, the blocks that every way to it goes through."""
        reachable = self._reachable(0)
        found = {block: set(reachable) for block in reachable} | {0: {0}}
        changed = True
        while changed:
            changed = False
            for block in sorted(reachable - {0}):
                new = set.intersection(*(found[p] for p in self._predecessors[block])) | {block}
                changed |= new != found[block]
                found[block] = new
        return found


def _after(step: Step, way: _Way) -> _Way:
    exps = sum(instruction.opcode == "MUFU.EX2" for instruction in step.instructions)
    if exps:
        counted = Counter(dict(way.exps))
        counted[step.loops] += exps
        return _Way(frozenset(counted.items()), way.length + len(step.instructions), step, way)
    return _Way(way.exps, way.length + len(step.instructions), step, way)
