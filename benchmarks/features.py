"""A real pretrained ViT on real photographs, with RegisterAttention in every block.

Each backend's features are held against the reference backend's by the one accuracy rule, and timed. A model trained
without registers is given 4, and what that does to its features is measured.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal, NamedTuple, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import results
from benchmarks.attention import Progress
from benchmarks.machine import Machine, default_device
from benchmarks.pretrained import Pretrained
from benchmarks.results import Errors, Row, Writer
from benchmarks.shapes import DTYPES, DType, Size
from vitreg_kernels import RegisterViT, explain
from vitreg_kernels.analysis import photographs
from vitreg_kernels.analysis.images import normalize
from vitreg_kernels.functional import token_norms
from vitreg_kernels.measure import timing
from vitreg_kernels.measure.accuracy import compare
from vitreg_kernels.measure.race import Contender, Raced, race

NUM_REGISTERS = 4
# Side of the square images -> how many photographs. At 518 px N is 1374, the length DINOv2 is trained on last.
_IMAGES: dict[Size, dict[int, int]] = {"quick": {224: 4}, "full": {224: 8, 518: 2}}
_TIMING_BUDGET_S: dict[Size, float] = {"quick": 5.0, "full": 30.0}
_MEASURED = ("median_ms", "p20_ms", "p80_ms", "samples", "speedup", "errors")


class FeaturesRow(TypedDict):
    """One backend in every block of one model: its errors over all features of all images, and its time.

    One that was taken to be usable and was not has ``None`` for everything measured.
    """

    kind: Literal["features"]
    model: str
    backend: str
    default: bool  # what backend=None takes
    reason: str | None  # why it did not run, in its own words; None if it did
    failed: bool  # it broke; any other reason is a refusal
    dtype: DType
    image_size: int
    images: int  # whose features are compared
    tokens: int
    prefix_tokens: int
    batch: int  # images in a timed call
    median_ms: float | None  # an image
    p20_ms: float | None
    p80_ms: float | None
    samples: int | None
    speedup: float | None  # the reference backend's median / this median
    errors: dict[str, Errors] | None  # "features", after the last LayerNorm; "prefix_attention", of the last block
    machine: Machine


class RegistersRow(TypedDict):
    """What registers put into a model trained without them do to its features (fp32, after the final LayerNorm)."""

    kind: Literal["registers"]
    model: str
    initial: str  # how the registers are set
    used: bool  # whether the features and the picture are made with these
    image_size: int
    images: int
    patch_cosine_mean: float  # of a patch's features with and without registers
    patch_cosine_min: float
    cls_cosine_mean: float
    attention_to_registers: float  # share of the CLS query's attention, in the last block
    machine: Machine


class NormsRow(TypedDict):
    """L2 norms of one photograph's tokens after the last block, before the final LayerNorm, which hides them (fp32)."""

    kind: Literal["norms"]
    model: str
    photograph: str
    image_size: int
    patch_median: float
    patch_max: float
    cls: float
    register_mean: float
    machine: Machine


results.ROW_TYPES.update(features=FeaturesRow, registers=RegistersRow, norms=NormsRow)


class Maps(NamedTuple):
    """What the picture shows of some photographs.

    Attributes:
        model: the model, in words.
        names: of the photographs.
        images: ``[B, 3, side, side]``, RGB in [0, 1].
        attention: ``[B, P, rows, columns]``, attention of CLS and each register to each patch in the last block, mean
            over heads, as a multiple of 1 / N, what a query that attends to every token alike gives.
    """

    model: str
    names: tuple[str, ...]
    images: Tensor
    attention: Tensor


class _Job(NamedTuple):
    label: str
    key: dict[str, object]  # what its rows, and no others, have
    rows: Callable[[], list[Row]]


def run(
    size: Size, writer: Writer, progress: Progress, pretrained: Pretrained, device: torch.device | None = None
) -> Iterator[Row]:
    """Runs ``pretrained``, given registers if it has none, and yields the rows as they are written.

    Rows that ``writer`` already holds (a cut run) are yielded as they stand. ``progress(done, total, label)`` is called
    before each piece of work, and once at the end with ``done == total``.
    """
    device = device or default_device()
    jobs = list(_jobs(size, pretrained, device))
    for done, job in enumerate(jobs):
        progress(done, len(jobs), job.label)
        yield from writer.find(**job.key) or writer.extend([job.key | row for row in job.rows()])
    progress(len(jobs), len(jobs), "")


class Features(NamedTuple):
    """What a ViT makes of ``B`` images.

    Attributes:
        normalized: ``[B, N, C]``, after the final LayerNorm: the features that people use.
        prefix_attention: ``[B, H, P, N]`` fp32, attention of the CLS and register queries in the last block.
    """

    normalized: Tensor
    prefix_attention: Tensor


def with_any_registers(pretrained: Pretrained) -> RegisterViT:
    """The model as benchmarked: with its own registers, or else with 4 like patches of a plain image."""
    vit = pretrained.vit()
    return vit if vit.config.num_registers else pretrained.vit(NUM_REGISTERS)


def by_backend(vit: RegisterViT, backend: str) -> RegisterViT:
    """The same model, of the same Parameters, with a backend in every block."""
    model = RegisterViT(vit.config, backend=backend, device="meta").eval()
    model.load_state_dict(vit.state_dict(), assign=True)
    return model.requires_grad_(False)


@torch.inference_mode()
def attention_maps(pretrained: Pretrained, names: tuple[str, ...], side: int = 224) -> Maps:
    """Attention maps of the CLS token and the registers on the named photographs, by the default backend."""
    vit = with_any_registers(pretrained)
    images = photographs.load(names, side)
    attention = _features(vit, normalize(images)).prefix_attention.mean(1)
    patches = attention[..., vit.layout.patches] * attention.shape[-1]
    rows = side // vit.config.patch_size
    given = "" if pretrained.has_registers else f", given {NUM_REGISTERS} here"
    return Maps(pretrained.name + given, names, images, patches.unflatten(-1, (rows, rows)))


def usable_backends(vit: RegisterViT, images: Tensor) -> tuple[str, list[str]]:
    """The default backend for this model's attention, and every one that can serve it."""
    attention = vit.blocks[0].attn
    query = images.new_empty(1, attention.num_heads, 1, attention.head_dim)  # support depends on no length
    default, reasons, _ = explain(query)
    return default, [name for name in (default, *reasons) if explain(query, backend=name).backend == name]


def _jobs(size: Size, pretrained: Pretrained, device: torch.device) -> Iterator[_Job]:
    model = with_any_registers(pretrained)
    for side, count in _IMAGES[size].items():
        names = photographs.NAMES[:count]
        images = normalize(photographs.load(names, side)).to(device)
        key = {"model": pretrained.name, "image_size": side}
        if not pretrained.has_registers:
            rows = partial(_registers_rows, pretrained, images)
            yield _Job(f"registers at {side} px", {"kind": "registers", **key}, rows)
        yield _Job(f"norms at {side} px", {"kind": "norms", **key}, partial(_norms_rows, model, names, images))
        for dtype in DTYPES:
            rows = partial(_features_rows, model, images, dtype, _TIMING_BUDGET_S[size])
            yield _Job(f"features at {side} px, {dtype}", {"kind": "features", "dtype": dtype, **key}, rows)


@torch.inference_mode()
def _features_rows(model: RegisterViT, images: Tensor, dtype: DType, budget_s: float) -> list[Row]:
    vit = copy.deepcopy(model).to(images.device, DTYPES[dtype])
    images = images.to(DTYPES[dtype])
    # fp64 from weights and images already rounded to the dtype: what is judged is the arithmetic, not the rounding.
    exact = _by("reference", copy.deepcopy(vit).double(), images.double())
    eager = _by("reference", vit, images)
    default, backends = usable_backends(vit, images)
    terms = vit.blocks[0].mlp.fc2.in_features  # the longest sum of the network

    def check(name: str) -> dict[str, Errors]:
        actual = _by(name, vit, images) if name != "reference" else eager
        return {
            "features": _errors(actual.normalized, exact.normalized, eager.normalized, terms),
            "prefix_attention": _errors(actual.prefix_attention, exact.prefix_attention, eager.prefix_attention, terms),
        }

    # One image keeps a CPU busy; a GPU gets them all.
    timed = images if images.is_cuda else images[:1]
    outcomes = race(
        [Contender(b, partial(check, b), timing.Variant(by_backend(vit, b).forward_features)) for b in backends],
        [timed],  # no copies: every call reads all the weights, which are larger than a cache
        device=images.device,
        budget_s=budget_s,
    )
    rows = []
    for name, outcome in outcomes.items():
        row = {
            "backend": name,
            "default": name == default,
            "reason": None,
            "failed": False,
            "images": len(images),
            "tokens": exact.normalized.shape[1],
            "prefix_tokens": vit.layout.num_prefix_tokens,
            "batch": len(timed),
            **dict.fromkeys(_MEASURED),
        }
        if isinstance(outcome, Raced):
            median, p20, p80 = (ms / len(timed) for ms in outcome.timing[:3])
            row |= {
                "median_ms": median,
                "p20_ms": p20,
                "p80_ms": p80,
                "samples": outcome.timing.samples,
                "speedup": outcomes["reference"].timing.median_ms / outcome.timing.median_ms,
                "errors": outcome.found,
            }
        else:
            row |= outcome._asdict()
        rows.append(row)
    return rows


def _by(backend: str, vit: RegisterViT, images: Tensor) -> Features:
    return _features(by_backend(vit, backend), images)


def _features(vit: RegisterViT, images: Tensor) -> Features:
    normalized, statistics = vit.forward_features(images, outputs=("prefix_attention",))
    return Features(normalized, statistics.prefix_attention)


def _errors(actual: Tensor, exact: Tensor, eager: Tensor, terms: int) -> Errors:
    return results.errors(compare(actual, exact, eager, terms=terms))


@torch.inference_mode()
def _registers_rows(pretrained: Pretrained, images: Tensor) -> list[Row]:
    without = pretrained.vit().to(images.device).forward_features(images)
    vit = pretrained.vit(NUM_REGISTERS).to(images.device)
    noise = torch.randn(vit.register_tokens.shape, generator=torch.Generator().manual_seed(0))
    cls_token = vit.cls_token.clone()
    if vit.config.position_rows != "patches":
        cls_token += vit.pos_embed[:, :1]
    candidates = {
        "grey patches": vit.register_tokens.clone(),
        "noise of std 1e-6": 1e-6 * noise,
        "copies of CLS": cls_token,
    }
    rows = []
    for initial, registers in candidates.items():
        vit.register_tokens.copy_(registers)
        features = _features(vit, images)
        cls_attention = features.prefix_attention[:, :, 0]
        cosines = F.cosine_similarity(vit.layout.strip_registers(features.normalized), without, dim=-1)
        rows.append(
            {
                "initial": initial,
                "used": initial == "grey patches",
                "images": len(images),
                "patch_cosine_mean": cosines[:, 1:].mean().item(),
                "patch_cosine_min": cosines[:, 1:].min().item(),
                "cls_cosine_mean": cosines[:, 0].mean().item(),
                "attention_to_registers": cls_attention[..., vit.layout.registers].sum(-1).mean().item(),
            }
        )
    return rows


@torch.inference_mode()
def _norms_rows(model: RegisterViT, names: tuple[str, ...], images: Tensor) -> list[Row]:
    (stream,) = copy.deepcopy(model).to(images.device).intermediate_layers(images, 1, norm=False)
    cls, registers, patches = (token_norms(group).cpu() for group in stream)
    return [
        {
            "photograph": name,
            "patch_median": patches[i].median().item(),
            "patch_max": patches[i].max().item(),
            "cls": cls[i].item(),
            "register_mean": registers[i].mean().item(),
        }
        for i, name in enumerate(names)
    ]
