"""Keys of compiled kernels that every process agrees on."""

from __future__ import annotations

from typing import Any


def settle(kernel: Any) -> None:
    """Has triton hash a kernel's source after that of all functions it calls: then its key is the same everywhere.

    Before 3.9 triton hashes into a kernel those constants of a called function that it knows by then: all of them where
    the function was hashed for another kernel before, and else none. So the key depended on which kernel a process used
    first, and what one process had compiled another did not find.
    """
    from triton.runtime.jit import JITFunction

    if not isinstance(kernel, JITFunction) or kernel.hash is not None:  # the interpreter's have no key
        return
    for name in kernel.fn.__code__.co_names:
        called = kernel.fn.__globals__.get(name)
        if called is not kernel:
            settle(called)
    kernel.cache_key  # noqa: B018  (a property that remembers)
