"""Compile a `Launch` for a GPU that is not there, and read what the kernel would use of it.

Needs triton and the NVIDIA tools its wheel brings; needs neither a GPU nor a CUDA driver, and not ``TRITON_INTERPRET``,
which replaces the compiler.
"""

from __future__ import annotations

import copyreg
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.cache import get_cache_key, get_cache_manager
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
    def sass(self) -> str:
        """The machine code as nvdisasm prints it. That takes a third as long as compiling, so it waits for who asks."""
        # nvdisasm takes half the time of cuobjdump --dump-sass, for the same instructions.
        return _inspect(self.cubin, knobs.nvidia.nvdisasm.path, "--print-code", "--no-dataflow")

    @cached_property
    def instructions(self) -> Counter[str]:
        """How often each SASS opcode stands in the code, without modifiers: ``MUFU``, not ``MUFU.EX2``.

        The body of a loop counts once. The matrix unit is ``HMMA`` on sm_80, ``HGMMA`` on sm_90 and ``UTCHMMA`` on
        sm_100 (both keep ``HMMA`` for tiles below 64 rows); what spills is stored by ``STL`` and loaded by ``LDL``.
        """
        return Counter(_INSTRUCTION.findall(self.sass))


@dataclass(frozen=True)
class Compilation:
    """A launch as triton's compiler takes it: all that its arguments decide is decided, and no tensor is left.

    Pickles, with the kernel by its name.
    """

    source: ASTSource
    target: GPUTarget
    options: dict[str, Any]

    @cached_property
    def key(self) -> str:
        """The name of the compiled kernel in triton's cache on disk."""
        backend = make_backend(self.target)
        options = backend.parse_options(self.options)
        key = get_cache_key(self.source, backend, options, get_cache_invalidating_env_vars())
        return sha256(key.encode()).hexdigest()

    @property
    def cached(self) -> bool:
        """Whether triton's cache on disk has it."""
        file = f"{self.source.name[:150]}.json"  # as ``triton.compile`` names it
        return file in (get_cache_manager(self.key).get_group(file) or {})

    def run(self) -> CompiledKernel:
        """Compile it, or load it from triton's cache on disk, which has it then. Raises what triton and ptxas raise."""
        return triton.compile(self.source, self.target, self.options)


# As functions do; what triton.jit leaves in a module is no function any more.
copyreg.pickle(JITFunction, lambda kernel: kernel.__qualname__)


def compilation(launch: Launch, arch: int) -> Compilation:
    """What ``launch.run()`` would compile on a GPU of compute capability ``arch`` (80, 90, 100: ten times the version).

    Specialised by triton's own launcher, for a target it is told rather than the device it finds. Tensors may be on
    the ``meta`` device, whose storage counts as aligned, as real storage is.

    Raises:
        RuntimeError: under ``TRITON_INTERPRET``.
    """
    kernel = launch.kernel
    if not isinstance(kernel, JITFunction):
        raise RuntimeError(
            f"cannot compile {kernel.__name__}, a {type(kernel).__name__}: expected a triton JITFunction; "
            "unset TRITON_INTERPRET before importing the kernels"
        )
    target = GPUTarget("cuda", arch, warp_size=32)
    backend = make_backend(target)
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
    return Compilation(ASTSource(kernel, signature, constants, attributes), target, options.__dict__)


def compile_launch(launch: Launch, arch: int) -> Resources:
    """Compile ``launch`` as ``compilation`` describes it and read its resources.

    Raises:
        RuntimeError: under ``TRITON_INTERPRET``, when triton or ptxas fails on the kernel, or when a tool fails.
    """
    job = compilation(launch, arch)
    try:
        compiled = job.run()
    except Exception as error:
        name = launch.kernel.__name__
        raise RuntimeError(f"{name} does not compile for sm_{arch} with {launch.constants}") from error
    cubin = compiled.asm["cubin"]
    usage = _inspect(cubin, knobs.nvidia.cuobjdump.path, "--dump-resource-usage")
    used = {name: int(count) for name, count in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    reserved = _RESERVED_SHARED_BYTES if arch >= 90 else 0
    return Resources(
        registers=used["REG"],
        spill_bytes=used["STACK"] + used["LOCAL"],
        shared_bytes=max(0, used["SHARED"] - reserved) + compiled.metadata.shared,
        tensor_memory_columns=compiled.metadata.tmem_size,
        num_warps=compiled.metadata.num_warps,
        cubin=cubin,
    )


def _inspect(cubin: bytes, tool: str, *options: str) -> str:
    """What one of NVIDIA's tools prints about a cubin, which it wants as a file."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        done = subprocess.run([tool, *options, file], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{Path(tool).name} failed on a compiled kernel: {done.stderr.strip()}")
    return done.stdout
