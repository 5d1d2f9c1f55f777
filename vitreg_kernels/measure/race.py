"""A race of anything: whoever can be checked is timed, interleaved with the others, and each gets one outcome."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

from ..errors import UnsupportedError
from . import timing

Result = TypeVar("Result")


class Contender(NamedTuple):
    """One that takes part.

    Attributes:
        name: no two share one.
        check: runs it once and gives what was found of its results; raises where it cannot serve the call.
        variant: how it is timed.
        ours: whether an error is a failure of this library; any of others' is a refusal.
    """

    name: str
    check: Callable[[], Any]
    variant: timing.Variant
    ours: bool = True


class Stopped(NamedTuple):
    """Why a contender gave no result.

    Attributes:
        reason: in its own words.
        failed: it is ours and did not refuse (``UnsupportedError``) but broke.
    """

    reason: str
    failed: bool


class Raced(NamedTuple):
    """A contender that ran.

    Attributes:
        found: what its check gave. Whoever is wrong is timed all the same.
        timing: of its variant.
    """

    found: Any
    timing: timing.Timing


def race(
    contenders: Sequence[Contender], copies: Sequence[Any], *, device: torch.device, budget_s: float
) -> dict[str, Raced | Stopped]:
    """Check every contender, and time those that ran.

    Args:
        contenders: in the order they are checked in.
        copies: of the input that the variants take, see ``timing.copies_past_cache``.
        device: where they run.
        budget_s: seconds of timing, shared by all.

    Returns:
        An outcome by name, in the order of the contenders.
    """
    outcomes = _checked(contenders, device)
    raced = {one.name: one.variant for one in contenders if not isinstance(outcomes[one.name], Stopped)}
    timings = timing.interleave(raced, copies, device=device, budget_s=budget_s)
    return {name: Raced(found, timings[name]) if name in raced else found for name, found in outcomes.items()}


def attempted(call: Callable[[], Result], *, ours: bool) -> Result | Stopped:
    """``call()``, or what stopped it: of a peer any error is a refusal, of ours ``UnsupportedError`` only.

    Too little memory is a refusal of anybody's: what runs on a larger device is not broken. torch says why an SDPA
    kernel does not apply in warnings, so those are part of the reason.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            return call()
        except (UnsupportedError, torch.OutOfMemoryError) as error:
            return Stopped(str(error), failed=False)
        except Exception as error:  # a contender may be anybody's code, and whatever stops it is its reason
            reason = " ".join([f"{type(error).__name__}: {error}", *(str(w.message) for w in caught)])
            return Stopped(reason, failed=ours)


def lost(device: torch.device) -> bool:
    """Whether a kernel broke the process's hold of the GPU (an illegal address does): every later call would fail."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def _checked(contenders: Sequence[Contender], device: torch.device) -> dict[str, Any]:
    outcomes = {}
    for contender in contenders:
        outcomes[contender.name] = outcome = attempted(contender.check, ours=contender.ours)
        if isinstance(outcome, Stopped) and lost(device):  # every other would fail too, by no fault of its own
            reason = f"was not raced, because {contender.name} broke the process's hold of the GPU"
            others = Stopped(reason, failed=False)
            return {one.name: outcome if one is contender else others for one in contenders}
    return outcomes
