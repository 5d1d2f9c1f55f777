"""Whether Triton kernels run on a GPU or in Triton's interpreter: decided once, when this module is first imported.

``TRITON_INTERPRET=1`` chooses the interpreter, which runs kernels on CPU tensors, slowly. Triton reads the variable
whenever ``@triton.jit`` decorates a function, in its own library first, so it must be set before the process starts;
later changes have no effect here. Importing this module does not import triton.
"""

from __future__ import annotations

import os

import torch

# The values that triton itself takes for true.
INTERPRETING: bool = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def faults() -> list[str]:
    """Why Triton kernels cannot run in this process; empty if they can. Imports triton where that could run them.

    Not cached: ``dispatch.select`` remembers its choice anyway, and torch.compile, which traces through this function,
    cannot trace a cache.
    """
    if torch.version.hip is not None and not INTERPRETING:
        # There torch calls an AMD GPU "cuda" too, and gives it a capability: an MI300 that of an sm_94.
        return ["Triton kernels here are written and tuned for NVIDIA GPUs, and this torch is built for AMD's (ROCm)"]
    if not INTERPRETING and not torch.cuda.is_available():
        return [
            "Triton kernels need a CUDA GPU, and torch sees none; TRITON_INTERPRET=1, set before the process starts, "
            "runs them slowly on the CPU"
        ]
    try:
        import triton
        from triton.runtime.interpreter import InterpretedFunction
    except ModuleNotFoundError as error:
        if error.name != "triton":
            return [_broken(error)]
        return [
            "triton is not installed: torch's builds for CUDA require the one that they are made for; beside a torch "
            "that came without it, pip install 'triton>=3.6'"
        ]
    except Exception as error:  # a broken install raises anything, from ImportError to OSError
        return [_broken(error)]
    if isinstance(triton.language.zeros, InterpretedFunction) != INTERPRETING:
        return [
            "TRITON_INTERPRET changed after triton or vitreg_kernels had been imported; "
            "set it before the process starts, or not at all"
        ]
    return []


def _broken(error: Exception) -> str:
    return f"triton cannot be imported ({type(error).__name__}: {error}); install it again, as your torch asks for it"
