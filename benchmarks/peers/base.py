"""What a contender is, and how one is asked without letting it stop the race."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from vitreg_kernels import UnsupportedError

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


class Stopped(NamedTuple):
    """Why a contender gave no result.

    Attributes:
        reason: in its own words.
        failed: it is ours and did not refuse (``UnsupportedError``) but broke.
    """

    reason: str
    failed: bool


def attempt(peer: Peer, job: Callable[..., Result], *tensors: Tensor) -> Result | Stopped:
    """``job(peer.attend, *inputs, grad_output)``, or why the peer does not do it."""

    def call() -> Result:
        with peer.context():
            return job(peer.attend, *tensors)

    reason = peer.refuses(*tensors[:-1])
    return guarded(call, ours=peer.ours) if reason is None else Stopped(reason, failed=False)


def guarded(call: Callable[[], Result], *, ours: bool) -> Result | Stopped:
    """``call()``, or what stopped it: of a peer any error is a refusal, of ours ``UnsupportedError`` only.

    Too little memory is a refusal of anybody's: what runs on a larger device is not broken. torch says why an SDPA
    kernel does not apply in warnings, so those are part of the reason.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            return call()
        except UnsupportedError as error:
            return Stopped(str(error), failed=False)
        except torch.OutOfMemoryError as error:
            return Stopped(str(error), failed=False)
        except Exception as error:  # a contender may be anybody's code, and whatever stops it is its reason
            reason = " ".join([f"{type(error).__name__}: {error}", *(str(w.message) for w in caught)])
            return Stopped(reason, failed=ours)
