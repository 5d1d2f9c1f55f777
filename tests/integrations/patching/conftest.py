"""What the op is called with in a test, as a fixture."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integrations.patching.judge import OpCall, op_calls


@pytest.fixture
def calls() -> Iterator[list[OpCall]]:
    """Filled by every call that goes through this library."""
    with op_calls() as found:
        yield found
