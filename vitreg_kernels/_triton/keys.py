"""Keys of compiled kernels that every process agrees on."""

from __future__ import annotations

import threading
from typing import Any

_lock = threading.RLock()  # triton marks a kernel whose hash is being made, which another thread would take for one


def settle(kernel: Any) -> None:
    """Has triton hash a kernel's source after that of the functions it calls: then its key is the same everywhere.

    Before 3.9 triton hashes into a kernel those constants of a called function that it knows by then: all of them where
    the function was hashed for another kernel before, and else none. So the key depended on which kernel a process used
    first, and what one process had compiled another did not find. Seen are functions called by a global name.
    """
    from triton.runtime.jit import JITFunction

    if isinstance(kernel, JITFunction):  # the interpreter's have no key
        with _lock:
            _settle(kernel, JITFunction, set())


def _settle(kernel: Any, kind: type, met: set[int]) -> None:
    if kernel.hash is not None or id(kernel) in met:  # by id: a kernel's own hash is what is to be made
        return
    met.add(id(kernel))
    for name in kernel.fn.__code__.co_names:
        called = kernel.fn.__globals__.get(name)
        if isinstance(called, kind):
            _settle(called, kind, met)
    kernel.cache_key  # noqa: B018  (a property that remembers)
