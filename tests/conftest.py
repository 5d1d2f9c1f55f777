"""One seed and no leftovers from a compiled test in the next; Hypothesis draws the same examples every time."""

from __future__ import annotations

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("vitreg", derandomize=True, deadline=None, database=None, print_blob=False)
hypothesis.settings.load_profile("vitreg")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def dynamo():
    """An empty compile cache, before and after."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()
