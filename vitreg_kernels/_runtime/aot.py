"""Compile a `Launch` for a GPU that is not there, and read what the kernel would use of it.

Needs triton and the NVIDIA tools its wheel brings; needs neither a GPU nor a CUDA driver, and not ``TRITON_INTERPRET``,
which replaces the compiler.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from .launch import Launch

# From sm_90 on, cuobjdump counts the 1 KB the system takes of every block as the kernel's own; the limits do not.
_RESERVED_SHARED_BYTES = 1024
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(\w+)", re.MULTILINE)


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses.

    Attributes:
        registers: 32-bit registers a thread.
        spill_bytes: local memory a thread, stack and spilled registers alike.
        shared_bytes: shared memory a block, static and dynamic, to be held against the limit a block can opt in to.
        tensor_memory_columns: tensor memory a block, of the 512 columns of a multiprocessor; 0 before sm_100.
        num_warps: warps a block.
        cubin: the compiled code.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_memory_columns: int
    num_warps: int
    cubin: bytes = field(repr=False)

    @cached_property
    def instructions(self) -> Counter[str]:
        """How often each SASS opcode stands in the code, without modifiers: ``MUFU``, not ``MUFU.EX2``.

        The body of a loop counts once. The matrix unit is ``HMMA`` on sm_80, ``HGMMA`` on sm_90 and ``UTCHMMA`` on
        sm_100 (both keep ``HMMA`` for tiles below 64 rows); what spills is stored by ``STL`` and loaded by ``LDL``.
        Disassembling takes a third as long as compiling, so it waits until somebody asks.
        """
        # nvdisasm takes half the time of cuobjdump --dump-sass, for the same instructions.
        sass = _inspect(self.cubin, knobs.nvidia.nvdisasm.path, "--print-code", "--no-dataflow")
        return Counter(_INSTRUCTION.findall(sass))


def compile_launch(launch: Launch, arch: int) -> Resources:
    """Compile ``launch`` for compute capability ``arch`` (80, 90, 100: ten times the version) and read its resources.

    The arguments are specialised by triton's own launcher, so this is the kernel that ``launch.run()`` would build on
    such a GPU. Tensors may be on the ``meta`` device, whose storage counts as aligned, as real storage is.

    Raises:
        RuntimeError: under ``TRITON_INTERPRET``, when triton or ptxas fails on the kernel, or when a tool fails.
    """
    kernel = launch.kernel
    if not isinstance(kernel, JITFunction):
        raise RuntimeError(
            f"cannot compile {kernel.__name__}, a {type(kernel).__name__}: expected a triton JITFunction; "
            "unset TRITON_INTERPRET before importing the kernels"
        )
    try:
        compiled = _compile(launch, GPUTarget("cuda", arch, warp_size=32))
    except Exception as error:
        raise RuntimeError(f"{kernel.__name__} does not compile for sm_{arch} with {launch.constants}") from error
    cubin = compiled.asm["cubin"]
    usage = _inspect(cubin, knobs.nvidia.cuobjdump.path, "--dump-resource-usage")
    used = {name: int(count) for name, count in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    reserved = _RESERVED_SHARED_BYTES if arch >= 90 else 0
    return Resources(
        registers=used["REG"],
        spill_bytes=used["STACK"] + used["LOCAL"],
        shared_bytes=used["SHARED"] - reserved + compiled.metadata.shared,
        tensor_memory_columns=compiled.metadata.tmem_size,
        num_warps=compiled.metadata.num_warps,
        cubin=cubin,
    )


def _compile(launch: Launch, target: GPUTarget) -> Any:
    """What ``JITFunction.run`` does up to the launch, for a target it is told rather than the device it finds."""
    kernel, backend = launch.kernel, make_backend(target)
    arguments = {
        **launch.arguments,
        **launch.constants,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "debug": kernel.debug or knobs.runtime.debug,
    }
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(**arguments)
    options, signature, constants, attributes = kernel._pack_args(backend, arguments, bound, specialization, options)
    return triton.compile(ASTSource(kernel, signature, constants, attributes), target, options.__dict__)


def _inspect(cubin: bytes, tool: str, *options: str) -> str:
    """What one of NVIDIA's tools prints about a cubin, which it wants as a file."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        done = subprocess.run([tool, *options, file], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{Path(tool).name} failed on a compiled kernel: {done.stderr.strip()}")
    return done.stdout
