"""Asking a library's kernel whether it runs here, by a tiny call that none of the caller's modes takes part in."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from ...dispatch import Request, Requirements, unmet


def refuses(request: Request, needs: Requirements, ask: Callable[[torch.dtype, int], list[str]]) -> list[str]:
    """What a library outside torch has against a call of attention beyond what its backend declares.

    Args:
        request: the call.
        needs: what is declared. The library is asked only where that is met: it may have to be imported.
        ask: its reasons against a dtype and a head dim.
    """
    reasons = []
    if request.head_dim % 8:
        reasons.append(f"takes head dims divisible by 8, not {request.head_dim}")
    if torch.compiler.is_compiling():
        reasons.append("cannot be traced by torch.compile")
    if reasons or unmet(needs, request):
        return reasons
    return ask(request.dtype, request.head_dim)


def refusal(call: Callable[[torch.device], object], device: str) -> str:
    """What is said against a call on a device, in one line; empty if it runs.

    In a thread of its own: autocast, grad mode, transforms of torch.func, fake tensors and tracers are a thread's, so
    whatever the caller is in changes nothing, and sees nothing.

    Args:
        call: makes small tensors there and runs.
        device: its type. Of CUDA the caller's current one is meant, which a new thread would not know.
    """

    def words() -> str:
        return words_against(lambda: call(where))

    # A backward asks from the very thread that a probe's own backward would wait for, and a capture records all that
    # the device is given. Neither is a time to ask, and only a backend that was named or measured comes here then.
    capturing = device == "cuda" and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    if capturing or torch._C._current_graph_task_id() != -1:
        return ""
    try:
        where = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
    except Exception as error:  # a torch without CUDA asserts that it has it
        return first_line(error)
    with ThreadPoolExecutor(1) as apart:
        return apart.submit(words).result()


def words_against(call: Callable[[], object]) -> str:
    """What a library says against a call, in one line: torch warns of its reasons before it raises."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            call()
        except Exception as error:  # whatever a library raises where it does not serve a call
            said = [str(one.message).partition(" (Triggered internally")[0] for one in warned]
            # Titles, and what is said of the kernels that were not asked for.
            said = [line for line in said if not (line.endswith("because:") or "runtime disabled" in line)]
            return "; ".join(line.rstrip(".") for line in said) or first_line(error)
    return ""


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
