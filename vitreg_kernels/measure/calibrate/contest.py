"""Which backend is to be the default of a call on this machine: of those that are right, the clearly fastest.

Times are by the wall clock, with all that the host does, of calls one after another as a model makes them: on a GPU
that is the device's time where the batch is large, and the host's where it is small.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ... import dispatch
from ...dispatch import Backend, Request, devices, preferences
from ...dispatch.calibration import LEAST_LEAD, Measurement
from ...ops._shared.capability import capability
from ...ops.catalogue import OPS
from .. import timing
from ..accuracy import Accuracy
from ..oracle import Call
from ..poison import copied
from ..race import Stopped, attempted, lost
from .judge import Judge, Verdict
from .subjects import Subject

# Slow times beside fast ones of the same backend, by device: above this, something else is using the machine. A shared
# CPU's own times, with nobody else on it, vary by up to 1.5.
MOST_SPREAD = {"cuda": 1.15, "cpu": 1.5}
ORACLE = "reference"  # what the others are held against does not race: it is slow, and holds N x N

_FAR_BEHIND = 3.0  # whoever never was within so many times the fastest in the warm-up is not raced
_SAMPLE_MS = 10.0  # of one sample at least: the clock and a neighbour's short visit count for little then
_MOST_CALLS_A_SAMPLE = 200
_MOST_COPIES = 64
_FEWEST_ROUNDS, _MOST_ROUNDS = 9, 200
_BUDGET_S = 0.8  # of a race


class Outcome(NamedTuple):
    """What came of one call.

    Attributes:
        subject: the call.
        gradients: with its backward, or without.
        request: what it asks of a backend.
        backend: what such a call is to take from now on.
        before: what it took.
        decided: whether the race was clear, so that ``backend`` is to be the default.
        quiet: whether its times can be trusted at all.
        reason: why it was not clear; empty if it was.
        times_ms: of a call, by backend, of those that were right.
        errors: of the tensor nearest to its bound, by backend.
        wrong: the backends that broke the accuracy rule, or broke, and what was wrong.
        refused: the backends that could not run, and why.
    """

    subject: Subject
    gradients: bool
    request: Request
    backend: str
    before: str
    decided: bool
    quiet: bool
    reason: str
    times_ms: Mapping[str, float]
    errors: Mapping[str, Accuracy]
    wrong: Mapping[str, str]
    refused: Mapping[str, str]

    @property
    def lead(self) -> float | None:
        """The next best's time beside the backend's own; ``None`` where it has no time, or no other has."""
        others = [ms for name, ms in self.times_ms.items() if name != self.backend]
        own = self.times_ms.get(self.backend)
        return min(others) / own if others and own else None


def request_of(subject: Subject, call: Call, gradients: bool, device: torch.device) -> Request:
    """What a user's call asks of a backend, told apart as measurements are."""
    workload = preferences.of_size(device, subject.tokens, subject.heads, gradients=gradients, variant=subject.variant)
    return call.request._replace(device=device.type, capability=capability(device), workload=workload)


def contest(subject: Subject, gradients: bool, device: torch.device) -> Outcome:
    """Judges every backend that may be the default of a call, and races those that are right.

    Raises:
        RuntimeError: if a backend broke the process's hold of the GPU; it is named.
    """
    request = request_of(subject, subject.make(gradients), gradients, device)
    before = dispatch.select(OPS[subject.op].backends, request, None).name
    outcome = Outcome(
        subject=subject,
        gradients=gradients,
        request=request,
        backend=before,
        before=before,
        decided=False,
        quiet=True,
        reason="",
        times_ms={},
        errors={},
        wrong={},
        refused={},
    )
    try:
        return _contested(outcome, device)
    except torch.OutOfMemoryError as error:
        return outcome._replace(quiet=False, reason=f"there is too little memory: {str(error).splitlines()[0]}")


def _contested(outcome: Outcome, device: torch.device) -> Outcome:
    judge = Judge(outcome.subject, outcome.gradients, device)
    before = outcome.before
    verdicts: dict[str, Verdict] = {}
    refused: dict[str, str] = {}
    for backend in dispatch.eligible(OPS[outcome.subject.op].backends, outcome.request):
        if backend.name == ORACLE:
            continue
        verdict = _judged(judge, backend, device)
        if isinstance(verdict, str):
            refused[backend.name] = verdict
        else:
            verdicts[backend.name] = verdict
    right = [name for name, verdict in verdicts.items() if not verdict.wrong]
    outcome = outcome._replace(
        errors={name: verdict.worst for name, verdict in verdicts.items() if verdict.worst is not None},
        wrong={name: verdict.wrong for name, verdict in verdicts.items() if verdict.wrong},
        refused=refused,
    )
    if not right:
        return outcome._replace(reason="no backend but the reference serves it and is right")
    race = run_race(judge.call, right, before, device)
    winner, objection = decide(race, before)
    if noise := unquiet(race, {before, *sorted(race.races[0], key=race.times_ms.__getitem__)[:2]}, device):
        outcome = outcome._replace(quiet=False)
        objection = "" if before in outcome.wrong else noise  # what is wrong is left, however unsure the times
    outcome = outcome._replace(times_ms=race.times_ms, reason=objection)
    return outcome if objection else outcome._replace(backend=winner, decided=True)


def measurement_of(outcome: Outcome, device: torch.device, date: str) -> Measurement | None:
    """What is written down of an outcome; ``None`` where its times cannot be trusted and nothing was wrong."""
    if not outcome.quiet and not outcome.wrong:
        return None
    subject = outcome.subject
    name = devices.gpu(device) if device.type == "cuda" else devices.kind(device.type, 0)
    key = preferences.key_of(outcome.request, name)
    return Measurement(
        op=key.op,
        device=key.device,
        dtype=key.dtype,
        width=key.width,
        tokens=subject.tokens,
        heads=subject.heads,
        gradients=outcome.gradients,
        variant=key.variant,
        features=key.features,
        backend=outcome.backend if outcome.decided else None,
        wrong=dict(outcome.wrong),
        times_ms=dict(outcome.times_ms) if outcome.quiet else {},
        errors={name: (worst.max_error, worst.eager_max_error) for name, worst in outcome.errors.items()},
        date=date,
    )


def _judged(judge: Judge, backend: Backend, device: torch.device) -> Verdict | str:
    """What was found of a backend, or why it could not run."""
    found = attempted(partial(judge.verdict, backend), ours=backend.opaque)
    if not isinstance(found, Stopped):
        return found
    if lost(device):
        raise RuntimeError(
            f"{backend.name} broke the process's hold of the GPU on {judge.call.request.op} ({found.reason}); what was "
            "measured before is kept"
        )
    return Verdict(f"broke: {found.reason}", None) if found.failed else found.reason


class Race(NamedTuple):
    """What two races gave.

    Attributes:
        single_ms: the fastest of a few single calls of each, in the warm-up.
        races: milliseconds a call in every round of each race, by backend, of those that were not far behind.
    """

    single_ms: Mapping[str, float]
    races: tuple[Mapping[str, Sequence[float]], ...]

    @property
    def times_ms(self) -> dict[str, float]:
        """Of each the mean of its medians, or else its time in the warm-up."""
        raced = {name: statistics.mean(statistics.median(its[name]) for its in self.races) for name in self.races[0]}
        return {**self.single_ms, **raced}


def decide(race: Race, before: str) -> tuple[str, str]:
    """The backend that won a race of those that are right, and what speaks against making it the default.

    Args:
        race: with at least one backend.
        before: what the call took until now; it is in the race, unless it was wrong or could not run. Then whoever is
            fastest takes its place.

    Returns:
        The winner, and one sentence, which is empty where it won clearly.
    """
    times = race.times_ms
    winner = min(race.races[0], key=times.__getitem__)
    if before not in times:
        return winner, ""
    if len(times) == 1:
        return winner, "no other backend serves this call and is right"
    rivals = [before] if winner != before else [name for name in race.races[0] if name != winner]
    for its in race.races:
        for rival in rivals:
            # In four rounds of five: two of a round were timed side by side.
            leads = [theirs / ours for theirs, ours in zip(its[rival], its[winner], strict=True)]
            lead = float(np.percentile(leads, 20))
            if lead < LEAST_LEAD:
                return winner, f"{winner} was no {LEAST_LEAD} times as fast as {rival} in a race, but {lead:.3f}"
    return winner, ""


def unquiet(race: Race, names: Collection[str], device: torch.device) -> str:
    """Whose times vary as they do not on a quiet machine, of some backends; empty if nobody's."""
    for its in race.races:
        for name in sorted(names & its.keys()):
            p20, p80 = np.percentile(its[name], (20, 80))
            if p80 / p20 > MOST_SPREAD[device.type]:
                return f"the times of {name} varied by {p80 / p20:.2f}: something else was using the machine"
    return ""


def run_race(call: Call, names: Sequence[str], before: str, device: torch.device) -> Race:
    """Races backends that can all run a call, twice; ``before``, where it is one of them, in any case."""
    size = sum(x.nbytes for x in tree_leaves(dict(call.arguments)) if isinstance(x, Tensor))
    count = math.ceil(2 * timing.last_level_cache(device) / max(size, 1))
    copies = [call, *(call.changed(copied) for _ in range(min(max(count, 2), _MOST_COPIES) - 1))]
    single_ms = {name: _single_ms(_calling(name, copies, 1, device)) for name in names}
    fastest = min(single_ms.values())
    calls = min(_MOST_CALLS_A_SAMPLE, max(1, math.ceil(_SAMPLE_MS / fastest)))
    racing = [name for name, ms in single_ms.items() if ms <= _FAR_BEHIND * fastest or name == before]
    variants = {name: timing.Variant(_calling(name, copies, calls, device)) for name in racing}
    a_round_ms = calls * sum(single_ms[name] for name in racing)
    rounds = min(_MOST_ROUNDS, max(_FEWEST_ROUNDS, math.ceil(1e3 * _BUDGET_S / a_round_ms)))
    races = []
    for _ in range(2):
        # By the clock of the host: each variant waits for its device.
        times = timing.in_rounds(variants, None, device=torch.device("cpu"), rounds=rounds)
        races.append({name: [ms / calls for ms in its] for name, its in times.items()})
    return Race(single_ms, tuple(races))


def _calling(name: str, copies: Sequence[Call], count: int, device: torch.device) -> Callable[[Any], None]:
    """Makes so many calls, one after another, and waits for the last."""
    turns = itertools.cycle(copies)

    def calls(_: Any = None) -> None:
        for call in itertools.islice(turns, count):
            call.run(name)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return calls


def _single_ms(call: Callable[[], None]) -> float:
    call()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return min(times)
