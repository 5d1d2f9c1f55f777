"""Accuracy of the backends on this machine, every case of every op: the measurement behind ``vitreg check``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from ..dispatch import Request, find
from ..ops._shared.capability import capability
from ..ops.catalogue import OPS
from .accuracy import Accuracy
from .cases import CASES
from .oracle import Oracle

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Result(NamedTuple):
    """One case on one backend.

    Attributes:
        op, backend, case, dtype: what ran.
        errors: by tensor (outputs, gradients, statistics); empty if there are none.
        reasons: why the backend does not serve the case.
        crash: what it raised although it said that it serves the case.
    """

    op: str
    backend: str
    case: str
    dtype: torch.dtype
    errors: dict[str, Accuracy]
    reasons: list[str]
    crash: str

    @property
    def failed(self) -> list[str]:
        """The tensors that break the accuracy rule, or what the backend raised."""
        broken = [name for name, accuracy in self.errors.items() if not accuracy.passed]
        return [*broken, *filter(None, [self.crash])]


def check(backends: Mapping[str, Sequence[str]], device: torch.device) -> Iterator[Result]:
    """Every case of some ops on every backend named, forward, backward and statistics; results come one by one.

    Args:
        backends: names by op.
        device: where to run.
    """
    for op, names in backends.items():
        for dtype in DTYPES:
            for call in CASES[op](dtype, device):
                oracle = None  # what no backend serves needs none
                for backend in names:
                    errors, crash = {}, ""
                    reasons = call.reasons_against(backend)
                    if not reasons:
                        oracle = oracle or Oracle(call)
                        try:
                            errors = oracle.errors(backend)
                        except Exception as error:  # whatever a kernel raises, the others are still to be checked
                            crash = f"{type(error).__name__}: {error}"
                    yield Result(op, backend, call.name, dtype, errors, reasons, crash)


def usable_backends(op: str, device: torch.device) -> tuple[str, ...]:
    """Backends of an op that can serve a plain fp32 call on a device, in the order of preference."""
    return tuple(b.name for b in OPS[op].backends if not reasons_against(op, b.name, device))


def reasons_against(op: str, backend: str, device: torch.device) -> list[str]:
    """Why a backend cannot serve even a plain fp32 call on a device, as sentences; empty if it can."""
    plain = Request(op, device.type, capability(device), torch.float32, head_dim=64, channels=64)
    return find(OPS[op].backends, backend).reasons_against(plain)
