"""Whether a backend is right for a call as the user makes it: by the accuracy rule, twice, among memory full of NaN."""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch

from ...dispatch import Backend
from ..accuracy import Accuracy, same_bits
from ..oracle import Call, Oracle
from ..poison import guarded, poisoned
from .subjects import Subject, part, repeating

_IMAGES = 3


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

    Attributes:
        call: what is held.
    """

    def __init__(self, subject: Subject, gradients: bool, device: torch.device) -> None:
        self._device = device
        self.call: Call = subject.make(gradients)
        # fp64 and N x N are of a few images, one at a time; the others are the same again.
        few = min(subject.images, _IMAGES)
        if few:
            self.call = repeating(self.call, few)
            self._oracle = Oracle.of_parts(self.call, [part(self.call, image) for image in range(few)], subject.images)
        else:
            self._oracle = Oracle(self.call)
        self._guarded = self.call.changed(guarded)

    def verdict(self, backend: Backend) -> Verdict:
        """Runs the whole call twice and judges all of it. Raises what the backend raises."""
        # What is uninitialised is poisoned by torch's deterministic mode, in which torch has fewer kernels of its own.
        with poisoned(self._device) if backend.opaque else nullcontext():
            first, second = self._guarded.run(backend.name), self._guarded.run(backend.name)
        # torch's kernels may add up in whatever order their threads come; ours may not.
        changed = [name for name in first if backend.opaque and not same_bits(first[name], second[name])]
        if changed:
            return Verdict(f"{', '.join(changed)} gave other bits when run again", None)
        name, worst = max(self._oracle.compare(first).items(), key=_error_over_bound)
        return Verdict("" if worst.passed else f"{name} has {worst}", worst)


def _error_over_bound(named: tuple[str, Accuracy]) -> float:
    return named[1].error_over_bound
