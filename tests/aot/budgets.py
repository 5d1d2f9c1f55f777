"""What the compiled kernels of an op may use, in a checked-in file, and how it is held against what they do use."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed: it exists for Linux x86-64 only")

from vitreg_kernels._triton.launch import Launch  # noqa: E402
from vitreg_kernels._triton.offline import Resources  # noqa: E402

ARCHITECTURES = (80, 90, 100)

# The triton that `make` installs beside torch. Machine code differs from triton to triton, so what matters most is
# compiled by others too (`Budgets.tritons`).
MAIN_TRITON = {"3.7.1": ARCHITECTURES}

# What tests without a budget compile for: by another triton, sm_90 alone.
COMPILED_FOR = MAIN_TRITON.get(triton.__version__, (90,))

# What is compiled every time of the ops whose sizes are channels.
QUICK_CHANNELS = ((80, 384), (90, 768), (100, 384))

# Shared memory a block can opt in to: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
MAX_SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
MAX_TENSOR_MEMORY_COLUMNS = 512

Row = dict[str, int]

_RUNNING = f"triton {triton.__version__}"


@dataclass(frozen=True)
class Budgets:
    """The budgets of one op.

    Attributes:
        name: of the file beside this one, which holds rows
            ``{"triton 3.7.1": {"sm_80": {"C=384": {"_a_kernel": {"registers": 64}}}}}``.
        symbol: what a size is called there.
        sizes: that are compiled for sm_90.
        elsewhere: those of them that are compiled for every other architecture: of what can differ, the extremes.
        quick: architectures and sizes that are compiled every time; the others take `make test FULL=1`.
        kernels: by name, what an architecture and a size launch.
        tritons: architectures by the version that compiles for them.
        grants_spills: whether a row may hold a spill that is there now; else none does.
    """

    name: str
    symbol: str
    sizes: tuple[int, ...]
    elsewhere: tuple[int, ...]
    quick: tuple[tuple[int, int], ...]
    kernels: Callable[[int, int], dict[str, tuple[Launch, Resources]]]
    tritons: dict[str, tuple[int, ...]] = field(default_factory=lambda: MAIN_TRITON)
    grants_spills: bool = False

    @property
    def architectures(self) -> tuple[int, ...]:
        """Those that the running triton compiles for."""
        return self.tritons.get(triton.__version__, ())

    def sizes_on(self, arch: int) -> tuple[int, ...]:
        """Those that are compiled for an architecture."""
        return self.sizes if arch == 90 else self.elsewhere

    @property
    def cases(self) -> list[tuple[int, int]]:
        """Architectures and sizes, all that the running triton compiles."""
        return [(arch, size) for arch in self.architectures for size in self.sizes_on(arch)]

    @property
    def every_case(self) -> pytest.MarkDecorator:
        """A test of an architecture ``arch`` and a ``size``, for all there are."""
        return pytest.mark.parametrize(
            ("arch", "size"), [pytest.param(*case, marks=self.marks(*case)) for case in self.cases]
        )

    def marks(self, arch: int, size: int) -> tuple[pytest.MarkDecorator, ...]:
        """Those of a test of a case."""
        return () if (arch, size) in self.quick else (pytest.mark.slow,)

    @property
    def path(self) -> Path:
        return Path(__file__).with_name(self.name)

    def read(self) -> dict[str, dict[str, dict[str, dict[str, Row]]]]:
        return json.loads(self.path.read_text())

    def check(self, arch: int, size: int) -> None:
        """Fails the test where a kernel does not keep to its budget."""
        budget = self.read()[_RUNNING][f"sm_{arch}"][f"{self.symbol}={size}"]
        broken = violations(self._measured(arch, size), budget)
        assert not broken, f"{_RUNNING}, sm_{arch}, {self.symbol}={size}: " + "; ".join(broken)

    def check_sizes(self) -> None:
        """Fails the test where the file holds anything but what is compiled."""
        found = {name: {arch: list(rows) for arch, rows in of.items()} for name, of in self.read().items()}
        assert found == {
            f"triton {version}": {
                f"sm_{arch}": [f"{self.symbol}={size}" for size in self.sizes_on(arch)] for arch in architectures
            }
            for version, architectures in self.tritons.items()
        }

    def check_no_spill(self) -> None:
        """Fails the test where the file grants a spill."""
        rows = [
            row
            for of_triton in self.read().values()
            for of_arch in of_triton.values()
            for names in of_arch.values()
            for row in names.values()
        ]
        assert not any(row["spill_bytes"] for row in rows)

    def write(self) -> None:
        """Those of the running triton. Registers get a headroom of up to 7, as a patch release of ptxas moves them by a
        few; nothing else does.
        """
        budgets = {
            f"sm_{arch}": {
                f"{self.symbol}={size}": {
                    name: {
                        **used,
                        "registers": min(255, -(-used["registers"] // 8) * 8),
                        "spill_bytes": used["spill_bytes"] if self.grants_spills else 0,
                    }
                    for name, used in self._measured(arch, size).items()
                }
                for size in self.sizes_on(arch)
            }
            for arch in self.architectures
        }
        self.path.write_text(json.dumps(self.read() | {_RUNNING: budgets}, indent=2) + "\n")

    def _measured(self, arch: int, size: int) -> dict[str, Row]:
        return {
            name: {"registers": used.registers, "spill_bytes": used.spill_bytes, "shared_bytes": used.shared_bytes}
            for name, (_, used) in self.kernels(arch, size).items()
        }


def every_variant(variants: Iterable[tuple[int, str]]) -> pytest.MarkDecorator:
    """A test of an architecture ``arch`` and the name ``variant`` of what is compiled for it.

    The first one is compiled every time, by the main triton; the others take `make test FULL=1`.
    """
    named = [variant for variant in variants if variant[0] in COMPILED_FOR]
    quick = named[:1] if triton.__version__ in MAIN_TRITON else []
    return pytest.mark.parametrize(
        ("arch", "variant"),
        [pytest.param(*variant, marks=() if variant in quick else (pytest.mark.slow,)) for variant in named],
    )


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
