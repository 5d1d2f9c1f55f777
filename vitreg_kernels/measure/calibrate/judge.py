"""Whether a backend is right for a call as the user makes it: by the accuracy rule, twice, among memory full of NaN."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ...dispatch import Backend
from ..accuracy import Accuracy
from ..oracle import Call, Oracle, Tensors
from ..poison import guarded, poisoned
from .subjects import Subject, part


class Verdict(NamedTuple):
    """What was found of a backend.

    Attributes:
        wrong: what was wrong, in one sentence; empty if it was right.
        worst: the errors of the tensor that comes nearest to its bound; ``None`` where that was not asked.
    """

    wrong: str
    worst: Accuracy | None


class Judge:
    """Holds backends against one call.

    Args:
        subject: the call.
        gradients: whether its backward counts too.
        device: where it runs.
    """

    def __init__(self, subject: Subject, gradients: bool, device: torch.device) -> None:
        self._device = device
        self._images = subject.images
        self.call: Call = subject.make(gradients)
        calls = [part(self.call, image) for image in subject.images] or [self.call]
        # Each image is a call of its own, so that fp64 and N x N are of a few images and not of a whole batch.
        self._oracles = [Oracle(call) for call in calls]

    def verdict(self, backend: Backend) -> Verdict:
        """Runs the whole call twice and judges it. Raises what the backend raises."""
        call = self.call.changed(guarded)
        with poisoned(self._device):
            first, second = call.run(backend.name), call.run(backend.name)
        # A peer may add up in whatever order its threads come; ours may not.
        changed = [name for name in first if backend.opaque and not _same_bits(first[name], second[name])]
        if changed:
            return Verdict(f"{', '.join(changed)} gave other bits when run again", None)
        name, worst = max(self._errors(first), key=_error_over_bound)
        return Verdict("" if worst.passed else f"{name} has {worst}", worst)

    def _errors(self, tensors: Tensors) -> Iterator[tuple[str, Accuracy]]:
        for number, oracle in enumerate(self._oracles):
            image = self._images[number] if self._images else None
            its = tensors if image is None else {name: x[image : image + 1] for name, x in tensors.items()}
            yield from oracle.compare(its).items()


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _error_over_bound(named: tuple[str, Accuracy]) -> float:
    return named[1].error_over_bound
