"""A GPU that is not there: enough of one for our own kernels and their launchers to be compiled for it."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch

from vitreg_kernels.dispatch import Backend, Request, rules
from vitreg_kernels.ops._shared import capability

_FUNCTION = re.compile(r"\bcu[A-Z]\w+")


@contextmanager
def pretending(arch: int) -> Iterator[None]:
    """Triton backends take tensors of a CPU for those of a GPU of a compute capability, ten times the version.

    No other backend serves a call, and no kernel may be launched: calls are for ``vitreg_kernels.measure.warm``, which
    leaves launches out.
    """

    def reasons_against(backend: Backend, request: Request) -> list[str]:
        if backend.name != "triton":
            return ["is not ours to compile"]
        there = request._replace(device="cuda", capability=arch)
        return rules.unmet(backend.requirements, there) + backend.refuses(there)

    rules.select_cached.cache_clear()
    try:
        with (
            mock.patch.object(Backend, "reasons_against", reasons_against),
            mock.patch.object(capability, "capability", return_value=arch),
            mock.patch.object(torch, "randn", _untouched),
        ):
            yield
    finally:
        rules.select_cached.cache_clear()


def libcuda(folder: Path) -> None:
    """Builds a CUDA driver in which every call fails: launchers are linked against one, and loaded once they are.

    This process and those that it starts find it.

    Raises:
        RuntimeError: without a C compiler.
    """
    from triton.backends.nvidia import driver

    # Whatever triton's own C calls, in the driver's file and in the launchers that it writes.
    sources = (Path(driver.__file__), Path(driver.__file__).with_name("driver.c"))
    names = sorted({name for source in sources for name in _FUNCTION.findall(source.read_text())})
    no_device = 100  # CUDA_ERROR_NO_DEVICE
    source, library = folder / "libcuda.c", folder / "libcuda.so.1"
    source.write_text("".join(f"int {name}(void) {{ return {no_device}; }}\n" for name in names))
    command = ("cc", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", str(library), str(source))
    try:
        subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(f"launchers need a C compiler, and `cc` fails: {error}") from error
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    os.environ["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, (str(folder), os.environ.get("LD_LIBRARY_PATH"))))
    ctypes.CDLL(str(library))  # the variable is read when a process starts


def _untouched(*size: int | tuple[int, ...], generator: object = None, **options: object) -> torch.Tensor:
    """``torch.randn`` without the numbers: a gigabyte of them takes a CPU seconds, and what is compiled needs none."""
    return torch.empty(*size, **options)
