"""What every stage of a GPU run is."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, TypedDict

import torch

from benchmarks import results
from benchmarks.machine import Machine
from benchmarks.results import Row, Writer

# In the order in which they run: what decides whether the rest is worth anything, then what is raced, then what
# torch.compile takes most of.
NAMES = (
    "environment",
    "smoke",
    "accuracy",
    "race",
    "outputs",
    "norms",
    "models",
    "compiled",
    "flex",
    "tune",
)
DEFAULT = NAMES[:-1]

Rehearsal = Callable[[], object]


class StageRow(TypedDict):
    """One stage in one run of the command, as it begins and as it ends: of those of a stage the last one counts."""

    kind: Literal["stage"]
    stage: str
    seconds: float | None  # None as it begins
    unfinished: int | None  # pieces of work still to be done; None if it could not tell, and as it begins
    error: str | None  # what stopped it, other than its time
    machine: Machine


results.ROW_TYPES["stage"] = StageRow


def _unwatched(piece: str | None) -> None:
    pass


class Setup(NamedTuple):
    """Where and how a stage runs.

    Attributes:
        device: a GPU, or in a dry run a CPU.
        dry: a rehearsal without a GPU: every step, on shapes so small that its times mean nothing.
        deadline: ``time.monotonic()`` after which no new piece of work is begun.
        mark: told the name of each piece of work as it begins, and ``None`` as it ends.
        cache: kernels that were compiled elsewhere, of `python -m benchmarks.gpu.pack`.
    """

    device: torch.device
    dry: bool
    deadline: float = math.inf
    mark: Callable[[str | None], None] = _unwatched
    cache: Path | None = None

    @property
    def expired(self) -> bool:
        """Whether the stage's time is up. What it has not done, the next run of the same command does."""
        return time.monotonic() >= self.deadline


class Stage(Protocol):
    """One stage, a module. The first line of its docstring is what the command says that it does."""

    NAME: str
    SECONDS: float  # its share of a default run, with what the stages before it have left of theirs
    LONGEST: float  # seconds after which a piece of its work, in a default run, counts as hung

    def run(self, setup: Setup, writer: Writer) -> Iterator[Row]:
        """Does what ``writer`` has no rows of yet, prints a line for each piece of work, and yields rows once written.

        The environment's rows are there before any other stage runs.
        """

    def rehearsals(self, setup: Setup) -> Iterable[Rehearsal]:
        """Calls that launch every kernel of ours that the stage launches, the most important first."""

    def failures(self, rows: list[Row]) -> list[str]:
        """One sentence for each row of this stage that must make the command fail; the others' rows are there too."""

    def unfinished(self, setup: Setup, writer: Writer) -> int:
        """How many pieces of work ``writer`` has no rows of."""


class Loaded(NamedTuple):
    """The stages by name, and why the others cannot be imported."""

    stages: dict[str, Stage]
    broken: dict[str, str]


def load() -> Loaded:
    """Imports every stage; only then is every row of a GPU run's file known to ``results``."""
    loaded = Loaded({}, {})
    for name in NAMES:
        try:
            loaded.stages[name] = importlib.import_module(f"benchmarks.gpu.{name}")
        except Exception as error:  # a stage is on its own, from its import on
            loaded.broken[name] = f"{name} cannot be loaded: {sentence(error)}"
    return loaded


def sentence(error: Exception) -> str:
    """An exception in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
