"""Whole models, uncompiled: timm's ViTs with their own attention, and with RegisterAttention in every block."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import results
from benchmarks.gpu import BACKENDS, pieces, smoke, warm
from benchmarks.gpu.stage import Rehearsal, Setup
from benchmarks.machine import Machine
from benchmarks.results import Errors, Row, Writer
from benchmarks.shapes import DTYPES, HEAD_DIM, DType
from benchmarks.timm_vits import Model, build, first_and_last, formula, register_attention, with_attention
from vitreg_kernels import functional
from vitreg_kernels.measure import timing
from vitreg_kernels.measure.accuracy import compare
from vitreg_kernels.measure.race import Stopped, attempted, lost

NAME = "models"
SECONDS = 70.0
LONGEST = 40.0
ModelMode = Literal["training", "forward"]

_MODES: tuple[ModelMode, ...] = get_args(ModelMode)
_DTYPE: DType = "bf16"
_LARGE = "vit_large_patch14_reg4_dinov2"
_GOALS: dict[tuple[str, str, bool], float] = {(_LARGE, "training", False): 1.15}
# Tokens, heads and prefix tokens of an attention.
_ATTENTION = {
    _LARGE: (261, 16, 5),
    "vit_small_patch14_reg4_dinov2": (261, 6, 5),
    "vit_base_patch14_reg4_dinov2": (261, 12, 5),
    "vit_large_patch16_224": (197, 16, 1),
}
_TIMING_BUDGET_S = {False: 3.0, True: 0.2}  # a piece of work, by whether the run is dry
_OWN = {
    "own: flash": SDPBackend.FLASH_ATTENTION,
    "own: cudnn": SDPBackend.CUDNN_ATTENTION,
    "own: efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_MEASURED = (*results.UNTIMED, "images_per_s", "speedup", "peak_memory_bytes", "errors")


class ModelRow(results.HostTime):
    """One model with one attention in one mode; one that did not run has ``None`` for everything measured.

    A model that cannot be built has a single row, of attention ``"any"`` and no mode.
    """

    kind: Literal["model"]
    model: str  # timm's name
    attention: str  # "own: flash", ..., the model's own by that backend of torch's SDPA; "vitreg: triton", ..., ours
    ours: bool
    mode: ModelMode | None  # a training step is forward, cross-entropy, backward and fused AdamW
    compiled: bool | None  # each block by torch.compile
    batch: int
    tokens: int | None
    dtype: DType  # of weights and images
    goal: float | None  # the speedup that is aimed at
    reason: str | None  # why it did not run, in its own words; None if it did
    failed: bool  # it is ours and broke; any other reason is a refusal
    median_ms: float | None
    p20_ms: float | None
    p80_ms: float | None
    samples: int | None
    images_per_s: float | None
    best_own: str | None  # the fastest of the model's own
    speedup: float | None  # its median / this one, both compiled or both not
    peak_memory_bytes: int | None  # of one call, weights and optimizer state included; None off a GPU
    errors: dict[str, Errors] | None  # "features", all tokens; in training also "grad_qkv", of the first block's weight
    machine: Machine


results.ROW_TYPES["model"] = ModelRow


class Piece(NamedTuple):
    """What is measured at once: all contenders interleaved."""

    model: Model
    mode: ModelMode
    compiled: bool

    def __str__(self) -> str:
        return f"{self.model.name}, {self.mode}, {'compiled' if self.compiled else 'eager'}"


class Contender(NamedTuple):
    """One attention in every block.

    Attributes:
        name: as rows show it.
        ours: it is a RegisterAttention.
        place: makes it from the model's own attention, whose weights it holds.
        context: entered around each call, outside the clock.
    """

    name: str
    ours: bool
    place: Callable[[nn.Module], nn.Module]
    context: Callable[[], AbstractContextManager[object]] = nullcontext


class _Task(NamedTuple):
    """A piece of work made ready."""

    mode: ModelMode
    images: Tensor  # [B, 3, height, width]
    labels: Tensor  # [B]
    optimizer: torch.optim.Optimizer | None
    qkv_weight: nn.Parameter  # of the first block, whose gradient comes through all others
    exact: dict[str, Tensor]  # of the first and the last image, in fp64
    rounded: dict[str, Tensor]  # the same by the eager formula
    terms: int  # the longest sum of the network


class _Ready(NamedTuple):
    """A contender that ran."""

    tree: nn.Module
    errors: dict[str, Errors]
    peak_memory_bytes: int | None


def run(setup: Setup, writer: Writer) -> Iterator[Row]:
    """Measures piece by piece, the one with a goal first, and yields rows once written."""
    todo = [piece for piece in pieces_of(setup, compiled=False) if not _done(writer, NAME, piece)]
    warm.up(todo, partial(rehearse, device=setup.device), setup)
    return (yield from measure(todo, NAME, setup, writer))


def rehearsals(setup: Setup) -> Iterator[Rehearsal]:
    """The calls of our own kernels."""
    return (partial(rehearse, piece, setup.device) for piece in pieces_of(setup, compiled=False))


def measure(todo: list[Piece], stage: str, setup: Setup, writer: Writer) -> Iterator[Row]:
    """Those pieces of a stage that ``writer`` has no rows of."""
    for piece in todo:
        if _done(writer, stage, piece):
            continue
        if setup.expired:
            return
        print(f"    {piece}", flush=True)
        try:
            with pieces.begun(setup, writer, stage, piece):
                yield from writer.extend(_rows(piece, setup, writer))
        finally:
            if piece.compiled:
                torch.compiler.reset()
            gc.collect()  # modules hold each other in circles, and the next model needs their memory
            if setup.device.type == "cuda" and not lost(setup.device):
                torch.cuda.empty_cache()


def failures(rows: list[Row]) -> list[str]:
    """Ours that broke, and ours that is wrong; what torch's own attention does is not ours to fail."""
    return failures_of(rows, compiled=False)


def failures_of(rows: list[Row], *, compiled: bool) -> list[str]:
    """Of the pieces that are compiled or that are not."""
    sentences = []
    for row in rows:
        if row["kind"] != "model" or not row["ours"] or row["compiled"] is not compiled:
            continue
        where = f"{row['model']}, {row['mode']}, {'compiled' if row['compiled'] else 'eager'}, {row['attention']}"
        if row["failed"]:
            sentences.append(f"{where} broke: {row['reason']}")
        for name, error in (row["errors"] or {}).items():
            if not error["passed"]:
                sentences.append(
                    f"{where}: {name} is {error['max']:.3g} off (mean {error['mean']:.3g}), "
                    f"the eager formula {error['eager_max']:.3g} (mean {error['eager_mean']:.3g})"
                )
    return sentences


def unfinished(setup: Setup, writer: Writer) -> int:
    """Pieces of work without rows."""
    return undone(pieces_of(setup, compiled=False), NAME, writer)


def undone(those: list[Piece], stage: str, writer: Writer) -> int:
    """How many pieces of a stage have no rows."""
    return sum(not _done(writer, stage, piece) for piece in those)


def contenders(module: nn.Module, own: tuple[str, ...] = tuple(_OWN)) -> list[Contender]:
    """The model's own attention by some backends of torch's SDPA, and ours by default and by each opaque backend."""
    theirs = [Contender(name, False, partial(_Under, _OWN[name]), partial(sdpa_kernel, _OWN[name])) for name in own]
    backends = {"vitreg: default": None} | {f"vitreg: {b.name}": b.name for b in BACKENDS if b.opaque}
    ours = [Contender(n, True, partial(register_attention, module, b)) for n, b in backends.items()]
    return [*theirs, *ours]


class _Under(nn.Module):
    """An attention under one backend of torch's SDPA: what torch.compile needs in order to tell them apart."""

    def __init__(self, backend: SDPBackend, attention: nn.Module) -> None:
        super().__init__()
        self.backend, self.attention = backend, attention

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        with sdpa_kernel(self.backend):
            return self.attention(x, **options)


def pieces_of(setup: Setup, *, compiled: bool) -> list[Piece]:
    """Every model uncompiled, or the one with a goal compiled: that takes a minute each on a GPU."""
    if setup.dry:
        tiny = {"embed_dim": 48, "depth": 2, "num_heads": 3}
        models = [
            Model(_LARGE, 3, {"img_size": 56, **tiny}),
            Model("vit_large_patch16_224", 3, {"img_size": 64, **tiny}),
        ]
    else:
        models = [
            Model(_LARGE, 64, {"img_size": 224}),
            Model("vit_small_patch14_reg4_dinov2", 256, {"img_size": 224}),
            Model("vit_base_patch14_reg4_dinov2", 128, {"img_size": 224}),
            Model("vit_large_patch16_224", 64, {}),
        ]
    return [Piece(model, mode, compiled) for model in models[: 1 if compiled else None] for mode in _MODES]


def rehearse(piece: Piece, device: torch.device) -> None:
    """The calls of our own kernels that a block makes, without the model around them."""
    tokens, heads, prefix = _ATTENTION[piece.model.name]
    backward = piece.mode == "training"
    qkv = torch.empty(piece.model.batch, tokens, 3, heads, HEAD_DIM, device=device, dtype=DTYPES[_DTYPE])
    for backend in BACKENDS:
        if backend.opaque:
            attempted(partial(_attend, qkv.requires_grad_(backward), prefix, backend.name), ours=True)


def _attend(qkv: Tensor, prefix: int, backend: str) -> None:
    output = functional.register_attention_qkv(qkv, num_prefix_tokens=prefix, backend=backend)
    if qkv.requires_grad:
        torch.autograd.grad(output, qkv, torch.empty_like(output))


def _done(writer: Writer, stage: str, piece: Piece) -> bool:
    rows = partial(writer.find, kind="model", model=piece.model.name)
    its = rows(mode=piece.mode, compiled=piece.compiled) or rows(mode=None)
    return bool(its) or pieces.broken(writer, stage, piece)


def _rows(piece: Piece, setup: Setup, writer: Writer) -> list[Row]:
    built = attempted(partial(build, piece.model, setup.device, DTYPES[_DTYPE]), ours=False)
    row = {
        "kind": "model",
        "model": piece.model.name,
        "attention": "any",
        "ours": False,
        "mode": None,
        "compiled": None,
        "batch": piece.model.batch,
        "tokens": None,
        "dtype": _DTYPE,
        "goal": None,
        "reason": None,
        "failed": False,
        "best_own": None,
        **dict.fromkeys(_MEASURED),
    }
    if isinstance(built, Stopped):
        return [row | built._asdict()]
    row |= {"mode": piece.mode, "compiled": piece.compiled}
    row["tokens"] = built.patch_embed.num_patches + built.num_prefix_tokens

    raced = contenders(built, _own_of(piece, writer))
    task = _task(built, piece, setup.device)

    def attempt(contender: Contender) -> _Ready:
        return _attempt(contender, _tree(built, contender, piece, setup), task)

    outcomes = {}
    for contender in raced:
        wrong = _against(contender, row["tokens"], piece, setup, writer)
        outcome = wrong or _outcome(partial(attempt, contender), piece, ours=contender.ours)
        outcomes[contender.name] = outcome
        if lost(setup.device):  # every other would fail too, by no fault of its own
            others = Stopped(f"was not timed, because {contender.name} broke the hold of the GPU", failed=False)
            outcomes = {c.name: others for c in raced}
            if not isinstance(outcome, Stopped):  # the error came late
                outcome = Stopped("broke the hold of the GPU", failed=contender.ours)
            outcomes[contender.name] = outcome
            break
    running = [c for c in raced if not isinstance(outcomes[c.name], Stopped)]
    timings = timing.interleave(
        {c.name: timing.Variant(partial(_call, outcomes[c.name].tree, task), context=c.context) for c in running},
        [task.images],  # no copies: every call reads all the weights, which are larger than a cache
        device=setup.device,
        budget_s=_TIMING_BUDGET_S[setup.dry],
    )
    own_ms = {c.name: timings[c.name].median_ms for c in running if not c.ours}
    row["best_own"] = best_own = min(own_ms, key=own_ms.__getitem__, default=None)

    rows = []
    for contender in raced:
        outcome = outcomes[contender.name]
        own_row = row | {"attention": contender.name, "ours": contender.ours}
        if contender.ours:
            own_row["goal"] = _GOALS.get((piece.model.name, piece.mode, piece.compiled))
        if isinstance(outcome, Stopped):
            own_row |= outcome._asdict()
        else:
            timed = timings[contender.name]
            own_row |= {
                **results.timed(timed),
                "images_per_s": 1e3 * piece.model.batch / timed.median_ms,
                "speedup": own_ms[best_own] / timed.median_ms if best_own else None,
                "peak_memory_bytes": outcome.peak_memory_bytes,
                "errors": outcome.errors,
            }
        rows.append(own_row)
    return rows


def _against(contender: Contender, tokens: int, piece: Piece, setup: Setup, writer: Writer) -> Stopped | None:
    """What the smoke test has against a backend of ours."""
    if not contender.ours:
        return None
    backend, backward = contender.name.removeprefix("vitreg: "), piece.mode == "training"
    reason = smoke.against(backend, tokens, backward=backward, setup=setup, writer=writer)
    return Stopped(reason, failed=False) if reason else None


def _own_of(piece: Piece, writer: Writer) -> tuple[str, ...]:
    """Which of the model's own race: compiling takes long, so compiled only the one that won uncompiled."""
    eager = writer.find(kind="model", model=piece.model.name, mode=piece.mode, compiled=False) if piece.compiled else []
    return (eager[0]["best_own"],) if eager and eager[0]["best_own"] else tuple(_OWN)


def _tree(module: nn.Module, contender: Contender, piece: Piece, setup: Setup) -> nn.Module:
    # Uncompiled, the context outside the clock does what _Under would do inside it.
    own = not contender.ours and not piece.compiled
    tree = with_attention(module, (lambda attention: attention) if own else contender.place)
    if piece.compiled:
        # Block by block, as they are all alike and one graph serves them all.
        for block in tree.blocks:
            block.compile(fullgraph=True, dynamic=False, backend="eager" if setup.dry else "inductor")
    return tree.train(piece.mode == "training")


def _task(module: nn.Module, piece: Piece, device: torch.device) -> _Task:
    generator = torch.Generator().manual_seed(0)
    shape = (piece.model.batch, 3, *module.patch_embed.img_size)
    images = torch.randn(shape, generator=generator).to(device, DTYPES[_DTYPE])
    classes = module.num_classes or module.num_features
    labels = torch.randint(classes, shape[:1], generator=generator).to(device)
    optimizer = None
    if piece.mode == "training":
        # A rate of 0 costs the same, and every contender meets the same weights.
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.0, fused=True)

    eager = with_attention(module, formula).train(piece.mode == "training")
    few = first_and_last(images)
    rounded = _results(eager, few, piece.mode, eager.blocks[0].attn.qkv.weight)
    double = copy.deepcopy(eager).double()
    exact = _results(double, few.double(), piece.mode, double.blocks[0].attn.qkv.weight)
    weight, terms = module.blocks[0].attn.qkv.weight, module.blocks[0].mlp.fc2.in_features
    return _Task(piece.mode, images, labels, optimizer, weight, exact, rounded, terms)


def _outcome(attempt: Callable[[], Any], piece: Piece, *, ours: bool) -> Any:
    """What ``attempt`` gives, or why it gives nothing. Running out of memory is a refusal, whoever does it."""

    def call() -> Any:
        try:
            return attempt()
        except torch.OutOfMemoryError as error:
            return Stopped(f"ran out of memory at a batch of {piece.model.batch}: {error}", failed=False)

    return attempted(call, ours=ours)


def _attempt(contender: Contender, tree: nn.Module, task: _Task) -> _Ready:
    """The contender's errors, and the peak memory of one call."""
    device = task.images.device
    with contender.context():
        found = _results(tree, task.images, task.mode, task.qkv_weight)
        errors = {
            name: results.errors(compare(found[name], task.exact[name], task.rounded[name], terms=task.terms))
            for name in task.exact
        }
        del found
        _call(tree, task, task.images)  # the optimizer's state, and what a first call allocates for good
        if device.type != "cuda":
            return _Ready(tree, errors, None)
        torch.cuda.reset_peak_memory_stats(device)
        _call(tree, task, task.images)
        return _Ready(tree, errors, torch.cuda.max_memory_allocated(device))


def _call(tree: nn.Module, task: _Task, images: Tensor) -> None:
    """What is timed."""
    if task.optimizer is None:
        with torch.inference_mode():
            tree(images)
        return
    F.cross_entropy(tree(images).float(), task.labels).backward()
    task.optimizer.step()
    task.optimizer.zero_grad()


def _results(tree: nn.Module, images: Tensor, mode: ModelMode, weight: nn.Parameter) -> dict[str, Tensor]:
    """Features ``[2, N, C]`` of the first and the last image and, in training, the gradient of a weight from them.

    All images run, so that a compiled model meets the one batch it is timed with; those between have no gradient.
    """
    if mode == "forward":
        with torch.inference_mode():
            return {"features": first_and_last(tree.forward_features(images))}
    ends = first_and_last(tree.forward_features(images))
    upstream = torch.randn(ends.shape, generator=torch.Generator().manual_seed(1)).to(DTYPES[_DTYPE])
    (grad,) = torch.autograd.grad(ends, weight, upstream.to(ends))
    return {"features": ends.detach(), "grad_qkv": grad}
