"""Compile a `Launch` for a GPU that is not there, and read what resources the kernel would take.

Needs triton and the NVIDIA tools its wheel brings, but neither a GPU nor a CUDA driver. ``TRITON_INTERPRET``, which
replaces the compiler, must not be set.
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

from .keys import settle
from .launch import Launch

# From sm_90 on, cuobjdump counts the 1 KB that the system reserves in every block as the kernel's own. The limit that a
# block can opt in to is stated without it.
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
        """The machine code as nvdisasm prints it. Printed on demand: it takes a third as long as compiling."""
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
    """A launch as triton's compiler takes it: types and specialisations of the arguments instead of their values.

    It can be pickled, so that another process can compile it.
    """

    source: ASTSource
    target: GPUTarget
    options: dict[str, Any]

    @cached_property
    def key(self) -> str:
        """The name of the compiled kernel in triton's cache on disk."""
        settle(self.source.fn)
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
        """Compile it into triton's cache on disk, or load it from there. Raises what triton and ptxas raise."""
        settle(self.source.fn)
        return triton.compile(self.source, self.target, self.options)


# Pickle a JITFunction by its qualified name, as functions are.
copyreg.pickle(JITFunction, lambda kernel: kernel.__qualname__)


def compilation(launch: Launch, capability: int) -> Compilation:
    """What ``launch.run()`` would compile on a GPU of a compute capability (80, 90, 100: ten times the version).

    Triton's own launcher specialises the arguments, for the given target instead of the current device. Tensors may be
    on the ``meta`` device, whose storage counts as aligned, as real storage is.

    Raises:
        RuntimeError: under ``TRITON_INTERPRET``.
    """
    kernel = launch.kernel
    if not isinstance(kernel, JITFunction):
        raise RuntimeError(
            f"cannot compile {kernel.__name__}, a {type(kernel).__name__}: expected a triton JITFunction; "
            "unset TRITON_INTERPRET before importing the kernels"
        )
    target = GPUTarget("cuda", capability, warp_size=32)
    backend = make_backend(target)
    arguments = {
        **launch.arguments,
        **launch.constants,
        **launch.options,
        "debug": kernel.debug or knobs.runtime.debug,
    }
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(**arguments)
    options, signature, constants, attributes = kernel._pack_args(backend, arguments, bound, specialization, options)
    return Compilation(ASTSource(kernel, signature, constants, attributes), target, options.__dict__)


def compile_launch(launch: Launch, capability: int) -> Resources:
    """Compile ``launch`` as ``compilation`` describes it and read its resources.

    Raises:
        RuntimeError: under ``TRITON_INTERPRET``, when triton or ptxas fails on the kernel, or when a tool fails.
    """
    job = compilation(launch, capability)
    try:
        compiled = job.run()
    except Exception as error:
        name = launch.kernel.__name__
        raise RuntimeError(f"{name} does not compile for sm_{capability} with {launch.constants}") from error
    cubin = compiled.asm["cubin"]
    usage = _inspect(cubin, knobs.nvidia.cuobjdump.path, "--dump-resource-usage")
    used = {name: int(count) for name, count in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    reserved = _RESERVED_SHARED_BYTES if capability >= 90 else 0
    return Resources(
        registers=used["REG"],
        spill_bytes=used["STACK"] + used["LOCAL"],
        shared_bytes=max(0, used["SHARED"] - reserved) + compiled.metadata.shared,
        tensor_memory_columns=compiled.metadata.tmem_size,
        num_warps=compiled.metadata.num_warps,
        cubin=cubin,
    )


def _inspect(cubin: bytes, tool: str, *options: str) -> str:
    """What one of NVIDIA's tools prints about a cubin. They read files only."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        done = subprocess.run([tool, *options, file], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{Path(tool).name} failed on a compiled kernel: {done.stderr.strip()}")
    return done.stdout
