"""Which machine, which versions and which code a figure was measured with."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

import torch

import vitreg_kernels
from vitreg_kernels.dispatch import devices
from vitreg_kernels.measure.warm import cores

PACKAGES = ("torch", "triton", "xformers", "onnxruntime", "timm", "numpy")
ROOT = Path(__file__).parent.parent
_SOURCES = ("vitreg_kernels/**/*.py", "vitreg_kernels/**/*.json", "csrc/**/*", "benchmarks/**/*.py")

# Says how the native library was built here, and is in no commit.
_OF_A_BUILD = ROOT / "vitreg_kernels" / "_native" / "cpu.json"


class Machine(TypedDict):
    """Goes into every row of a result file."""

    device: str  # the GPU's own name, or the CPU's
    processor: str
    cores: int
    threads: int  # torch's
    capability: str  # "AVX2", "sm_90"
    system: str
    python: str
    packages: dict[str, str]  # the version of each package that takes part and is installed
    commit: str  # where there is no git checkout, what $VITREG_COMMIT says, or else "unknown"
    dirty: bool  # the checkout holds changes of ``sources`` that no commit has
    sources: str | None  # ``sources()``; None in files older than that


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Within, torch has so many threads for the work of a CPU; ``None`` leaves those it has."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe(device: torch.device | None = None) -> Machine:
    """This machine as a row records it; ``device`` defaults to ``default_device()``."""
    device = device or default_device()
    processor = devices.processor()
    if device.type == "cuda":
        name, capability = (
            torch.cuda.get_device_name(device),
            "sm_{}{}".format(*torch.cuda.get_device_capability(device)),
        )
    else:
        name, capability = processor, torch.backends.cpu.get_cpu_capability()
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--", *(f":(glob){pattern}" for pattern in _SOURCES))
    return Machine(
        device=name,
        processor=processor,
        cores=cores(),
        threads=torch.get_num_threads(),
        capability=capability,
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        packages={
            "vitreg_kernels": vitreg_kernels.__version__,  # of this checkout, installed or not
            **{name: version for name in PACKAGES if (version := _version(name)) is not None},
        },
        commit=commit or os.environ.get("VITREG_COMMIT") or "unknown",
        dirty=bool(changes),
        sources=sources(),
    )


def sources() -> str:
    """A digest of the code in this checkout that a figure can hang on, committed or not.

    Tiles and defaults that were measured are among it, as the same call runs another kernel with others.
    """
    digest = hashlib.sha256()
    files = {path for pattern in _SOURCES for path in ROOT.glob(pattern) if path.is_file() and path != _OF_A_BUILD}
    for name, path in sorted((path.relative_to(ROOT).as_posix(), path) for path in files):
        digest.update(f"{name} {path.stat().st_size}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """What git says about this checkout; ``None`` without git, a checkout or a commit."""
    try:
        answer = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()
