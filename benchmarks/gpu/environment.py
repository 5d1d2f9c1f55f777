"""The GPU, its driver and libraries, the ceilings measured here and now, and kernels that were brought along."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
from collections.abc import Iterator
from importlib.machinery import PathFinder
from typing import Literal, TypedDict

import torch

from benchmarks import machine, results, roofline
from benchmarks.gpu import archive, pieces
from benchmarks.gpu.stage import Rehearsal, Setup
from benchmarks.machine import Machine
from benchmarks.results import Row, Writer
from vitreg_kernels.ops._shared.capability import capability

NAME = "environment"
SECONDS = 20.0
LONGEST = 30.0

# Modules that the races and models take if they are there.
PEERS = ("xformers", "flash_attn", "flash_attn_interface", "flash_attn.cute", "timm")
_KINDS = ("environment", "roofline")


class EnvironmentRow(TypedDict):
    """What the figures of a run depend on, beside ``machine``. ``None`` is what nobody here could tell."""

    kind: Literal["environment"]
    multiprocessors: int | None
    l2_bytes: int | None
    memory_bytes: int | None
    driver: str | None
    cuda: str | None  # that torch was built with
    cudnn: str | None
    power_limit_w: float | None
    sm_clock_mhz: float | None  # the highest it may take
    memory_clock_mhz: float | None
    peers: dict[str, str]  # the version of each module of PEERS that is installed
    machine: Machine


results.ROW_TYPES["environment"] = EnvironmentRow


def run(setup: Setup, writer: Writer) -> Iterator[Row]:
    """Writes one row of each kind, once a run. Without the kernels that were brought along, all are compiled here."""
    if setup.cache is not None:
        with pieces.begun(setup, writer, NAME, f"kernels of {setup.cache.name}"):
            archive.take(setup.cache, capability(setup.device), machine.sources())
    if not writer.find(kind="environment"):
        yield from writer.extend([describe(setup.device)])
    if not writer.find(kind="roofline"):
        ceilings = roofline.measure(setup.device)
        yield from writer.extend([{"kind": "roofline", **ceilings._asdict()}])
        products = ", ".join(f"{dtype} {gflops / 1e3:.3g}" for dtype, gflops in ceilings.product_gflops.items())
        print(f"    copy {ceilings.copy_gbps:.0f} GB/s; matrix product of random data, TFLOP/s: {products}", flush=True)


def rehearsals(setup: Setup) -> tuple[Rehearsal, ...]:
    """None: no kernel of ours takes part."""
    return ()


def failures(rows: list[Row]) -> list[str]:
    """None: a machine is what it is."""
    return []


def unfinished(setup: Setup, writer: Writer) -> int:
    """Of the two rows."""
    return sum(not writer.find(kind=kind) for kind in _KINDS)


def describe(device: torch.device) -> Row:
    """The environment's row, without its ``machine``."""
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    driver, power_limit, sm_clock, memory_clock = _nvidia_smi(str(gpu.uuid)) if gpu else (None,) * 4
    cudnn = torch.backends.cudnn.version()
    return {
        "kind": "environment",
        "multiprocessors": gpu and gpu.multi_processor_count,
        "l2_bytes": gpu and gpu.L2_cache_size,
        "memory_bytes": gpu and gpu.total_memory,
        "driver": driver,
        "cuda": torch.version.cuda,
        "cudnn": None if cudnn is None else str(cudnn),
        "power_limit_w": _number(power_limit),
        "sm_clock_mhz": _number(sm_clock),
        "memory_clock_mhz": _number(memory_clock),
        "peers": _installed(PEERS),
    }


def _nvidia_smi(uuid: str) -> tuple[str | None, ...]:
    """The driver's version, power limit (W) and highest clocks (MHz) of a GPU; ``None`` if it does not answer."""
    fields = ("driver_version", "power.limit", "clocks.max.sm", "clocks.max.memory")
    # By its uuid: nvidia-smi counts GPUs without regard to CUDA_VISIBLE_DEVICES.
    which, what = f"--id=GPU-{uuid.removeprefix('GPU-')}", f"--query-gpu={','.join(fields)}"
    command = ("nvidia-smi", which, what, "--format=csv,noheader,nounits")
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return (None,) * len(fields)
    answers = [answer.strip() for answer in done.stdout.strip().split(",")]
    return tuple(answers) if len(answers) == len(fields) else (None,) * len(fields)


def _number(answer: str | None) -> float | None:
    """nvidia-smi says ``[N/A]`` for what a GPU does not tell."""
    try:
        return None if answer is None else float(answer)
    except ValueError:
        return None


def _installed(modules: tuple[str, ...]) -> dict[str, str]:
    """Versions by module, without importing any: some take seconds, and a broken one would raise."""
    distributions = importlib.metadata.packages_distributions()
    return {name: _version(name, distributions.get(name.partition(".")[0], [])) for name in modules if _found(name)}


def _found(module: str) -> bool:
    """Whether a module is there. ``find_spec`` alone would import the packages that it is in."""
    package, *parts = module.split(".")
    spec = importlib.util.find_spec(package)
    for part in parts:
        if spec is None or spec.submodule_search_locations is None:
            return False
        spec = PathFinder.find_spec(f"{spec.name}.{part}", spec.submodule_search_locations)
    return spec is not None


def _version(module: str, distributions: list[str]) -> str:
    """Of the distribution, of those that share its first name, that the module's own file is of."""
    path = module.replace(".", "/")
    for name in distributions:
        if {f"{path}.py", f"{path}/__init__.py"} & {file.as_posix() for file in importlib.metadata.files(name) or ()}:
            return importlib.metadata.version(name)
    return importlib.metadata.version(distributions[0]) if distributions else "of no distribution"
