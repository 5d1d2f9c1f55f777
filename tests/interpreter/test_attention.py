"""Forward, backward and statistics of the Triton kernels against the fp64 reference."""

from __future__ import annotations

import pytest
import torch
from harness import call, check, packed_bounds, random_rope
from torch import Tensor

from vitreg_kernels.measure.cases.attention import MASSIVE_QUERY_AND_KEY

# Around every boundary of the tiling: one token, one tile, one token more; prefixes that get a tile of their own
# (64, 128 and 256 patches) and that do not; the lengths of ViTs.
LENGTHS = [
    (1, 0),
    (1, 1),
    (2, 0),
    (15, 1),
    (16, 0),
    (17, 1),
    (54, 5),
    (64, 0),
    (65, 1),
    (69, 5),
    (70, 20),
    (133, 5),
    (201, 5),
    (261, 5),
    (272, 0),
    (273, 1),
    (300, 0),
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("tokens", "prefix"), LENGTHS)
def test_length(tokens: int, prefix: int) -> None:
    check(call(tokens, prefix))


@pytest.mark.parametrize("arch", [90, 100])
@pytest.mark.parametrize(("tokens", "prefix"), [(54, 5), (201, 5), (261, 5)])
def test_tiles_of_other_architectures(tokens: int, prefix: int, arch: int) -> None:
    check(call(tokens, prefix, 64, torch.float16), arch=arch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("head_dim", [16, 17, 24, 64, 72, 80, 128])
def test_head_dim(head_dim: int, dtype: torch.dtype) -> None:
    check(call(37, 5, head_dim, dtype, batch=2, heads=2))


@pytest.mark.parametrize(("tokens", "prefix"), [(54, 5), (201, 5), (261, 5)])
def test_half_precision(tokens: int, prefix: int) -> None:
    check(call(tokens, prefix, 64, torch.float16))


@pytest.mark.parametrize("scale", [1.0, -0.3, 0.0])
def test_scale(scale: float) -> None:
    check(call(40, 1, scale=scale, attn_mask=torch.rand(1, 1, 1, 40) < 0.5))


def _layouts() -> dict[str, Tensor]:
    return {
        "head-major": torch.randn(2, 2, 21, 24),
        "channels before tokens": torch.randn(2, 2, 24, 21).transpose(2, 3),
        "tokens first": torch.randn(21, 2, 2, 24).permute(1, 2, 0, 3),
        "every other token and channel": torch.randn(2, 2, 42, 48)[:, :, ::2, ::2],
        "one head for all": torch.randn(2, 1, 21, 24).expand(2, 2, 21, 24),
    }


@pytest.mark.parametrize("layout", _layouts())
def test_strides(layout: str) -> None:
    query, key, value = (_layouts()[layout] for _ in range(3))
    check(call(21, 1, 24, batch=2, heads=2, query=query, key=key, value=value))


@pytest.mark.parametrize("shape", [(), (2, 2, 21, 1), (1, 2, 1, 24)])
def test_expanded_gradient(shape: tuple[int, ...]) -> None:
    check(call(21, 1, 24, batch=2, heads=2), grad_output=torch.randn(shape).expand(2, 2, 21, 24))


@pytest.mark.parametrize(("tokens", "prefix"), [(1, 0), (50, 5), (69, 5), (100, 0)])
def test_key_padding(tokens: int, prefix: int) -> None:
    mask = torch.rand(3, 1, 1, tokens) < 0.6
    mask[1] = False
    actual = check(call(tokens, prefix, batch=3, attn_mask=mask))
    assert (actual["output"][1] == 0).all()
    assert (actual["lse"][1] == -torch.inf).all()
    assert (actual["max_logit"][1] == -torch.inf).all()
    padded = ~mask[:, 0, 0]
    for name in ("grad_key", "grad_value"):
        assert (actual[name].transpose(1, 2)[padded] == 0).all(), f"{name} of a padded key"
    for name in ("grad_query", "grad_key", "grad_value", "received_attention", "prefix_attention"):
        assert (actual[name][1] == 0).all(), f"{name} of an image without keys"


@pytest.mark.parametrize("layout", ["one row for all images", "strided", "one value"])
def test_key_padding_strides(layout: str) -> None:
    mask = {
        "one row for all images": torch.rand(1, 1, 1, 50) < 0.5,
        "strided": (torch.rand(100, 2) < 0.5).t()[:, None, None, ::2],
        "one value": torch.ones(1, 1, 1, 1, dtype=torch.bool),
    }[layout]
    check(call(50, 3, batch=2, attn_mask=mask))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("tokens", "prefix"), [(54, 5), (69, 5), (3, 3)])
@pytest.mark.parametrize("head_dim", [16, 64, 72])
def test_rope(head_dim: int, tokens: int, prefix: int, interleaved: bool) -> None:
    rope = random_rope(tokens - prefix, head_dim, interleaved=interleaved)
    check(call(tokens, prefix, head_dim, rope=rope))


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_by_image(interleaved: bool) -> None:
    check(call(40, 2, batch=2, rope=random_rope(2, 38, 32, interleaved=interleaved)))
    check(call(40, 2, batch=2, rope=random_rope(1, 38, 32, interleaved=interleaved)))


def test_rope_of_other_dtypes_and_strides() -> None:
    rope = random_rope(19, 24, interleaved=False)
    check(call(20, 1, 24, torch.float16, rope=rope._replace(cos=rope.cos.double(), sin=rope.sin.double())))
    columns = rope.cos.t().contiguous().t()
    check(call(20, 1, 24, rope=rope._replace(cos=columns)))
    constant = rope.sin[:1].expand(19, 24)
    check(call(20, 1, 24, rope=rope._replace(sin=constant)))


def test_rope_in_half_precision() -> None:
    check(call(69, 5, 64, torch.float16, rope=random_rope(64, 64, interleaved=False)))


@pytest.mark.parametrize("rotated", [None, pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize(("lengths", "prefix"), [((1, 70, 1), 1), ((54, 5, 17), 5), ((1, 2, 130), 0), ((69, 69), 5)])
def test_packing(lengths: tuple[int, ...], prefix: int, rotated: bool | None) -> None:
    tokens = sum(lengths)
    rope = None if rotated is None else random_rope(tokens - prefix * len(lengths), 32, interleaved=rotated)
    packing = {"cu_seqlens": packed_bounds(lengths), "max_seqlen": max(lengths)}
    check(call(tokens, prefix, rope=rope, **packing))


def test_packing_with_a_loose_bound_on_the_length() -> None:
    check(call(40, 1, cu_seqlens=packed_bounds((7, 30, 3)), max_seqlen=200))


@pytest.mark.parametrize("massive", ["query", "key", "value", "query and key"])
def test_massive_activations(massive: str) -> None:
    """One token of norm 500 among tokens of norm 20; four heads, lest the eager formula's error be small by luck."""
    inputs = call(69, 5, 64, torch.float16, heads=4)
    for name in ("query", "key", "value"):
        x = getattr(inputs, name)
        x.copy_(x.float() / x.float().norm(dim=-1, keepdim=True) * 20)
        if name == massive:
            x[:, :, 30] *= 25
    if massive == "query and key":
        inputs.query[:, :, 30], inputs.key[:, :, 30] = MASSIVE_QUERY_AND_KEY
    check(inputs)


@pytest.mark.parametrize("offset", [300.0, -300.0])
def test_large_logits(offset: float) -> None:
    """All logits of a size that overflows or underflows an exponential that does not subtract the maximum."""
    inputs = call(69, 5, 32)
    inputs.query[..., 0] = offset
    inputs.key[..., 0] = 8.0
    check(inputs._replace(scale=1.0))


def test_image_does_not_depend_on_its_batch() -> None:
    """Bitwise: no sum crosses programs, so neither the other images nor their number can show."""
    inputs = call(69, 5, 32, batch=2, heads=2)
    grad_output = torch.randn(inputs.query.shape)
    together = check(inputs, grad_output=grad_output)
    second = {"query": inputs.query[1:2], "key": inputs.key[1:2], "value": inputs.value[1:2]}
    alone = check(inputs._replace(**second), grad_output=grad_output[1:2])
    for name, result in alone.items():
        assert torch.equal(result[0], together[name][1]), name
