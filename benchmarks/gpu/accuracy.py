"""Every backend on every named shape against fp64, forward, backward and outputs, twice, in poisoned memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Literal, NamedTuple, TypedDict, get_args

import torch
from torch import Tensor

from benchmarks import results
from benchmarks.gpu import BACKENDS, pieces, warm
from benchmarks.gpu.stage import Rehearsal, Setup
from benchmarks.machine import Machine
from benchmarks.results import Errors, Row, Writer
from benchmarks.shapes import LENGTHS
from vitreg_kernels import UnsupportedError, functional
from vitreg_kernels.measure.accuracy import Accuracy, same_bits
from vitreg_kernels.measure.cases import attention
from vitreg_kernels.measure.oracle import Call, Oracle, Tensors
from vitreg_kernels.measure.poison import guarded, poisoned
from vitreg_kernels.measure.race import lost
from vitreg_kernels.ops.attention.types import OUTPUT_NAMES

NAME = "accuracy"
SECONDS = 60.0
LONGEST = 20.0

Precision = Literal["bf16", "fp16", "fp32", "tf32"]  # tf32: fp32 inputs, and the user allows tf32 products

_DTYPES: dict[Precision, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "tf32": torch.float32,
}
# Beside cases of a few heads, some of many: kernels may choose their programs by the number.
_MANY_TOKENS, _MANY_NAME = (54, 201, 261), "{} tokens, 33 images of 16 heads"
_GOALS = {f"{n} tokens" for n in LENGTHS} | {_MANY_NAME.format(n) for n in _MANY_TOKENS}


class AccuracyRow(TypedDict):
    """One case on one backend. Tensors are named as by the oracle, those of plain calls after their way.

    A case runs in three ways: with every output and gradients; "training", packed with gradients; and "inference",
    packed without, as a model calls it.
    """

    kind: Literal["accuracy"]
    backend: str
    case: str
    dtype: Precision
    reasons: list[str]  # why the backend does not serve the case; empty if it does
    crash: str | None  # what it raised although it says that it serves the case
    deterministic: bool | None  # two runs gave the same bits; None if it did not run
    seconds: float  # with compilation
    errors: dict[str, Errors] | None
    machine: Machine


results.ROW_TYPES["accuracy"] = AccuracyRow


class _Piece(NamedTuple):
    call: Call
    dtype: Precision

    def __str__(self) -> str:
        return f"{self.call.name} in {self.dtype}"


def run(setup: Setup, writer: Writer) -> Iterator[Row]:
    """One row for each backend in each case: dtype by dtype, of each the cases of the goals first."""
    every = _pieces(setup)
    undone = [(number, piece) for number, piece in enumerate(every, 1) if _missing(setup, writer, piece)]
    for number, piece in warm.ahead(undone, lambda numbered: _rehearse(numbered[1]), setup):
        if setup.expired:
            return
        print(f"    {number}/{len(every)} {piece}", flush=True)
        with pieces.begun(setup, writer, NAME, piece), _products(piece.dtype):
            rows = writer.extend(_judged(piece, _missing(setup, writer, piece), setup.device))
            for row in rows:
                for sentence in wrong(row, _opaque()):
                    print(f"      FAIL {sentence}", flush=True)
            yield from rows


def rehearsals(setup: Setup) -> Iterator[Rehearsal]:
    """The calls of our own kernels."""
    return (partial(_rehearse, piece) for piece in _pieces(setup))


def failures(rows: list[Row]) -> list[str]:
    """Tensors that break the rule, crashes, opaque backends whose bits change, and those that served nothing at all."""
    return all_wrong([row for row in rows if row["kind"] == "accuracy"], _opaque())


def all_wrong(rows: list[Row], opaque: set[str]) -> list[str]:
    """What is wrong with rows of accuracy, of which ``opaque`` backends are our own kernels."""
    sentences = [sentence for row in rows for sentence in wrong(row, opaque)]
    for name in dict.fromkeys(row["backend"] for row in rows):
        its = [row for row in rows if row["backend"] == name]
        if name in opaque and all(row["reasons"] for row in its):
            sentences.append(f"{name} served no case: {'; '.join(its[0]['reasons'])}")
    return sentences


def unfinished(setup: Setup, writer: Writer) -> int:
    """Cases in a dtype that lack a backend's row."""
    return sum(bool(_missing(setup, writer, piece)) for piece in _pieces(setup))


def _backends(setup: Setup) -> list[str]:
    """All but the reference, which is what the others are held against; our own kernels first."""
    backends = sorted(BACKENDS, key=lambda backend: not backend.opaque)
    devices = {backend.name: backend.requirements.devices for backend in backends}
    return [name for name, those in devices.items() if name != "reference" and setup.device.type in those]


def _opaque() -> set[str]:
    return {backend.name for backend in BACKENDS if backend.opaque}


def _missing(setup: Setup, writer: Writer, piece: _Piece) -> list[str]:
    """Backends without a row; none of a case that broke."""
    if pieces.broken(writer, NAME, piece):
        return []
    judged = writer.find(kind="accuracy", case=piece.call.name, dtype=piece.dtype)
    return [name for name in _backends(setup) if name not in {row["backend"] for row in judged}]


def _pieces(setup: Setup) -> list[_Piece]:
    by_dtype = ([_Piece(call, dtype) for call in _calls(_DTYPES[dtype], setup)] for dtype in get_args(Precision))
    return [piece for its in by_dtype for piece in sorted(its, key=lambda piece: piece.call.name not in _GOALS)]


def _calls(dtype: torch.dtype, setup: Setup) -> Iterator[Call]:
    generator = torch.Generator(setup.device).manual_seed(1)
    full = partial(attention.call, outputs=OUTPUT_NAMES, num_prefix_tokens=5)

    def qkv(batch: int, tokens: int, heads: int, head_dim: int) -> Tensor:
        shape = (batch, tokens, 3, heads, head_dim)
        return torch.randn(shape, generator=generator, device=setup.device).to(dtype)

    def pack(name: str, lengths: list[int], heads: int, head_dim: int) -> Call:
        bounds = torch.tensor([0, *lengths]).cumsum(0).to(setup.device, torch.int32)
        return full(qkv(1, sum(lengths), heads, head_dim), name=name, cu_seqlens=bounds)

    if setup.dry:
        yield full(qkv(1, 21, 1, 16), name="21 tokens")
        yield pack("21 + 7 tokens, packed", [21, 7], 1, 16)
        return
    yield from attention.calls(dtype, setup.device)
    for tokens in _MANY_TOKENS:
        yield full(qkv(33, tokens, 16, 64), name=_MANY_NAME.format(tokens))
    for tokens in (261, 1029):
        yield full(qkv(1, tokens, 2, 128), name=f"{tokens} tokens, head dim 128")
    yield pack("2 x 261 + 8 x 54 tokens, packed", [261] * 2 + [54] * 8, 2, 64)


def _judged(piece: _Piece, backends: list[str], device: torch.device) -> Iterator[Row]:
    """Rows without their ``machine``; none after one whose crash took the GPU along."""
    oracle = Oracle(piece.call.changed(guarded))
    for backend in backends:
        start = time.monotonic()
        found, crash, deterministic = None, None, None
        reasons = piece.call.reasons_against(backend)
        # The poison is torch's deterministic mode, in which torch has fewer kernels of its own.
        poison = poisoned(device) if backend in _opaque() else nullcontext()
        if not reasons:
            try:
                with poison:
                    first, second = (_every_way(backend, oracle.call, oracle.run) for _ in range(2))
                    deterministic = all(same_bits(first[way][name], second[way][name]) for way, name in _names(first))
                    found = {way: oracle.compare(tensors) for way, tensors in first.items()}
            except UnsupportedError as error:  # what only the tensors tell
                reasons = [str(error)]
            except Exception as error:  # whatever a kernel raises, the other cases are still to be judged
                crash = f"{type(error).__name__}: {error}"
        yield {
            "kind": "accuracy",
            "backend": backend,
            "case": piece.call.name,
            "dtype": piece.dtype,
            "reasons": reasons,
            "crash": crash,
            "deterministic": deterministic,
            "seconds": time.monotonic() - start,
            "errors": None if found is None else _errors(found),
        }
        if crash and lost(device):
            return


def _rehearse(piece: _Piece) -> None:
    """The calls of our own kernels."""
    with _products(piece.dtype):
        call = piece.call.changed(guarded)
        for backend in _opaque():
            if not call.reasons_against(backend):
                _every_way(backend, call, call.run)


def _every_way(backend: str, call: Call, run: Callable[[str], Tensors]) -> dict[str, Tensors]:
    return {
        "": run(backend),
        "training ": _packed(backend, call, backward=True),
        "inference ": _packed(backend, call, backward=False),
    }


def _packed(backend: str, call: Call, *, backward: bool) -> Tensors:
    """From packed qkv without outputs, as a model calls it; tensors as ``[B, H, N, D]``, as the oracle has them."""
    options = {**call.arguments, "outputs": ()}
    qkv, grad_output = options.pop("qkv"), options.pop("grad_output")
    qkv = qkv.detach().requires_grad_(backward)
    output = functional.register_attention_qkv(qkv, backend=backend, **options)
    heads_first = output.detach().unflatten(-1, qkv.shape[3:]).transpose(1, 2)
    if not backward:
        return {"output": heads_first}
    (grad_qkv,) = torch.autograd.grad(output, qkv, grad_output.transpose(1, 2).flatten(2))
    gradients = grad_qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return {"output": heads_first, **dict(zip(attention.GRADIENTS, gradients, strict=True))}


def _names(ways: dict[str, Tensors]) -> list[tuple[str, str]]:
    return [(way, name) for way, tensors in ways.items() for name in tensors]


def _errors(ways: dict[str, dict[str, Accuracy]]) -> dict[str, Errors]:
    return {way + name: results.errors(error) for way, errors in ways.items() for name, error in errors.items()}


@contextmanager
def _products(dtype: Precision) -> Iterator[None]:
    """Whether fp32 products, the reference's and the kernels' alike, may be of tf32."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def wrong(row: Row, opaque: set[str]) -> list[str]:
    """What is wrong with one row."""
    named = _named(row)
    sentences = [
        f"{named}: {off(tensor, error)}" for tensor, error in (row["errors"] or {}).items() if not error["passed"]
    ]
    if row["crash"]:
        sentences.append(f"{named}: {row['crash'].strip().splitlines()[0]}")
    if row["deterministic"] is False and row["backend"] in opaque:
        sentences.append(f"{named}: two runs differ in bits")
    return sentences


def off(tensor: str, error: Errors) -> str:
    """How far a tensor that breaks the rule is off."""
    return (
        f"{tensor} is {error['max']:.3g} off (mean {error['mean']:.3g}), "
        f"the eager formula {error['eager_max']:.3g} (mean {error['eager_mean']:.3g})"
    )


def _named(row: Row) -> str:
    return f"{row['backend']} on {row['case']} in {row['dtype']}"
