"""Whether a backend can serve a call, and which one is taken. The same few rules for every op.

A backend declares what it can do as ``Requirements``; an op describes a call as a ``Request``; the reasons why the one
does not fit the other are sentences. Selection, ``explain``, the error messages, the tests and the support table of
``vitreg info`` are all made from these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch

from ..errors import UnsupportedError
from . import devices, preferences
from .request import ANY_CAPABILITY, Request, Requirements


def _no_faults() -> list[str]:
    return []


def _no_objection(request: Request) -> list[str]:
    return []


def _not_switched_off() -> str:
    return ""


@dataclass(frozen=True, eq=False, kw_only=True)
class Backend:
    """One way to compute an op.

    Attributes:
        name: what ``backend=`` takes.
        requirements: what it can serve.
        forward: computes the op; each op says what it takes and gives.
        backward: fills the gradients of an opaque ``forward``; ``None`` where autograd differentiates ``forward``, or
            where there is nothing to differentiate.
        opaque: whether it runs behind the op's torch.library ops, because ``forward`` is no torch code.
        default: what a call that names no backend makes of it: ``"yes"`` takes it in its turn, ``"if measured"`` only
            where a table names it, ``"never"`` not at all.
        faults: why it cannot run in this process at all; empty if it can. Does not change within a process.
        refuses: what it has against a request beyond its requirements; empty if nothing.
        switched_off: why the user's own settings leave it to calls that name it; empty if they do not. May change at
            any time.
    """

    name: str
    requirements: Requirements
    forward: Callable[..., Any]
    backward: Callable[..., None] | None = None
    opaque: bool = False
    default: Literal["yes", "if measured", "never"] = "yes"
    faults: Callable[[], list[str]] = _no_faults
    refuses: Callable[[Request], list[str]] = _no_objection
    switched_off: Callable[[], str] = _not_switched_off

    def reasons_against(self, request: Request) -> list[str]:
        """Why this backend cannot serve the call, as sentences; empty if it can."""
        reasons = unmet(self.requirements, request)
        if request.device in self.requirements.devices:
            reasons += self.faults()
        return reasons + self.refuses(request)


class Explanation(NamedTuple):
    """Which backend a call takes and why not the others.

    Attributes:
        backend: name of the backend taken; ``None`` if there is none.
        reasons: for every other backend, why it is not taken.
        decided_by: what chose it among those that can serve the call: its name, a table and when it was measured, or
            the declared order.
    """

    backend: str | None
    reasons: dict[str, list[str]]
    decided_by: str

    def __str__(self) -> str:
        first = "none can serve this call" if self.backend is None else f"{self.backend}, by {self.decided_by}"
        lines = [f"backend: {first}"]
        lines += [f"  not {name}: {'; '.join(reasons)}" for name, reasons in self.reasons.items()]
        return "\n".join(lines)


def unmet(requirements: Requirements, request: Request) -> list[str]:
    """The declared requirements a call does not meet, as sentences."""
    reasons = []
    oldest, newest = requirements.capabilities
    if request.device not in requirements.devices:
        reasons.append(f"runs on {_any_of(requirements.devices)}, not on {request.device}")
    elif request.device == "cuda" and not oldest <= request.capability <= newest:
        reasons.append(f"runs on {_capabilities(oldest, newest)}, not on sm_{request.capability}")
    if request.dtype not in requirements.dtypes:
        reasons.append(f"takes {_any_of([_name(d) for d in requirements.dtypes])}, not {_name(request.dtype)}")
    for what, size, (low, high) in (
        ("head dims", request.head_dim, requirements.head_dims),
        ("channel counts", request.channels, requirements.channels),
    ):
        if size is not None and not low <= size <= high:
            reasons.append(f"takes {what} {low} to {high}, not {size}")
    reasons += [f"does not support {f}" for f in request.features if f not in requirements.features]
    return reasons


def select(backends: tuple[Backend, ...], request: Request, name: str | None) -> Backend:
    """The named backend, or the preferred one of those that can serve the call.

    Preferred is what a table names (``preferences.measured``: the user's before the shipped one), or else the first in
    order that may be a default without having been measured. One that the user switched off is taken by its name alone.

    Raises:
        ValueError: if no backend has that name.
        UnsupportedError: if the named backend, or every backend, cannot serve the call.
    """
    # Reasons and tables never change within a process, so calls alike cost one look-up. The compiler traces through
    # the choice, and could not trace a cache.
    taken = (_select if torch.compiler.is_compiling() else select_cached)(backends, request, name)
    return instead_of(taken, backends, request) if name is None and taken.switched_off() else taken


def instead_of(backend: Backend, backends: tuple[Backend, ...], request: Request) -> Backend:
    """What a call that names no backend takes where the one that it would take is not to be had.

    Raises:
        UnsupportedError: if every other backend cannot serve the call.
    """
    return select(tuple(b for b in backends if b is not backend), request, None)


def _select(backends: tuple[Backend, ...], request: Request, name: str | None) -> Backend:
    if name is not None:
        backend = find(backends, name)
        reasons = backend.reasons_against(request)
        if reasons:
            raise UnsupportedError(
                f"backend {name!r} cannot serve this call: {'; '.join(reasons)}. Leave backend=None to take one that "
                "can"
            )
        return backend
    measured = preferences.measured(request)
    # Nobody else is asked: the question may load a library, or run a kernel of it.
    candidates = tuple(b for b in backends if b.default == "yes" or (measured and b.name == measured.backend))
    able = eligible(candidates, request)
    wrong = preferences.wrong(request)
    able = [b for b in able if b.name not in wrong] or able
    if measured is not None:
        for backend in able:
            if backend.name == measured.backend:
                return backend
    for backend in able:
        if backend.default == "yes":
            # The compiler would trace what is said once a process.
            if not torch.compiler.is_compiling() and any(_may_be_measured(b, request) for b in backends):
                preferences.suggest_calibration(request.device)
            return backend
    reasons = {b.name: b.reasons_against(request) or [_not_by_default(b, request)] for b in backends}
    listing = "; ".join(f"{name}: {', '.join(why)}" for name, why in reasons.items())
    raise UnsupportedError(f"no backend can serve this call by default ({listing})")


select_cached = lru_cache(maxsize=1024)(_select)


def eligible(backends: tuple[Backend, ...], request: Request) -> list[Backend]:
    """The backends that may be the default of such a call, in the declared order."""
    return [
        b
        for b in backends
        if b.default != "never" and not _only_if_named(b, request) and not b.reasons_against(request)
    ]


def read_calibration() -> None:
    """Choose from now on by what the user's file of measurements says now."""
    preferences.read_calibration()
    select_cached.cache_clear()


def find(backends: tuple[Backend, ...], name: str) -> Backend:
    """The backend of that name.

    Raises:
        ValueError: if there is none.
    """
    for backend in backends:
        if name == backend.name:
            return backend
    raise ValueError(f"unknown backend {name!r}: expected None or one of {', '.join(repr(b.name) for b in backends)}")


def explain(backends: tuple[Backend, ...], request: Request, name: str | None) -> Explanation:
    """What ``select`` would take, what decided that, and every other backend's reasons."""
    try:
        taken = select(backends, request, name).name
    except UnsupportedError:
        taken = None
    row = None if name else preferences.measured(request)
    if name:
        decided_by = "its name"
    elif row is not None and row.backend == taken:
        decided_by = f"{row.table}, measured {row.date}"
    else:
        ignored = preferences.ignored(request)
        decided_by = f"the declared order ({ignored})" if ignored else "the declared order"
    reasons = {b.name: _reasons_against(b, request, name, taken, row) for b in backends if b.name != taken}
    return Explanation(taken, reasons, decided_by)


def _reasons_against(
    backend: Backend, request: Request, name: str | None, taken: str | None, row: preferences.Measured | None
) -> list[str]:
    """Why a backend is not the one taken."""
    if reasons := backend.reasons_against(request):
        return reasons
    if name:
        return [f"{name} was named"]
    if _only_if_named(backend, request):
        return [_not_by_default(backend, request)]
    if said := backend.switched_off():
        return [said]
    if said := preferences.wrong(request).get(backend.name):
        return [f"was wrong on this machine by your calibration: {said}"]
    if row is not None and row.backend == taken:
        return [f"{row.table} names {taken} for such a call; name this one to use it"]
    if backend.default == "yes":
        return [f"{taken} comes first"]
    return [_not_by_default(backend, request)]


def _may_be_measured(backend: Backend, request: Request) -> bool:
    """Whether a measurement could make a backend the default of such a call, by what it declares."""
    return backend.default == "if measured" and not unmet(backend.requirements, request)


def _only_if_named(backend: Backend, request: Request) -> list[str]:
    """Features of a call with which a backend that serves them is no default."""
    return [feature for feature in backend.requirements.features_if_named if feature in request.features]


def _not_by_default(backend: Backend, request: Request) -> str:
    """Why a backend that can serve a call is not taken without having been named, or measured."""
    if only := _only_if_named(backend, request):
        return f"serves {', '.join(only)} only if it is named"
    if backend.default == "never":
        return "is never the default; name it to use it"
    if (row := preferences.measured(request)) is not None:
        return f"{row.table} names {row.backend} for such a call, which cannot serve it here; name this one to use it"
    device = devices.kind(request.device, request.capability)
    return f"has not been measured on {device} for such a call yet; name it to use it"


def _capabilities(oldest: int, newest: int) -> str:
    if oldest == newest:
        return f"sm_{oldest}"
    return f"sm_{oldest} and newer" if newest == ANY_CAPABILITY[1] else f"sm_{oldest} to sm_{newest}"


def _any_of(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
