"""Which backend serves a call. The same few rules for every op.

A backend declares what it can do as ``Requirements``; an op describes a call as a ``Request``; the reasons why the one
does not fit the other are sentences. Selection, ``explain``, the error messages, the tests and the support table of
``vitreg info`` are all made from these.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch


class UnsupportedError(RuntimeError):
    """No backend, or not the one that was named, can serve a call. The message lists the reasons."""


ANY_SIZE = (1, 2**31 - 1)


class Requirements(NamedTuple):
    """What a backend can serve.

    Attributes:
        devices: device types.
        dtypes: dtypes of the inputs.
        head_dims: smallest and largest head dim, of an op that has heads.
        features: features of a call beyond the plain one, such as ``"rope"``; each op lists its own.
        min_capability: oldest CUDA compute capability.
        channels: smallest and largest number of channels a token, of an op that takes whole tokens.
    """

    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    head_dims: tuple[int, int] = ANY_SIZE
    features: tuple[str, ...] = ()
    min_capability: tuple[int, int] = (0, 0)
    channels: tuple[int, int] = ANY_SIZE


class Request(NamedTuple):
    """What a call needs.

    Attributes:
        device: device type.
        capability: CUDA compute capability, ``(0, 0)`` elsewhere.
        dtype, head_dim: of the inputs; no head dim for an op that has no heads.
        features: what the call uses beyond the plain one.
        length_bucket: which of the lengths that measurements tell apart (``tuning.length_bucket``); ``"any"`` where
            nothing is measured, which is everywhere but on a GPU.
        channels: of a token, for an op that takes whole tokens.
    """

    device: str
    capability: tuple[int, int]
    dtype: torch.dtype
    head_dim: int | None = None
    features: tuple[str, ...] = ()
    length_bucket: str = "any"
    channels: int | None = None


class Backend(Protocol):
    """One way to compute an op."""

    NAME: str
    OPAQUE: bool
    REQUIREMENTS: Requirements

    def not_supported_reasons(self, request: Request) -> list[str]:
        """Why this backend cannot serve the call; empty if it can."""

    def not_default_reasons(self, request: Request) -> list[str]:
        """Why a call that names no backend does not get this one although it could serve it."""


class Explanation(NamedTuple):
    """Which backend a call takes and why not the others.

    Attributes:
        backend: name of the backend taken; ``None`` if there is none.
        reasons: for every other backend, why it is not taken.
    """

    backend: str | None
    reasons: dict[str, list[str]]

    def __str__(self) -> str:
        lines = [f"backend: {self.backend or 'none can serve this call'}"]
        lines += [f"  not {name}: {'; '.join(reasons)}" for name, reasons in self.reasons.items()]
        return "\n".join(lines)


def unmet(requirements: Requirements, request: Request) -> list[str]:
    """The declared requirements a call does not meet, as sentences."""
    reasons = []
    if request.device not in requirements.devices:
        reasons.append(f"runs on {_any_of(requirements.devices)}, not on {request.device}")
    elif request.capability < requirements.min_capability and request.device == "cuda":
        need, have = (".".join(map(str, c)) for c in (requirements.min_capability, request.capability))
        reasons.append(f"needs compute capability {need}, this GPU has {have}")
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
    """The named backend, or the first in order that supports the call and may be a default.

    Raises:
        ValueError: if no backend has that name.
        UnsupportedError: if the named backend, or every backend, cannot serve the call.
    """
    # Reasons never change within a process, so calls alike cost one look-up; the compiler traces through the choice.
    return (_select if torch.compiler.is_compiling() else _select_cached)(backends, request, name)


def _select(backends: tuple[Backend, ...], request: Request, name: str | None) -> Backend:
    if name is None:
        for backend in backends:
            if not backend.not_supported_reasons(request) and not backend.not_default_reasons(request):
                return backend
        reasons = {b.NAME: b.not_supported_reasons(request) or b.not_default_reasons(request) for b in backends}
        listing = "; ".join(f"{name}: {', '.join(why)}" for name, why in reasons.items())
        raise UnsupportedError(f"no backend can serve this call by default ({listing})")
    backend = find(backends, name)
    reasons = backend.not_supported_reasons(request)
    if reasons:
        raise UnsupportedError(
            f"backend {name!r} cannot serve this call: {'; '.join(reasons)}. Leave backend=None to take one that can"
        )
    return backend


_select_cached = lru_cache(maxsize=1024)(_select)


def find(backends: tuple[Backend, ...], name: str) -> Backend:
    """The backend of that name.

    Raises:
        ValueError: if there is none.
    """
    for backend in backends:
        if name == backend.NAME:
            return backend
    raise ValueError(f"unknown backend {name!r}: expected None or one of {', '.join(repr(b.NAME) for b in backends)}")


def explain(backends: tuple[Backend, ...], request: Request, name: str | None) -> Explanation:
    """What ``select`` would take, and every other backend's reasons."""
    try:
        taken = select(backends, request, name).NAME
    except UnsupportedError:
        taken = None
    reasons = {}
    for backend in backends:
        if taken != backend.NAME:
            why = backend.not_supported_reasons(request) or backend.not_default_reasons(request)
            reasons[backend.NAME] = why or [f"{name} was named" if name else f"{taken} comes first"]
    return Explanation(taken, reasons)


def _any_of(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
