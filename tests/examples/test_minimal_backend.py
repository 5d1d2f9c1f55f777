"""``examples/minimal_backend`` under the contract, and added to a process from outside the package."""

from __future__ import annotations

import minimal_backend
import pytest
import torch
from contract.assemble import Assemble
from contract.test_contract import *  # noqa: F403

from vitreg_kernels import RegisterViT, ViTConfig, dispatch
from vitreg_kernels.ops.assemble import backends, features
from vitreg_kernels.ops.assemble.validation import validated

REFERENCE = backends.BACKENDS[-1]


class AssembleByCopies(Assemble):
    BACKENDS = (minimal_backend.BACKEND, REFERENCE)
    KINDS = Assemble.KINDS[:4]  # each position; without CLS tokens and registers it does nothing else
    EXAMPLES = 30
    TRACED_AS_ANOTHER = True  # as the op by its other backends


OPS = (AssembleByCopies(),)


@pytest.fixture(autouse=True, scope="module")
def _registered():
    before = backends.BACKENDS
    minimal_backend.register()
    minimal_backend.register()  # once more changes nothing
    assert (*before, minimal_backend.BACKEND) == backends.BACKENDS
    yield
    backends.BACKENDS = before


def test_a_whole_model_takes_it_by_name():
    config = ViTConfig(patch_size=14, image_size=28, dim=32, depth=1, num_heads=2)
    models = [RegisterViT(config, backend={"assemble": name}).eval() for name in ("copies", "reference")]
    models[1].load_state_dict(models[0].state_dict())
    images = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        copied, expected = (model(images) for model in models)
    torch.testing.assert_close(copied.patches, expected.patches)


def test_it_is_not_the_default():
    request = features.request_of(validated(torch.zeros(1, 2, 3), None, None, None))
    assert dispatch.select(backends.BACKENDS, request, None) is not minimal_backend.BACKEND
