"""What the tests gave with and without patching, group by group, and which of it is a failure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

_WIDTHS = (32, 34, 34, 44)
HEADER = ("tests", "baseline", "patched", "fused calls", "left alone")


class Comparison:
    """Rows of both runs, as they come.

    Attributes:
        chosen: the group of every test.
        baseline: row of every test, as the library is.
        patched: row of every test, with every model patched.
    """

    def __init__(self) -> None:
        self.chosen: dict[str, str] = {}
        self.baseline: dict[str, dict[str, Any]] = {}
        self.patched: dict[str, dict[str, Any]] = {}

    def line(self, group: str) -> tuple[str, ...]:
        """The group's line of the table."""
        rows = [self.patched[test] for test, of in self.chosen.items() if of == group and test in self.patched]
        fused = sum((Counter(row["fused"]) for row in rows), Counter())
        left = dict.fromkeys(f"{name}: {reason}" for row in rows for name, reason in row["left"].items())
        return (
            group,
            self._outcomes(group, self.baseline),
            self._outcomes(group, self.patched),
            ", ".join(f"{cls} {count}" for cls, count in sorted(fused.items())) or "none",
            "; ".join(left) or "nothing",
        )

    def finished(self, group: str) -> bool:
        """Whether every test of the group has been run patched."""
        return all(test in self.patched for test, of in self.chosen.items() if of == group)

    def lost(self) -> Iterator[tuple[str, str]]:
        """Name of every test that passed and does not with patching, and why."""
        for test in self.chosen:
            if self.baseline.get(test, {}).get("outcome") == "passed":
                row = self.patched.get(test, {"outcome": "not run", "error": ""})
                if row["outcome"] != "passed":
                    yield test, row["error"] or row["outcome"]

    def not_fused(self) -> list[str]:
        """Classes that were patched and of which no call went through the op."""
        rows = self.patched.values()
        return sorted({cls for row in rows for cls in row["built"]} - {cls for row in rows for cls in row["fused"]})

    def faults(self) -> list[str]:
        """Why the comparison has failed, in sentences; empty if it has not."""
        faults = [f"LOST {test}: {why}" for test, why in self.lost()]
        faults += [f"{cls} was patched, and no call of it was fused" for cls in self.not_fused()]
        if not any(row["fused"] for row in self.patched.values()):
            faults.append("no call was fused")
        return faults

    def _outcomes(self, group: str, rows: Mapping[str, dict[str, Any]]) -> str:
        outcomes = Counter(
            rows[test]["outcome"] if test in rows else "not run" for test, of in self.chosen.items() if of == group
        )
        return ", ".join(f"{outcomes[o]} {o}" for o in ("passed", "failed", "skipped", "not run") if outcomes[o])


def in_columns(cells: tuple[str, ...]) -> str:
    """One line of the table."""
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, (*_WIDTHS, 0), strict=True))
