"""What a contender is, and how one is asked without letting it stop the race."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple, TypeVar

from torch import Tensor

from vitreg_kernels import UnsupportedError
from vitreg_kernels.measure.race import Stopped, attempted

Attend = Callable[..., Tensor]
Tensors = dict[str, Tensor]
Result = TypeVar("Result")


def never_refuses(*inputs: Tensor) -> str | None:
    """What most contenders say before they have tried."""
    return None


def needs_gpu(*inputs: Tensor) -> str | None:
    """What a contender without kernels for a CPU says."""
    return None if inputs[0].is_cuda else f"runs on cuda, not on {inputs[0].device.type}"


class Peer(NamedTuple):
    """One contender in one layout.

    Attributes:
        name: as rows and pictures show it.
        attend: from the layout's inputs to its output; raises where it cannot serve the call.
        ours: it is a backend of vitreg_kernels, not something to be measured against.
        context: entered around each call, outside the clock.
        refuses: its reason for not serving some inputs, where it can tell without running.
    """

    name: str
    attend: Attend
    ours: bool = False
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    refuses: Callable[..., str | None] = never_refuses

    def unless(self, refuses: Callable[..., str | None]) -> Peer:
        """The same contender, left out where ``refuses`` says why, whatever it would say itself."""
        return self._replace(refuses=lambda *inputs: refuses(*inputs) or self.refuses(*inputs))

    def do(self, job: Callable[..., Result], *tensors: Tensor) -> Result:
        """``job(attend, *inputs, grad_output)``.

        Raises:
            UnsupportedError: if the peer refuses; where it does not serve the call, whatever its library raises.
        """
        reason = self.refuses(*tensors[:-1])
        if reason is not None:
            raise UnsupportedError(reason)
        with self.context():
            return job(self.attend, *tensors)


def attempt(peer: Peer, job: Callable[..., Result], *tensors: Tensor) -> Result | Stopped:
    """``peer.do(job, *tensors)``, or why the peer does not do it."""
    return attempted(partial(peer.do, job, *tensors), ours=peer.ours)
