"""Whether Triton kernels run on a GPU or in Triton's interpreter: decided once, when this module is first imported.

``TRITON_INTERPRET=1`` chooses the interpreter, which runs kernels on CPU tensors, slowly. Triton reads it while kernels
are being defined, its own library's included, so it must be set before the process starts and is never looked at again.
Importing this module does not import triton.
"""

from __future__ import annotations

import functools
import os

import torch

# The values triton itself takes for true.
INTERPRETING: bool = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")

_INTERPRETER_ARCH = 80


def faults() -> list[str]:
    """Why Triton kernels cannot run in this process; empty if they can. Imports triton.

    Not cached: calls alike are selected once (see ``dispatch.select``), and the compiler traces through this.
    """
    try:
        import triton
        from triton.runtime.interpreter import InterpretedFunction
    except Exception as error:  # a broken install raises anything, from ImportError to OSError
        return [f"triton cannot be imported ({type(error).__name__}: {error}); pip install triton"]
    if isinstance(triton.language.zeros, InterpretedFunction) != INTERPRETING:
        return [
            "TRITON_INTERPRET changed after triton or vitreg_kernels had been imported; "
            "set it before the process starts, or not at all"
        ]
    if not INTERPRETING and not torch.cuda.is_available():
        return ["Triton kernels need a CUDA GPU, and torch sees none; TRITON_INTERPRET=1 runs them slowly on the CPU"]
    return []


@functools.cache
def arch(device: torch.device) -> int:
    """Compute capability times ten of a CUDA device (H100: 90), which is what kernels are tuned by.

    The interpreter has no architecture; it takes the tiles of the oldest supported one.
    """
    if device.type != "cuda":
        return _INTERPRETER_ARCH
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
