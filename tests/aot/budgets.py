"""What the compiled kernels of an op may use, in a checked-in file, and how it is held against what they do use."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: it exists for Linux x86-64 only")

from vitreg_kernels._triton.launch import Launch
from vitreg_kernels._triton.offline import Resources

ARCHITECTURES = (80, 90, 100)

# Shared memory a block can opt in to: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
MAX_SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
MAX_TENSOR_MEMORY_COLUMNS = 512

Row = dict[str, int]


@dataclass(frozen=True)
class Budgets:
    """The budgets of one op.

    Attributes:
        name: of the file beside this one, which holds rows ``{"sm_80": {"C=384": {"_a_kernel": {"registers": 64}}}}``.
        symbol: what a size is called there.
        sizes: that are compiled, on every architecture.
        kernels: by name, what an architecture and a size launch.
    """

    name: str
    symbol: str
    sizes: tuple[int, ...]
    kernels: Callable[[int, int], dict[str, tuple[Launch, Resources]]]

    @property
    def every_case(self) -> pytest.MarkDecorator:
        """A test of an architecture ``arch`` and a ``size``, for all there are."""
        return pytest.mark.parametrize(
            ("arch", "size"), [(arch, size) for arch in ARCHITECTURES for size in self.sizes]
        )

    @property
    def path(self) -> Path:
        return Path(__file__).with_name(self.name)

    def read(self) -> dict[str, dict[str, dict[str, Row]]]:
        return json.loads(self.path.read_text())

    def check(self, arch: int, size: int) -> None:
        """Fails the test where a kernel does not keep to its budget."""
        broken = violations(self._measured(arch, size), self.read()[f"sm_{arch}"][f"{self.symbol}={size}"])
        assert not broken, f"sm_{arch}, {self.symbol}={size}: " + "; ".join(broken)

    def check_sizes(self) -> None:
        """Fails the test where the file holds anything but what is compiled."""
        assert {arch: list(rows) for arch, rows in self.read().items()} == {
            f"sm_{arch}": [f"{self.symbol}={size}" for size in self.sizes] for arch in ARCHITECTURES
        }

    def check_no_spill(self) -> None:
        """Fails the test where the file grants a spill."""
        rows = [row for of_arch in self.read().values() for names in of_arch.values() for row in names.values()]
        assert not any(row["spill_bytes"] for row in rows)

    def write(self) -> None:
        """Registers get a headroom of up to 7, as a patch release of ptxas moves them by a few; nothing else does."""
        budgets = {
            f"sm_{arch}": {
                f"{self.symbol}={size}": {
                    name: {**used, "registers": min(255, -(-used["registers"] // 8) * 8), "spill_bytes": 0}
                    for name, used in self._measured(arch, size).items()
                }
                for size in self.sizes
            }
            for arch in ARCHITECTURES
        }
        self.path.write_text(json.dumps(budgets, indent=2) + "\n")

    def _measured(self, arch: int, size: int) -> dict[str, Row]:
        return {
            name: {"registers": used.registers, "spill_bytes": used.spill_bytes, "shared_bytes": used.shared_bytes}
            for name, (_, used) in self.kernels(arch, size).items()
        }


def violations(used: dict[str, Row], budget: dict[str, Row]) -> list[str]:
    """What one architecture and size does not keep to, as sentences."""
    broken = [f"{name}: no budget row" for name in used.keys() - budget.keys()]
    broken += [f"{name}: stale budget row, nothing launches it" for name in budget.keys() - used.keys()]
    for name in used.keys() & budget.keys():
        broken += [
            f"{name}: {count} {what}, budget {budget[name][what]}"
            for what, count in used[name].items()
            if count > budget[name][what]
        ]
    return sorted(broken)


def beyond_hardware(launch: Launch, used: Resources, arch: int) -> list[str]:
    """What a kernel needs more of than a multiprocessor has, as sentences."""
    name, shared, columns = launch.kernel.__name__, used.shared_bytes, used.tensor_memory_columns
    broken = []
    if shared > MAX_SHARED_BYTES[arch]:
        broken.append(f"{name} on sm_{arch}: {shared} bytes of shared memory, limit {MAX_SHARED_BYTES[arch]}")
    if columns > MAX_TENSOR_MEMORY_COLUMNS:
        broken.append(f"{name} on sm_{arch}: {columns} columns of tensor memory, limit {MAX_TENSOR_MEMORY_COLUMNS}")
    return broken
