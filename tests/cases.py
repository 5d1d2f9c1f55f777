"""Attention calls to test with: drawn by Hypothesis, or the named shapes of ViTs. Shared by all suites.

A call is drawn as plain numbers (a ``Spec``), which is what a failing test prints, and made into tensors from its seed.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import strategies as st

from vitreg_kernels import Rope
from vitreg_kernels.dispatch import Requirements
from vitreg_kernels.measure.cases import attention
from vitreg_kernels.measure.check import usable_backends
from vitreg_kernels.measure.oracle import Oracle
from vitreg_kernels.ops.attention import features
from vitreg_kernels.ops.attention.backends import BACKENDS, sdpa
from vitreg_kernels.ops.attention.types import OUTPUT_NAMES

# Run the code of ``sdpa``, which is held to everything; test_sdpa_kernels.py has what is their own.
TORCHS_KERNELS = [backend.name for backend in sdpa.KERNELS]

# Backends of the plain process. In the interpreter's, test_parity.py and tests/interpreter/ hold the Triton kernels.
PLAIN_BACKENDS = [
    name for name in usable_backends("attention", torch.device("cpu")) if name not in ("triton", *TORCHS_KERNELS)
]

_DECLARED = {backend.name: backend.requirements for backend in BACKENDS}

# Tokens of ViTs with 5 prefix tokens: 98/14 and 196/14 crops, 224/14, 448/14, 518/14 pixels by patch size.
VIT_TOKENS = (54, 201, 261, 1029, 1374)

# Where tiles of 16 and 64 begin and end, with and without five prefix tokens in a tile of their own.
EDGE_TOKENS = (2, 15, 16, 17, 21, 31, 32, 33, 48, 53, 63, 64, 65, 69, 80)


class Spec(NamedTuple):
    """One call.

    Attributes:
        batch, heads, tokens, head_dim: of query, key and value.
        prefix: P.
        dtype: of the inputs.
        layout: how qkv lies in memory, see ``make_qkv``.
        mask: see ``make_mask``; ``None`` for none.
        rope: ``"halves"`` or ``"pairs"``; ``None`` for none.
        rope_batch: whether each image has a rotation of its own.
        scale: factor on the logits.
        lengths: tokens of each packed image; empty if not packed.
        outputs: the statistics asked for.
    """

    batch: int = 2
    heads: int = 2
    tokens: int = 21
    head_dim: int = 16
    prefix: int = 5
    dtype: torch.dtype = torch.float32
    layout: str = "packed"
    mask: str | None = None
    rope: str | None = None
    rope_batch: bool = False
    scale: float | None = None
    lengths: tuple[int, ...] = ()
    outputs: tuple[str, ...] = OUTPUT_NAMES
    seed: int = 0

    def __str__(self) -> str:
        changed = (f"{name}={x}" for name, x in self._asdict().items() if x != self._field_defaults[name])
        return ",".join(changed) or "plain"


LAYOUTS = ("packed", "head_major", "sliced", "strided_channels", "expanded_batch")
MASKS = {
    "key_padding": features.KEY_PADDING_MASK,
    "key_padding_of_all": features.KEY_PADDING_MASK,
    "bool": features.BOOL_MASK,
    "bool_of_heads": features.BOOL_MASK,
    "additive": features.ADDITIVE_MASK,
    "additive_of_queries": features.ADDITIVE_MASK,
    "additive_2d": features.ADDITIVE_MASK,
}


def make_qkv(spec: Spec) -> torch.Tensor:
    """``[B, N, 3, H, D]`` whose query, key and value are views with the strides that ``spec.layout`` names."""
    batch, heads, tokens, head_dim = spec.batch, spec.heads, spec.tokens, spec.head_dim

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=_generator(spec)).to(spec.dtype)

    if spec.layout == "packed":  # what a projection gives
        return randn(batch, tokens, 3, heads, head_dim)
    if spec.layout == "head_major":  # three contiguous [B, H, N, D]
        return randn(3, batch, heads, tokens, head_dim).permute(1, 3, 0, 2, 4)
    if spec.layout == "sliced":  # a window of something larger, at an odd offset
        return randn(batch, tokens + 3, 4, heads + 1, head_dim + 3)[:, 2:-1, 1:, :-1, 1:-2]
    if spec.layout == "strided_channels":  # no unit stride anywhere
        return randn(batch, tokens, 3, heads, 2 * head_dim)[..., ::2]
    return randn(1, tokens, 3, heads, head_dim).expand(batch, -1, -1, -1, -1)  # one image, stride 0


def make_mask(spec: Spec) -> torch.Tensor:
    """A random mask; some leave a query, or an image, no key at all."""
    batch, heads, tokens = spec.batch, spec.heads, spec.tokens
    generator = _generator(spec)

    def keep(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator) > 0.4

    if spec.mask == "key_padding":
        mask = keep(batch, 1, 1, tokens)
        mask[batch // 2 :] &= spec.seed % 2 == 0  # every other time the last images are masked wholly
        return mask
    if spec.mask == "key_padding_of_all":
        return keep(1, 1, 1, tokens)
    if spec.mask == "bool":
        mask = keep(batch, 1, tokens, tokens)
        mask[:, :, 0] = False
        return mask
    if spec.mask == "bool_of_heads":
        return keep(1, heads, 1, tokens)
    shape = {
        "additive": (batch, heads, tokens, tokens),
        "additive_of_queries": (batch, 1, tokens, 1),
        "additive_2d": (tokens, tokens),
    }[spec.mask]
    mask = torch.randn(shape, generator=generator)
    if spec.mask == "additive":
        mask.masked_fill_(torch.rand(shape, generator=generator) > 0.6, -torch.inf)
    if spec.mask == "additive_of_queries":
        mask[..., -1, :] = -torch.inf
    return mask.to(spec.dtype)


def make_rope(spec: Spec) -> Rope:
    """Random rotations whose angle differs even between the two channels of a pair: they must not be mixed up."""
    patches = spec.tokens - (len(spec.lengths) or 1) * spec.prefix
    shape = (spec.batch, patches, spec.head_dim) if spec.rope_batch else (patches, spec.head_dim)
    angle = torch.rand(shape, generator=_generator(spec)) * 2 * math.pi
    return Rope(angle.cos(), angle.sin(), spec.rope == "pairs")


def make_cu_seqlens(lengths: tuple[int, ...]) -> torch.Tensor:
    """``[images + 1]`` int32."""
    return torch.tensor((0, *lengths)).cumsum(0).to(torch.int32)


def make_options(spec: Spec) -> dict[str, Any]:
    """Everything but query, key, value and the backend."""
    options: dict[str, Any] = {"num_prefix_tokens": spec.prefix, "scale": spec.scale, "outputs": spec.outputs}
    if spec.mask:
        options["attn_mask"] = make_mask(spec)
    if spec.rope:
        options["rope"] = make_rope(spec)
    if spec.lengths:
        options["cu_seqlens"] = make_cu_seqlens(spec.lengths)
    return options


def serving(*wanted: str) -> list[str]:
    """The plain backends that declare the features."""
    return [name for name in PLAIN_BACKENDS if set(wanted) <= set(_DECLARED[name].features)]


def needs(backend: str, spec: Spec) -> None:
    """Skips a test of a call that the backend does not declare to serve."""
    served = _DECLARED[backend]
    if spec.dtype not in served.dtypes or (spec.mask and MASKS[spec.mask] not in served.features):
        pytest.skip("not declared")


def widest(backend: str) -> torch.dtype:
    """fp64 where the backend has it, fp32 elsewhere: for tests of equations that hold up to rounding."""
    return torch.float64 if torch.float64 in _DECLARED[backend].dtypes else torch.float32


def views(qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """``[B, N, 3, H, D]`` -> query, key and value, ``[B, H, N, D]``."""
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


@st.composite
def specs(draw: st.DrawFn, serves: Requirements, *, degenerate: bool) -> Spec:
    """Any call that a backend declares to serve. No empty batch: it has nothing to compare.

    Degenerate are images of one token and a zero scale: the eager formula makes no error there to be measured by.
    """
    shortest = 1 if degenerate else 2
    scales = (None, None, 0.05, -0.3, *([0.0] if degenerate else []))
    prefix = draw(st.integers(0, 6))
    lengths = ()
    if features.PACKING in serves.features and draw(st.integers(0, 4)) == 0:
        low = max(shortest, prefix)
        lengths = tuple(draw(st.lists(st.one_of(st.integers(low, 40), st.just(low + 12)), min_size=1, max_size=4)))
    tokens = sum(lengths) or draw(st.one_of(st.sampled_from(EDGE_TOKENS), st.integers(shortest, 80)))
    prefix = prefix if lengths else draw(st.one_of(st.just(min(prefix, tokens)), st.integers(0, tokens)))
    head_dim = draw(st.integers(max(8, serves.head_dims[0]), min(40, serves.head_dims[1])))
    turns = head_dim % 2 == 0 and features.ROPE in serves.features
    rope = draw(st.sampled_from((None, "halves", "pairs"))) if turns else None
    masks = [None, *(name for name, feature in MASKS.items() if feature in serves.features and not lengths)]
    return Spec(
        batch=1 if lengths else draw(st.integers(1, 3)),
        heads=draw(st.integers(1, 4)),
        tokens=tokens,
        head_dim=head_dim,
        prefix=prefix,
        dtype=draw(st.sampled_from(serves.dtypes)),
        layout=draw(st.sampled_from(LAYOUTS)),
        mask=draw(st.sampled_from(masks)),
        rope=rope,
        rope_batch=bool(rope) and draw(st.booleans()),
        scale=draw(st.sampled_from(scales)),
        lengths=lengths,
        outputs=draw(st.one_of(st.just(OUTPUT_NAMES), st.lists(st.sampled_from(OUTPUT_NAMES), unique=True).map(tuple))),
        seed=draw(st.integers(0, 2**16)),
    )


def assert_parity(spec: Spec, backend: str, *, draws: int = 1) -> None:
    """The output, three gradients and the statistics of a backend keep the accuracy rule.

    A small tensor may owe its eager error to luck. ``draws`` calls, alike but for their random numbers, are then judged
    as one by their largest and mean errors.
    """
    similar = (spec._replace(seed=spec.seed + 2 * i) for i in range(draws))  # an odd seed stays odd, see make_mask
    oracles = [oracle(make_qkv(one), **make_options(one)) for one in similar]
    results = _pooled([one.call.run(backend) for one in oracles])
    whole = oracles[0]
    whole.exact, whole.eager = _pooled([one.exact for one in oracles]), _pooled([one.eager for one in oracles])
    assert {"output", "grad_query", "grad_key", "grad_value", *spec.outputs} == results.keys()
    broken = [f"{name}: {accuracy}" for name, accuracy in whole.compare(results).items() if not accuracy.passed]
    assert not broken, "\n".join((f"{backend} on {spec}", *broken))


def oracle(qkv: torch.Tensor, **options: Any) -> Oracle:
    """That of a call of ``[B, N, 3, H, D]``; see ``measure.cases.attention.call``."""
    return Oracle(attention.call(qkv, **options))


def _pooled(results: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([result[name].flatten() for result in results]) for name in results[0]}


def _generator(spec: Spec) -> torch.Generator:
    return torch.Generator().manual_seed(spec.seed)
