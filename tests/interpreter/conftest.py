"""The interpreter suite needs ``TRITON_INTERPRET=1`` before anything defines a Triton kernel, hence its own process."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest

from vitreg_kernels._triton import mode

if not mode.INTERPRETING:
    pytest.exit(
        "tests/interpreter runs the Triton kernels on the CPU: set TRITON_INTERPRET=1 before pytest starts, "
        "or leave this folder out",
        returncode=pytest.ExitCode.USAGE_ERROR,
    )


@pytest.fixture(autouse=True, scope="session")
def _arithmetic_of_a_gpu() -> Iterator[None]:
    """Two things in which the interpreter's arithmetic differs from a GPU's, at logits in the thousands by 1e-4.

    A GPU rounds ``tl.fma`` once; the interpreter multiplies and adds in fp32. (In fp64 a product of two fp32 is exact.)
    Matrix units sum a product over its inner axis in one order, whatever the tile; numpy's BLAS in one that depends on
    the shape. The kernels count on a logit having the same bits in each kernel that recomputes it.
    """
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_fma(self: Any, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        exact = x.data.astype(np.float64) * y.data + z.data
        return TensorHandle(exact.astype(z.data.dtype), z.dtype)

    def create_dot(self: Any, a: TensorHandle, b: TensorHandle, d: TensorHandle, *_: Any) -> TensorHandle:
        left, right = a.data.astype(d.data.dtype), b.data.astype(d.data.dtype)
        total = d.data.copy()
        for k in range(left.shape[1]):
            total += left[:, k, None] * right[k]
        return TensorHandle(total, d.dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_fma", create_fma)
        patch.setattr(InterpreterBuilder, "create_dot", create_dot)
        yield


@pytest.fixture(autouse=True, scope="session")
def _language_stays_replaced() -> Iterator[None]:
    """The functions of triton.language are replaced by the interpreter's once, and put back at the end.

    It would do so at every call of a jit function, within kernels too, which takes longer than a small kernel itself.
    """
    from triton import language
    from triton.runtime import interpreter

    replace, replaced, scopes = interpreter._patch_lang, set(), []

    @cache
    def languages(function: Callable[..., Any]) -> frozenset[Any]:
        """As the function may call them: the module and that of its core."""
        modules = filter(inspect.ismodule, function.__globals__.values())
        return frozenset(module for module in modules if module in (language, language.core))

    def replace_once(function: Callable[..., Any]) -> interpreter._LangPatchScope:
        if not languages(function) <= replaced:
            scopes.append(replace(function))
            replaced.update(languages(function))
        return interpreter._LangPatchScope()  # of nothing, so that nothing is put back

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", replace_once)
        yield
    for scope in reversed(scopes):
        scope.restore()
