"""timm's ViTs end to end on a CPU: the unchanged model against the same with RegisterAttention in every block."""

from __future__ import annotations

import copy
import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import results
from benchmarks.attention import Progress
from benchmarks.machine import Machine
from benchmarks.report import number, worst
from benchmarks.results import Errors, Row, Writer
from benchmarks.shapes import DTYPES, DType, Size
from benchmarks.timm_vits import Model, build, first_and_last, formula, register_attention, with_attention
from vitreg_kernels import explain
from vitreg_kernels.measure import timing
from vitreg_kernels.measure.accuracy import compare
from vitreg_kernels.measure.race import Stopped, attempted
from vitreg_kernels.ops.attention.backends import BACKENDS

GOAL = 1.2  # in bf16
OWN = "timm's own"
_SMALL, _BASE = (Model(f"vit_{size}_patch14_reg4_dinov2", 8, {"img_size": 224}) for size in ("small", "base"))
_BUDGET_S: dict[Size, float] = {"quick": 4.0, "full": 20.0}
_CPU = torch.device("cpu")
_MEASURED = (*results.UNTIMED, "images_per_s", "speedup", "errors")


class EndToEndRow(results.HostTime):
    """One model with one attention, forward. One that did not run has ``None`` for everything measured.

    A model that cannot be built has a single row, of attention ``"any"``.
    """

    kind: Literal["end_to_end"]
    model: str  # timm's name
    attention: str  # "timm's own", or "vitreg:cpu", ..., a RegisterAttention in every block by that backend
    ours: bool
    compiled: bool  # each block by torch.compile
    dtype: DType  # of weights and images
    batch: int  # images
    tokens: int | None
    goal: float | None  # the speedup that is aimed at
    reason: str | None  # why it did not run, in its own words; None if it did
    failed: bool  # it is ours and broke; any other reason is a refusal
    median_ms: float | None
    p20_ms: float | None
    p80_ms: float | None
    samples: int | None
    images_per_s: float | None
    speedup: float | None  # the unchanged model's median / this one
    errors: dict[str, Errors] | None  # "features", all tokens of the first and the last image
    machine: Machine


results.ROW_TYPES["end_to_end"] = EndToEndRow


class Piece(NamedTuple):
    """What is measured at once: all attentions of one model, interleaved."""

    model: Model
    compiled: bool
    dtype: DType

    def __str__(self) -> str:
        return f"{self.model.name} {self.dtype}{' compiled' if self.compiled else ''}"


def pieces(size: Size) -> list[Piece]:
    """All there are of a ``size``; the quick one has time for the one with a goal that is soonest measured."""
    if size == "quick":
        return [Piece(_SMALL, False, "bf16")]
    return [Piece(*piece) for piece in itertools.product((_SMALL, _BASE), (False, True), DTYPES)]


def run(size: Size, writer: Writer, progress: Progress) -> Iterator[Row]:
    """Measures piece by piece on the CPU and yields the rows once they are written.

    Resumption and ``progress`` are as of ``attention.run``.
    """
    todo = pieces(size)
    for done, piece in enumerate(todo):
        progress(done, len(todo), str(piece))
        about = {"model": piece.model.name, "compiled": piece.compiled, "dtype": piece.dtype}
        yield from writer.find(kind="end_to_end", **about) or writer.extend(measure(piece, _BUDGET_S[size]))
        torch.compiler.reset()
        gc.collect()  # modules hold each other in circles
    progress(len(todo), len(todo), "")


def backends(own: nn.Module) -> list[str]:
    """Ours that race: what a call gets by default in place of timm's attention, and all kernels of our own."""
    query = own.qkv.weight.new_empty(1, own.num_heads, 1, own.head_dim)
    return list(dict.fromkeys([explain(query).backend, *(b.name for b in BACKENDS if b.opaque)]))


def measure(piece: Piece, budget_s: float) -> list[Row]:
    """One row for each attention, run or not, without its ``machine``."""
    row = {
        "kind": "end_to_end",
        "model": piece.model.name,
        "attention": "any",
        "ours": False,
        "compiled": piece.compiled,
        "dtype": piece.dtype,
        "batch": piece.model.batch,
        "tokens": None,
        "goal": None,
        "reason": None,
        "failed": False,
        **dict.fromkeys(_MEASURED),
    }
    module = attempted(partial(build, piece.model, _CPU, DTYPES[piece.dtype]), ours=False)
    if isinstance(module, Stopped):
        return [row | module._asdict()]
    module.eval()
    row["tokens"] = module.patch_embed.num_patches + module.num_prefix_tokens
    places = {OWN: lambda attention: attention}
    places |= {f"vitreg:{b}": partial(register_attention, module, b) for b in backends(module.blocks[0].attn)}
    images = torch.randn(piece.model.batch, 3, *module.patch_embed.img_size, generator=torch.Generator().manual_seed(0))
    images = images.to(DTYPES[piece.dtype])
    check = _check(module, images)

    trees, errors = {}, {}
    for name, place in places.items():
        found = attempted(partial(_ready, module, place, piece.compiled, images, check), ours=name != OWN)
        trees[name], errors[name] = (found, None) if isinstance(found, Stopped) else found
    timings = timing.interleave(
        {name: timing.Variant(partial(_forward, tree)) for name, tree in trees.items() if errors[name] is not None},
        [images],  # no copies: every call reads all the weights, which are larger than a cache
        device=_CPU,
        budget_s=budget_s,
    )
    rows = []
    for name, tree in trees.items():
        ours = name != OWN
        goal = GOAL if ours and piece.dtype == "bf16" else None
        own_row = row | {"attention": name, "ours": ours, "goal": goal}
        if isinstance(tree, Stopped):
            own_row |= tree._asdict()
        else:
            timed = timings[name]
            own_row |= {
                **results.timed(timed),
                "images_per_s": 1e3 * piece.model.batch / timed.median_ms,
                "speedup": timings[OWN].median_ms / timed.median_ms if OWN in timings else None,
                "errors": errors[name],
            }
        rows.append(own_row)
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows end to end as text of at most 100 columns."""
    rows = [row for row in rows if row["kind"] == "end_to_end"]
    parts = []
    for model, compiled, dtype in dict.fromkeys((row["model"], row["compiled"], row["dtype"]) for row in rows):
        its = [r for r in rows if (r["model"], r["compiled"], r["dtype"]) == (model, compiled, dtype)]
        how = "each block by torch.compile" if compiled else "eager"
        tokens = "" if its[0]["tokens"] is None else f" x {its[0]['tokens']} tokens"
        goal = next((f" (goal: x {row['goal']})" for row in its if row["goal"]), "")
        lines = [f"{model}, {dtype}, {how}, {its[0]['batch']} images{tokens}{goal}"]
        parts.append("\n".join([*lines, *map(_line, its)]))
    return "\n".join(parts)


def _line(row: Row) -> str:
    name = f"  {row['attention']:<18}"
    if row["reason"] is not None:
        return f"{name}{'FAIL ' if row['failed'] else 'not run: '}{row['reason'].partition(chr(10))[0]}"[:100]
    error = worst(row["errors"])
    spread = f"{number(row['p20_ms'])}-{number(row['p80_ms'])}"
    speedup = "" if row["speedup"] is None else f"x {row['speedup']:.2f}"
    figures = f"{number(row['median_ms']):>7} ms {spread:>11} {number(row['images_per_s']):>5} images/s{speedup:>8}"
    below = row["goal"] and row["speedup"] and row["speedup"] < row["goal"]
    verdict = "  FAIL" if not error["passed"] else "  BELOW THE GOAL" if below else ""
    return f"{name}{figures}  {error['max']:.1e} ({error['eager_max']:.1e}){verdict}"


def _check(module: nn.Module, images: Tensor) -> Callable[[Tensor], dict[str, Errors]]:
    """Errors of features ``[B, N, C]``, by the first and the last image."""
    eager, few = with_attention(module, formula), first_and_last(images)
    terms = module.blocks[0].mlp.fc2.in_features  # the longest sum of the network
    rounded, exact = _forward(eager, few), _forward(copy.deepcopy(eager).double(), few.double())

    def check(features: Tensor) -> dict[str, Errors]:
        found = compare(first_and_last(features), exact, rounded, terms=terms)
        return {"features": results.errors(found)}

    return check


def _ready(
    module: nn.Module,
    place: Callable[[nn.Module], nn.Module],
    compiled: bool,
    images: Tensor,
    check: Callable[[Tensor], dict[str, Errors]],
) -> tuple[nn.Module, dict[str, Errors]]:
    """The model with an attention that ran, and its errors."""
    tree = with_attention(module, place)
    if compiled:
        # Block by block, as they are all alike and one graph serves them all.
        for block in tree.blocks:
            block.compile(fullgraph=True, dynamic=False)
    return tree, check(_forward(tree, images))


@torch.inference_mode()
def _forward(tree: nn.Module, images: Tensor) -> Tensor:
    return tree.forward_features(images)
