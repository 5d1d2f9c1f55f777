"""Builds the native CPU library of csrc/ where it can; where it cannot, the install is pure Python and says why.

What it takes: a C++17 compiler (``CXX``, or c++, g++ or clang++ on the path) and the headers of the torch that is
installed. Both are looked for and never fetched. ``CXXFLAGS``, ``LDFLAGS`` and ``MAX_JOBS`` are heeded.

``VITREG_NATIVE=auto`` (the default) builds if that is possible, ``cpu`` fails if it is not, ``0`` does not try.

A library that ``build_ext --inplace`` has left among the sources is packed as it is, if it was built of these very
sources in the same way.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = Path("csrc")
FOLDER = Path("vitreg_kernels", "_native")
LIBRARY, METADATA = "libvitreg_cpu.so", "cpu.json"

# Never -march=native, nor -ffast-math: a library runs where it is carried to, and NaN and infinity must show.
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-ffp-contract=off")
# Of the one file that includes them: the stable ABI only, as it was in torch 2.10.
TORCH_FLAGS = ("-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000")

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
# One file csrc/cpu/isa_<name>.cpp each; cpuid.cpp asks the CPU for the same features.
X86_64_FLAGS = {
    "baseline": ("-msse4.2",),
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512bf16": (*_AVX512, "-mavx512bf16"),
    "amx": (*_AVX512, "-mavx512bf16"),  # its own instructions are written in assembly
}


class CannotBuild(Exception):
    """Why there is no native library, in one sentence."""


def build(folder: Path) -> dict[str, Any]:
    """Compile and link into a folder, or take what was built alike, there or among the sources; gives how it was built.

    Raises:
        CannotBuild: if something is missing or fails.
    """
    if sys.platform not in ("linux", "darwin"):
        raise CannotBuild(f"there is no build for {sys.platform} yet")
    compiler, version = find_compiler()
    torch, torch_version = find_torch()
    flags = [*FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    isas = X86_64_FLAGS if platform.machine().lower() in ("x86_64", "amd64") else {"baseline": ()}
    link_flags = shlex.split(os.environ.get("LDFLAGS", ""))
    # Digests are taken before the compiler reads the files: a change meanwhile then shows.
    recipe = {
        "torch": torch_version,
        "compiler": version,
        "flags": flags,
        "link_flags": link_flags,
        "instruction_sets": list(isas),
        # Run, not imported: the package imports torch.
        "sources": runpy.run_path(str(FOLDER / "sources.py"))["digest"](SOURCES),
        "builder": hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
    }
    for before in (folder, FOLDER):
        if (before / LIBRARY).exists() and recipe_of(before / METADATA) == recipe:
            if not before.samefile(folder):
                shutil.copyfile(before / LIBRARY, folder / LIBRARY)
            return recipe
    remove(folder)  # lest half of a library be taken for one that was built
    units = {SOURCES / "bindings.cpp": (*TORCH_FLAGS, "-isystem", str(torch / "include"))}
    units |= {path: () for path in sorted((SOURCES / "cpu").glob("*.cpp")) if not path.stem.startswith("isa_")}
    units |= {SOURCES / "cpu" / f"isa_{isa}.cpp": own for isa, own in isas.items()}

    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(jobs()) as pool:
        objects = {source: Path(work, f"{source.stem}.o") for source in units}

        def compile_one(source: Path) -> None:
            run([*compiler, *flags, *units[source], "-c", str(source), "-o", str(objects[source])], f"on {source}")

        # The instruction sets take longest, and the widest of them longer still.
        list(pool.map(compile_one, reversed(units)))
        link = [*compiler, *flags, "-shared", *map(str, objects.values()), "-o", str(folder / LIBRARY)]
        run([*link, f"-L{torch / 'lib'}", "-ltorch_cpu", *link_flags], "at linking")
    return recipe


def remove(folder: Path) -> None:
    """What a build left there."""
    for name in (METADATA, LIBRARY):
        (folder / name).unlink(missing_ok=True)


def recipe_of(metadata: Path) -> Any:
    """What a build wrote down; ``None`` if that cannot be read."""
    try:
        return json.loads(metadata.read_text())
    except (OSError, ValueError):
        return None


def find_compiler() -> tuple[list[str], str]:
    """The command of the C++ compiler, and how it names itself."""
    given = shlex.split(os.environ.get("CXX", ""))
    found = [[path] for name in ("c++", "g++", "clang++") if (path := shutil.which(name))]
    for command in [given] if given else found:
        try:
            done = subprocess.run([*command, "--version"], capture_output=True, text=True)
        except OSError as error:
            raise CannotBuild(f"the C++ compiler {shlex.join(command)} does not run ({error.strerror})") from error
        if done.returncode or not done.stdout:
            raise CannotBuild(f"the C++ compiler {shlex.join(command)} does not answer to --version")
        return command, done.stdout.splitlines()[0]
    raise CannotBuild("there is no C++ compiler (c++, g++ or clang++) on the path")


def find_torch() -> tuple[Path, str]:
    """The folder of the installed torch, and its version. It is not imported.

    Under build isolation Python does not see it; it stands in the site-packages of this Python all the same.
    """
    spec = importlib.util.find_spec("torch")
    folders = [Path(p) for p in (spec and spec.submodule_search_locations) or ()]
    folders += [Path(sysconfig.get_path(scheme), "torch") for scheme in ("platlib", "purelib")]
    for folder in folders:
        if (folder / "include" / "torch" / "csrc" / "stable" / "library.h").exists():
            version = re.search(r"__version__ = '(.+?)'", (folder / "version.py").read_text())
            return folder, version[1] if version else "unknown"
    raise CannotBuild("no torch of 2.10 or newer was found beside it; install torch first, then this package again")


def run(command: list[str], where: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines()
        raise CannotBuild(f"{command[0]} failed {where}: {lines[0].strip() if lines else 'without a word'}")


def jobs() -> int:
    value = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
    if not (value.isdecimal() and int(value)):
        raise SystemExit(f"MAX_JOBS must be a number of processes, 1 or more, got {value!r}")
    return int(value)


def wanted() -> str:
    value = os.environ.get("VITREG_NATIVE", "auto")
    if value not in ("auto", "cpu", "0"):
        raise SystemExit(f"VITREG_NATIVE must be auto, cpu or 0, got {value!r}")
    return value


class BuildNative(build_ext):
    """The library and its metadata, beside the Python files of the package; into the sources if asked ``--inplace``."""

    def run(self) -> None:
        folder = FOLDER if self.inplace or self.editable_mode else Path(self.build_lib, FOLDER)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            if wanted() == "0":
                raise CannotBuild("it was installed with VITREG_NATIVE=0")
            found = build(folder.absolute())
        except CannotBuild as error:
            remove(folder)
            if wanted() == "cpu":
                raise SystemExit(f"VITREG_NATIVE=cpu, but the native library cannot be built: {error}") from error
            found = {"reason": str(error)}
        print(f"native library: {found.get('reason') or 'built'}")
        (folder / METADATA).write_text(json.dumps(found, indent=2) + "\n")

    def get_outputs(self) -> list[str]:
        files = [Path(self.build_lib, FOLDER, name) for name in (LIBRARY, METADATA)]
        return [str(file) for file in files if file.exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Wheel(bdist_wheel):
    """The library knows nothing of Python, so the wheel is for any Python 3 on this platform; without it, on any."""

    def run(self) -> None:
        self.run_command("build")
        self.skip_build = True
        self.distribution.native = Path(self.get_finalized_command("build").build_lib, FOLDER, LIBRARY).exists()
        self.root_is_pure = not self.distribution.native
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class WithNative(Distribution):
    """Only what has extension modules gets them built; whether there is one shows when that has been tried."""

    native = True

    def has_ext_modules(self) -> bool:
        return self.native


setup(distclass=WithNative, cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel})
