"""The race of residual norms: residual, its norm and the length of each token, by every contender, interleaved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from benchmarks import machine, memory, results
from benchmarks.attention import Progress
from benchmarks.contest import Copy, compete
from benchmarks.machine import Machine
from benchmarks.memory import Memory
from benchmarks.peers import Attend, Peer, Tensors, interpreter_reason, norms
from benchmarks.results import Errors, Row, Writer
from benchmarks.shapes import DTYPES, DType, Size
from vitreg_kernels.measure import accuracy, timing
from vitreg_kernels.measure.cases.residual_norm import INPUTS, terms

Mode = Literal["forward", "backward"]

MODES: tuple[Mode, ...] = ("forward", "backward")
CHANNELS = (384, 768, 1024, 1536)  # of ViT-S, B, L and g
BATCH, TOKENS = 64, 261
# Forward reads x and the branch and writes the residual and its norm; backward reads the two upstream gradients, the
# residual and the branch and writes the gradients of x and the branch.
_TENSORS: dict[Mode, int] = {"forward": 4, "backward": 6}
# Seconds of timing a case, shared by its contenders.
_BUDGET_S: dict[Size, float] = {"quick": 0.5, "full": 5.0}
_COPY_BUDGET_S = 0.05
_OUTPUTS = ("residual", "normalized", "token_norms")


class ResidualNormRow(results.HostTime):
    """One contender in one case. One not raced has ``None`` for everything measured."""

    kind: Literal["residual_norm"]
    variant: str
    ours: bool  # a backend of vitreg_kernels; the others are its peers
    reason: str | None  # why it was not raced, in its own words; None if it was
    failed: bool  # it is ours and broke; any other reason is a refusal
    norm: Literal["LayerNorm", "RMSNorm"]
    dtype: DType
    mode: Mode
    batch: int
    tokens: int
    channels: int
    memory: Memory  # that results are in
    bytes: int  # useful traffic
    copy_gbps: float  # read and written, of a copy of the case's own x and branch into memory that is there
    median_ms: float | None
    p20_ms: float | None
    p80_ms: float | None
    samples: int | None
    gbps: float | None  # GB/s at the median
    copy_fraction: float | None  # gbps / copy_gbps
    best_peer: str | None  # the fastest peer of the case
    speedup: float | None  # best peer's median / this median: above 1 is faster than every peer
    errors: dict[str, Errors] | None  # of the three outputs; of a backward, of the gradient of each input too
    machine: Machine


results.ROW_TYPES["residual_norm"] = ResidualNormRow


@dataclass(frozen=True)
class Case:
    """What stands between two branches of a block, with LayerScale and no drop path."""

    channels: int
    dtype: DType
    mode: Mode
    rms: bool = False
    batch: int = BATCH
    tokens: int = TOKENS
    memory: Memory = "any"

    @property
    def bytes(self) -> int:
        """Bytes that must move if each ``[B, N, C]`` tensor moves once; statistics and parameters are left out."""
        elements = self.batch * self.tokens * self.channels
        return _TENSORS[self.mode] * elements * DTYPES[self.dtype].itemsize

    @property
    def norm(self) -> str:
        """Its name."""
        return "RMSNorm" if self.rms else "LayerNorm"

    def __str__(self) -> str:
        return f"{self.norm} C={self.channels} {self.dtype} {self.mode}, {memory.IN_WORDS[self.memory]}"


def cases(device: torch.device) -> list[Case]:
    """Every width, dtype and mode, by kind of memory. RMSNorm is there for xformers, which needs a GPU."""
    norms = (False, True) if device.type == "cuda" else (False,)
    return [
        Case(c, dtype, mode, rms, memory=kind)
        for rms in norms
        for kind in memory.choices(device)
        for c in CHANNELS
        for dtype in DTYPES
        for mode in MODES
    ]


def run(size: Size, writer: Writer, progress: Progress, device: torch.device | None = None) -> Iterator[Row]:
    """Races every contender over the cases and yields the rows, case by case, once they are written.

    Resumption and ``progress`` are as of ``attention.run``.
    """
    device = device or machine.default_device()
    todo = cases(device)
    for done, case in enumerate(todo):
        progress(done, len(todo), str(case))
        raced = rows_of(writer, case)
        if raced:
            yield from raced
            continue
        contenders = [p.unless(interpreter_reason) if p.name in norms.OPAQUE else p for p in norms.peers(rms=case.rms)]
        copies = timing.copies_past_cache(inputs_of(case, device), device)
        yield from writer.extend(race(case, contenders, copies, _BUDGET_S[size]))
    progress(len(todo), len(todo), "")


def rows_of(writer: Writer, case: Case) -> list[Row]:
    """The rows of a case."""
    fields = ("norm", "dtype", "mode", "batch", "tokens", "channels", "memory")
    return writer.find(kind="residual_norm", **{field: getattr(case, field) for field in fields})


def race(case: Case, contenders: Sequence[Peer], copies: Sequence[Copy], budget_s: float) -> list[Row]:
    """One row for each contender, raced or not, without its ``machine``."""
    device = copies[0][0].device
    with memory.kept() if case.memory == "kept" else nullcontext():
        before = _copy_gbps(copies, device)
        rows = compete(contenders, copies, budget_s, _check(case, copies[0]), partial(_variant, case), case.bytes)
        copy_gbps = max(before, _copy_gbps(copies, device))
    about = {
        "kind": "residual_norm",
        "norm": case.norm,
        "dtype": case.dtype,
        "mode": case.mode,
        "batch": case.batch,
        "tokens": case.tokens,
        "channels": case.channels,
        "memory": case.memory,
        "bytes": case.bytes,
        "copy_gbps": copy_gbps,
    }
    return [{**about, **row, "copy_fraction": None if row["gbps"] is None else row["gbps"] / copy_gbps} for row in rows]


def _copy_gbps(copies: Sequence[Copy], device: torch.device) -> float:
    """The ceiling: of the same tensors, as their speed depends on where the system has put them."""
    targets = [torch.empty_like(x.detach()) for x in copies[0][:2]]

    def copy(inputs: Copy) -> None:
        for target, x in zip(targets, inputs, strict=False):
            target.copy_(x.detach())

    moved = 2 * sum(target.nbytes for target in targets)
    timings = timing.interleave({"copy": timing.Variant(copy)}, copies, device=device, budget_s=_COPY_BUDGET_S)
    return moved / timings["copy"].median_ms / 1e6


def inputs_of(case: Case, device: torch.device) -> Callable[[], Copy]:
    """Makes copies of one call: its inputs, and ``[2, B, N, C]`` gradients of the residual and the normalized tokens.

    All are normal, but that LayerScale and the weight are about 1. A forward has no gradients, and holds none.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, mean: float = 0.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) + mean).to(DTYPES[case.dtype])

    backward = case.mode == "backward"
    tokens, channels = (case.batch, case.tokens, case.channels), case.channels
    parameters = [normal(channels, mean=1.0), normal(channels, mean=1.0), *([] if case.rms else [normal(channels)])]
    inputs = [normal(*tokens), normal(*tokens), *parameters]
    upstream = normal(2, *tokens) if backward else normal(2, 0)
    return lambda: (*(x.clone().requires_grad_(backward) for x in inputs), upstream.clone())


def job(attend: Attend, *tensors: Tensor) -> Tensors:
    """What a call gives and, if its inputs want gradients, those; ``tensors`` are a copy of ``inputs_of``."""
    *inputs, upstream = tensors
    outputs = attend(*inputs)
    found = {name: x.detach() for name, x in zip(_OUTPUTS, outputs, strict=True)}
    if inputs[0].requires_grad:
        gradients = torch.autograd.grad(outputs[:2], inputs, upstream.unbind(0))
        found |= {f"grad_{name}": gradient for name, gradient in zip(INPUTS, gradients, strict=False)}
    return found


def _check(case: Case, copy: Copy) -> Callable[..., dict[str, Errors]]:
    """Errors on the first and the last image, the only ones that upstream gradients arrive at.

    So sums over all tokens are sums over theirs, and need no fp64 of a whole batch.
    """
    *inputs, upstream = copy
    masked = upstream.clone()
    masked[:, 1:-1] = 0.0
    few = [*(_first_and_last(x) for x in inputs), masked[:, :: max(masked.shape[1] - 1, 1)]]
    reference = partial(norms.ours_by, "reference", rms=case.rms)
    exact, rounded = job(reference, *(x.double() for x in few)), job(reference, *few)

    def check(attend: Attend, *tensors: Tensor) -> dict[str, Errors]:
        found = job(attend, *tensors[:-1], masked)
        return {
            name: results.errors(
                accuracy.compare(
                    _first_and_last(x),
                    exact[name],
                    rounded[name],
                    terms=terms((2, case.tokens, case.channels), name),
                )
            )
            for name, x in found.items()
        }

    return check


def _first_and_last(x: Tensor) -> Tensor:
    """The first and the last image, which may be one, of what has images."""
    return x[:: max(len(x) - 1, 1)] if x.ndim > 1 else x


def _variant(case: Case, peer: Peer) -> timing.Variant:
    def context() -> AbstractContextManager[object]:
        if case.memory == "fresh":
            memory.give_back()
        return peer.context()

    if case.mode == "forward":
        return timing.Variant(lambda copy: peer.attend(*copy[:-1]), context)

    def prepare(copy: Copy) -> tuple[Sequence[Tensor], list[Tensor], tuple[Tensor, ...]]:
        *inputs, upstream = copy
        return peer.attend(*inputs)[:2], inputs, upstream.unbind(0)

    return timing.Variant(lambda prepared: torch.autograd.grad(*prepared), context, prepare)
