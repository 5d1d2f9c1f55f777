"""The ahead-of-time suite needs triton's compiler, which ``TRITON_INTERPRET`` replaces for the whole process."""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.exit(
        "tests/aot compiles the Triton kernels, which TRITON_INTERPRET=1 prevents: unset it, or leave this folder out",
        returncode=pytest.ExitCode.USAGE_ERROR,
    )

pytest.register_assert_rewrite("budgets")
