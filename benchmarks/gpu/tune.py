"""Tiles of the Triton attention kernels: what beats the present choice here goes into this architecture's configs file.

A kernel is timed alone, on the arguments it had in a real forward and backward. First the shapes race, at two stages;
then the best of them at other numbers of stages. Whatever would spill or exceeds the shared memory is left out before
anything runs, so the compiler, in as many processes as there are cores, takes most of the time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict, get_args, get_type_hints
from unittest import mock

import torch
from torch import Tensor

from benchmarks import results
from benchmarks.gpu import pieces
from benchmarks.gpu.stage import Rehearsal, Setup, sentence
from benchmarks.machine import Machine
from benchmarks.results import Row, Writer
from benchmarks.shapes import DTYPES, HEAD_DIM, NUM_PREFIX_TOKENS, DType
from vitreg_kernels import explain, functional
from vitreg_kernels._triton import mode
from vitreg_kernels._triton.launch import Launch
from vitreg_kernels._triton.replay import recording
from vitreg_kernels.dispatch import tables
from vitreg_kernels.measure import timing, warm
from vitreg_kernels.measure.cases import attention
from vitreg_kernels.measure.oracle import Oracle
from vitreg_kernels.measure.race import lost
from vitreg_kernels.ops._shared.capability import tuned_for
from vitreg_kernels.ops.attention.backends import triton
from vitreg_kernels.ops.attention.backends.triton import tiles as tuning
from vitreg_kernels.ops.attention.backends.triton.tiles import Tiles
from vitreg_kernels.ops.attention.types import AttentionInputs

NAME = "tune"
SECONDS = 120.0
LONGEST = 600.0

GAIN = 1.02  # how many times as fast as the present choice, at every length
_FINALISTS = 3
_TIMING_BUDGET_S = {False: 0.6, True: 0.0}  # a race at one length, by whether the run is dry
# What a call must ask for so that a kernel is launched at all.
_OUTPUTS: dict[str, tuple[str, ...]] = {"statistics": ("received_attention",)}
_LENGTHS = (261, 201), (1029, 1374), (54,)  # the most important first; those of one entry of the table together
# (batch, heads) by tokens; at head dim 128 half the heads.
_BATCH_AND_HEADS = {54: (256, 16), 201: (64, 16), 261: (64, 16), 1029: (16, 16), 1374: (16, 16)}
_WHOLE_HEAD_TOKENS = (65, 272)  # shorter ones are one tile, longer ones too much work for one program

TilesRow = TypedDict("TilesRow", get_type_hints(Tiles))


class TuningRow(TypedDict):
    """The sweep of one kernel at one size. Lists are by ``tokens``; what was not found or not measured is ``None``."""

    kind: Literal["tuning"]
    kernel: str
    head_dim: int
    tokens: list[int]  # the lengths measured, which stand for all that the table does not tell apart
    dtype: DType
    size: str  # what the row of the table decides for, in words
    reason: str | None  # why there was nothing to sweep, in its own words
    failed: bool  # it broke
    rule: list[TilesRow] | None  # the present choice
    best: TilesRow | None  # what replaces it; None if nothing is better
    rule_ms: list[float] | None
    best_ms: list[float] | None  # in the same race
    speedup: float | None  # the least over the lengths
    timed: int  # how many tiles
    left_out: int  # how many that spill, exceed the shared memory, or that the compiler or the GPU refuses
    wrong: list[str]  # tiles that are faster and break the accuracy rule, with what they break
    machine: Machine


results.ROW_TYPES["tuning"] = TuningRow


class Piece(NamedTuple):
    """One kernel at one size."""

    kernel: tuning.AttentionKernel
    head_dim: int
    tokens: tuple[int, ...]
    dtype: DType

    def __str__(self) -> str:
        return f"{self.kernel}, D = {self.head_dim}, N = {' and '.join(map(str, self.tokens))}"

    @property
    def size(self) -> str:
        """In words."""
        bits, width = torch.finfo(DTYPES[self.dtype]).bits, tuning.padded_head_dim(self.head_dim)
        tokens = tables.token_bucket(max(self.tokens))
        return f"{bits}-bit, head dim {width}, " + (f"up to {tokens} tokens" if tokens else "longer")

    def key(self, setup: Setup) -> tuning.Key:
        """What it decides for in the table."""
        capability = tuned_for(setup.device)
        return tuning.key_of(self.kernel, capability, DTYPES[self.dtype], self.head_dim, max(self.tokens))

    @property
    def outputs(self) -> tuple[str, ...]:
        """Those that the kernel is launched for."""
        return _OUTPUTS.get(self.kernel, ())

    def rule(self, tokens: int, setup: Setup) -> Tiles:
        """The present choice."""
        arch = tuned_for(setup.device)
        return tuning.attention_tiles(self.kernel, arch, DTYPES[self.dtype], self.head_dim, tokens)


class Raced(NamedTuple):
    """Milliseconds of the present choice and of other tiles, length by length, from the same races."""

    rule_ms: list[float]
    best_ms: list[float]

    @property
    def speedup(self) -> float:
        """The least over the lengths."""
        return min(rule / best for rule, best in zip(self.rule_ms, self.best_ms, strict=True))


class Compilation(NamedTuple):
    """What a process needs to know in order to compile a kernel."""

    piece: Piece
    tiles: Tiles
    shape: tuple[int, ...]  # of qkv
    arch: int
    shared_limit: int  # bytes a program may have


class _Timed(int):
    """A number of stages that shows where it comes from: ``choosing``."""


def run(setup: Setup, writer: Writer) -> Iterator[Row]:
    """Sweeps kernel by kernel, merges each winner into the configs file at once, and yields rows once written."""
    every = _pieces(setup)
    folder = Path(tempfile.mkdtemp(prefix="vitreg-configs-")) if setup.dry else tables.CONFIGS
    with warm.processes() as pool:
        for number, piece in enumerate(every, 1):
            if _done(writer, piece):
                continue
            if setup.expired:
                return
            print(f"    {number}/{len(every)} {piece}", end="", flush=True)
            with pieces.begun(setup, writer, NAME, piece):
                row, path = _row(piece, setup, pool), None
                if row["best"] is not None:
                    key = piece.key(setup)
                    entry = {**key._asdict(), **row["best"]}
                    path = tables.merge(folder, key.device, tuning.SECTION, [entry], tuning.Key._fields)
                print(f": {_summary(row, path)}", flush=True)
                yield from writer.extend([row])


def rehearsals(setup: Setup) -> tuple[Rehearsal, ...]:
    """None: which kernels it takes, it finds out by racing others."""
    return ()


def failures(rows: list[Row]) -> list[str]:
    """Sweeps that broke. Tiles that are wrong are not: nothing uses them."""
    return [
        f"the sweep of {row['kernel']} at {row['size']} broke: {row['reason']}"
        for row in rows
        if row["kind"] == "tuning" and row["failed"]
    ]


def unfinished(setup: Setup, writer: Writer) -> int:
    """Kernels and sizes without a row."""
    return sum(not _done(writer, piece) for piece in _pieces(setup))


@contextmanager
def choosing(kernel: str, tiles: Tiles) -> Iterator[None]:
    """Makes every launch of one kernel take these tiles; ``timed`` finds those launches."""
    rule, marked = tuning.attention_tiles, replace(tiles, num_stages=_Timed(tiles.num_stages))

    def choose(name: str, *size: Any) -> Tiles:
        return marked if name == kernel else rule(name, *size)

    # What was launched before, of a call like this, is not run again while launches are recorded.
    with mock.patch.object(tuning, "attention_tiles", choose), recording(run=True):
        yield


def timed(launches: Sequence[Launch]) -> list[Launch]:
    """Those that took their tiles from ``choosing``."""
    return [
        launch._replace(num_stages=int(launch.num_stages)) for launch in launches if type(launch.num_stages) is _Timed
    ]


def misfit(job: Compilation) -> str | None:
    """Compiles a kernel, which puts it into triton's cache on disk: why the GPU should not run it, or ``None``."""
    from vitreg_kernels._triton import offline

    try:
        used = [
            offline.compile_launch(launch, job.arch) for launch in _planned(job.piece, job.tiles, job.shape, job.arch)
        ]
    except RuntimeError as error:  # some tiles are more than the compiler can do
        return sentence(error)
    if any(resources.spill_bytes for resources in used):
        return "spills"
    return "shared memory" if any(resources.shared_bytes > job.shared_limit for resources in used) else None


def _pieces(setup: Setup) -> list[Piece]:
    kernels = get_args(tuning.AttentionKernel)
    if setup.dry:
        return [Piece(kernel, 16, (22,), "fp32") for kernel in kernels]
    return [Piece(k, head_dim, tokens, "bf16") for tokens, head_dim, k in product(_LENGTHS, (64, 128), kernels)]


def _done(writer: Writer, piece: Piece) -> bool:
    its = writer.find(kind="tuning", kernel=piece.kernel, size=piece.size)
    return bool(its) or pieces.broken(writer, NAME, piece)


def _row(piece: Piece, setup: Setup, pool: Executor) -> Row:
    row = {
        "kind": "tuning",
        "kernel": piece.kernel,
        "head_dim": piece.head_dim,
        "tokens": list(piece.tokens),
        "dtype": piece.dtype,
        "size": piece.size,
        "reason": None,
        "failed": False,
        "rule": [asdict(piece.rule(tokens, setup)) for tokens in piece.tokens],
        **dict.fromkeys(("best", "rule_ms", "best_ms", "speedup")),
        "timed": 0,
        "left_out": 0,
        "wrong": [],
    }
    probe = torch.empty(1, 1, 1, piece.head_dim, dtype=DTYPES[piece.dtype], device=setup.device)
    if reasons := explain(probe, backend=triton.BACKEND.name).reasons.get(triton.BACKEND.name):
        return row | {"reason": "; ".join(reasons)}
    arch = tuned_for(setup.device)
    if not all(_planned(piece, piece.rule(n, setup), _shape(piece, n, setup), arch) for n in piece.tokens):
        return row | {"reason": "no call of this size launches it"}
    try:
        return row | _search(piece, setup, pool)
    except Exception as error:  # a kernel may raise anything
        return row | {"reason": sentence(error), "failed": True}


def _search(piece: Piece, setup: Setup, pool: Executor) -> Row:
    """The fields of a row that hang on measurements."""
    shapes = _shapes(piece, setup)
    raced = _race(piece, _fitting(piece, shapes, setup, pool), setup)
    deeper = [t for best in _ranked(raced)[:_FINALISTS] for t in _depths(best, setup)]
    raced |= _race(piece, _fitting(piece, deeper, setup, pool), setup)
    found = {"timed": len(raced), "left_out": len(shapes) + len(deeper) - len(raced), "wrong": []}
    for tiles in _ranked(raced)[:_FINALISTS]:
        if raced[tiles].speedup < GAIN:
            break
        if broken := _broken(piece, tiles, setup):
            found["wrong"].append(f"{tiles}: {', '.join(broken)}")
            continue
        # Once more, without the others: the least of many medians is partly luck.
        again = _race(piece, [tiles], setup)[tiles]
        if again.speedup >= GAIN:
            return found | again._asdict() | {"best": asdict(tiles), "speedup": again.speedup}
    return found


def _shapes(piece: Piece, setup: Setup) -> list[Tiles]:
    if setup.dry:
        return [Tiles(16, 16, 1, 1)]
    low, high = _WHOLE_HEAD_TOKENS
    whole_head = (False, True) if piece.kernel == "forward" and low <= max(piece.tokens) <= high else (False,)
    return [Tiles(m, n, w, 2, whole) for m, n, w, whole in product((64, 128), (32, 64, 128), (4, 8), whole_head)]


def _depths(tiles: Tiles, setup: Setup) -> list[Tiles]:
    return [replace(tiles, num_stages=stages) for stages in ((2,) if setup.dry else (1, 3, 4))]


def _fitting(piece: Piece, tiles: list[Tiles], setup: Setup, pool: Executor) -> list[Tiles]:
    """Those that the GPU should run; all of them in the interpreter, which compiles nothing."""
    if mode.INTERPRETING:
        return list(tiles)
    arch = tuned_for(setup.device)
    limit = torch.cuda.get_device_properties(setup.device).shared_memory_per_block_optin
    jobs = [Compilation(piece, t, _shape(piece, n, setup), arch, limit) for t in tiles for n in piece.tokens]
    unfit = {job.tiles for job, reason in zip(jobs, pool.map(misfit, jobs), strict=True) if reason is not None}
    return [t for t in tiles if t not in unfit]


def _planned(piece: Piece, tiles: Tiles, shape: tuple[int, ...], arch: int) -> list[Launch]:
    """The kernel's launches for qkv of a shape, on tensors without data."""
    query, key, value = torch.empty(shape, dtype=DTYPES[piece.dtype], device="meta").permute(2, 0, 3, 1, 4)
    scale, outputs = piece.head_dim**-0.5, ("lse", *piece.outputs)
    inputs = AttentionInputs(query, key, value, scale=scale, num_prefix_tokens=NUM_PREFIX_TOKENS, outputs=outputs)
    with choosing(piece.kernel, tiles):
        return timed(triton.launches(inputs, arch))


def _ranked(raced: dict[Tiles, Raced]) -> list[Tiles]:
    return sorted(raced, key=lambda tiles: -raced[tiles].speedup)


def _race(piece: Piece, tiles: list[Tiles], setup: Setup) -> dict[Tiles, Raced]:
    """Times tiles beside the present choice, length by length; those that the GPU refuses to launch are left out."""
    raced = {t: Raced([], []) for t in tiles}
    for tokens in piece.tokens:
        make = partial(_inputs, piece, _shape(piece, tokens, setup), setup.device)
        copies = [make()] if setup.dry else timing.copies_past_cache(make, setup.device)
        rule = piece.rule(tokens, setup)
        launches = {"rule": [_launches(piece, rule, copy) for copy in copies]}
        for t in list(raced):
            try:
                launches[str(t)] = [_launches(piece, t, copy) for copy in copies]
            except Exception:  # more shared memory than there is, for one
                if lost(setup.device):
                    raise
                del raced[t]
        variants = {name: timing.Variant(partial(_relaunch, by_copy)) for name, by_copy in launches.items()}
        budget = _TIMING_BUDGET_S[setup.dry]
        times = timing.interleave(variants, range(len(copies)), device=setup.device, budget_s=budget)
        for t, (rule_ms, best_ms) in raced.items():
            rule_ms.append(times["rule"].median_ms)
            best_ms.append(times[str(t)].median_ms)
    return raced


def _shape(piece: Piece, tokens: int, setup: Setup) -> tuple[int, ...]:
    """Of qkv, ``[B, N, 3, H, D]``: as many heads as fill a GPU."""
    batch, heads = (1, 1) if setup.dry else _BATCH_AND_HEADS[tokens]
    return batch, tokens, 3, heads * HEAD_DIM // max(HEAD_DIM, piece.head_dim), piece.head_dim


def _inputs(piece: Piece, shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """qkv and the gradient of the output, ``[B, H, N, D]`` in memory of ``[B, N, H, D]``."""
    qkv = torch.randn(shape, device=device).to(DTYPES[piece.dtype]).requires_grad_()
    return qkv, torch.randn_like(qkv[:, :, 0]).transpose(1, 2)


def _launches(piece: Piece, tiles: Tiles, copy: tuple[Tensor, Tensor]) -> list[Launch]:
    """What a forward and a backward launch of the kernel with these tiles, having run it."""
    qkv, grad_output = copy
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    options = {"num_prefix_tokens": NUM_PREFIX_TOKENS, "outputs": piece.outputs, "backend": triton.BACKEND.name}
    with choosing(piece.kernel, tiles), recording(run=True) as launches:
        result = functional.register_attention(query, key, value, **options)
        output = result[0] if piece.outputs else result
        torch.autograd.grad(output, (query, key, value), grad_output)
    return timed(launches)


def _relaunch(by_copy: Sequence[list[Launch]], copy: int) -> None:
    for launch in by_copy[copy]:
        launch.run()


def _broken(piece: Piece, tiles: Tiles, setup: Setup) -> list[str]:
    """The tensors that break the accuracy rule with these tiles, at any length, on two images."""
    broken = []
    for tokens in piece.tokens:
        oracle = _oracle(piece, tokens, setup.device)
        with choosing(piece.kernel, tiles):
            errors = oracle.errors(triton.BACKEND.name)
        broken += [f"{name} at {tokens} tokens: {error}" for name, error in errors.items() if not error.passed]
    return broken


@lru_cache(maxsize=2)
def _oracle(piece: Piece, tokens: int, device: torch.device) -> Oracle:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, tokens, 3, 2, piece.head_dim, generator=generator).to(device, DTYPES[piece.dtype])
    return Oracle(attention.call(qkv, num_prefix_tokens=NUM_PREFIX_TOKENS, outputs=piece.outputs))


def _summary(row: Row, path: Path | None) -> str:
    if row["reason"] is not None:
        return row["reason"]
    tried = f"{row['timed']} timed, {row['left_out']} left out, {len(row['wrong'])} wrong"
    if path is None:
        return f"nothing better ({tried})"
    return f"{row['speedup']:.2f}x with {Tiles(**row['best'])} ({tried}), written to {path}"
