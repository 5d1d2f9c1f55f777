"""Bad input: one clear sentence that says what was given and what was expected, and nothing has run."""

from __future__ import annotations

import math

import pytest
import torch

from vitreg_kernels import Rope, UnsupportedError, explain
from vitreg_kernels.functional import register_attention, register_attention_qkv
from vitreg_kernels.ops.attention.backends import BACKENDS

X = torch.zeros(2, 3, 10, 8)  # [B, H, N, D]
PACK = torch.zeros(1, 3, 10, 8)
QKV = torch.zeros(2, 10, 3, 3, 8)
ROPE = torch.zeros(8, 8)  # of 2 prefix tokens


def bounds(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


@pytest.fixture(autouse=True)
def _nothing_runs(change_backends):
    def forward(inputs):
        pytest.fail("a backend ran")

    for backend in BACKENDS:
        change_backends(backend.name, op="attention", forward=forward)


def case(name, error, message, query=X, key=None, value=None, **options):
    qkv = (query, query if key is None else key, query if value is None else value)
    return pytest.param(qkv, options, error, message, id=name)


CASES = [
    # ranks, shapes, dtypes, devices
    case("3-d query", ValueError, ["query must be a [batch, heads, tokens, head dim] tensor", "[3, 10, 8]"], X[0]),
    case("list", ValueError, ["query must be", "a list"], [1.0]),
    case("5-d value", ValueError, ["value must be", "[1, 2, 3, 10, 8]"], value=X[None]),
    case(
        "more heads",
        ValueError,
        ["as many key as query heads", "[2, 3, 10, 8]", "[2, 6, 10, 8]"],
        key=X.repeat(1, 2, 1, 1),
    ),
    case("more keys", ValueError, ["one shape", "[2, 3, 20, 8]"], key=X.repeat(1, 1, 2, 1)),
    case("another batch", ValueError, ["one shape", "[1, 3, 10, 8]"], value=X[:1]),
    case("dtypes differ", ValueError, ["one shape, dtype and device", "float32", "float16"], value=X.half()),
    case("devices differ", ValueError, ["one shape, dtype and device", "on cpu", "on meta"], key=X.to("meta")),
    case("integers", TypeError, ["fp32, fp16, bf16 or fp64", "int64"], X.long()),
    case("complex", TypeError, ["fp32, fp16, bf16 or fp64", "complex64"], X.to(torch.complex64)),
    case("no tokens", ValueError, ["at least one head, token and channel", "[2, 3, 0, 8]"], X[:, :, :0]),
    case("no channels", ValueError, ["at least one head, token and channel", "[2, 3, 10, 0]"], X[..., :0]),
    case("no heads", ValueError, ["at least one head, token and channel", "[2, 0, 10, 8]"], X[:, :0]),
    # numbers
    case("too many prefix tokens", ValueError, ["num_prefix_tokens", "the 10 tokens", "11"], num_prefix_tokens=11),
    case("negative prefix", ValueError, ["num_prefix_tokens", "from 0", "-1"], num_prefix_tokens=-1),
    case("fractional prefix", ValueError, ["num_prefix_tokens must be an int", "1.0"], num_prefix_tokens=1.0),
    case("NaN prefix", ValueError, ["num_prefix_tokens must be an int", "nan"], num_prefix_tokens=math.nan),
    case("NaN scale", ValueError, ["scale must be a finite number", "nan"], scale=math.nan),
    case("infinite scale", ValueError, ["scale must be a finite number", "inf"], scale=math.inf),
    case("scale of text", (TypeError, ValueError), ["scale must be a finite number", "'big'"], scale="big"),
    case("NaN dropout", ValueError, ["dropout_p", "at least 0 and below 1", "nan"], dropout_p=math.nan),
    case("dropout of 1", ValueError, ["dropout_p", "1.0"], dropout_p=1.0),
    case("negative dropout", ValueError, ["dropout_p", "-0.1"], dropout_p=-0.1),
    case("dropout of text", (TypeError, ValueError), ["dropout_p", "'much'"], dropout_p="much"),
    # outputs and backends
    case(
        "unknown output", ValueError, ["unknown output 'entropy'", "'lse'", "'token_norms'"], outputs=("lse", "entropy")
    ),
    case("output as text", TypeError, ["tuple of names", "'lse'", '("lse",)'], outputs="lse"),
    case("unknown backend", ValueError, ["unknown backend 'cudnn'", "'sdpa'", "'reference'"], backend="cudnn"),
    case("backend that cannot", UnsupportedError, ["backend 'xformers'", "cuda", "not on cpu"], backend="xformers"),
    # masks
    case(
        "mask too wide",
        ValueError,
        ["[2, 3, 10, 10]", "[10, 11]", "[batch, 1, 1, tokens]"],
        attn_mask=torch.zeros(10, 11),
    ),
    case("mask of 3 images", ValueError, ["broadcast", "[3, 1, 1, 10]"], attn_mask=torch.zeros(3, 1, 1, 10)),
    case("mask of [B, N]", ValueError, ["broadcast", "[2, 10]", "key-padding"], attn_mask=torch.ones(2, 10).bool()),
    case("1-d mask", ValueError, ["broadcast", "[10]"], attn_mask=torch.ones(10).bool()),
    case("5-d mask", ValueError, ["broadcast", "[1, 2, 3, 10, 10]"], attn_mask=torch.ones(1, 2, 3, 10, 10).bool()),
    case("mask of integers", TypeError, ["bool or float32", "int64"], attn_mask=torch.ones(10, 10).long()),
    case("mask of another dtype", TypeError, ["bool or float32", "float16"], attn_mask=torch.ones(10, 10).half()),
    case("mask elsewhere", TypeError, ["on cpu", "on meta"], attn_mask=torch.ones(10, 10, device="meta")),
    case("mask of lists", TypeError, ["attn_mask must be", "a list"], attn_mask=[[True]]),
    # packing
    case("sum too small", ValueError, ["the 10 packed tokens", "[0, 4, 9]"], PACK, cu_seqlens=bounds(0, 4, 9)),
    case("sum too large", ValueError, ["the 10 packed tokens", "[0, 4, 11]"], PACK, cu_seqlens=bounds(0, 4, 11)),
    case("not from 0", ValueError, ["rise from 0", "[1, 4, 10]"], PACK, cu_seqlens=bounds(1, 4, 10)),
    case("falling", ValueError, ["rise from 0", "[0, 7, 4, 10]"], PACK, cu_seqlens=bounds(0, 7, 4, 10)),
    case("empty image", ValueError, ["rise from 0", "[0, 4, 4, 10]"], PACK, cu_seqlens=bounds(0, 4, 4, 10)),
    case(
        "image within its prefix",
        ValueError,
        ["5 prefix tokens", "one 4 tokens", "lower num_prefix_tokens"],
        PACK,
        cu_seqlens=bounds(0, 4, 10),
        num_prefix_tokens=5,
    ),
    case("no image", ValueError, ["at least one image", "[1] int32"], PACK, cu_seqlens=bounds(0)),
    case("2-d bounds", ValueError, ["[images + 1]", "[1, 2] int32"], PACK, cu_seqlens=bounds(0, 10)[None]),
    case("bounds of floats", ValueError, ["int32", "float32"], PACK, cu_seqlens=bounds(0, 10, dtype=torch.float32)),
    case("list of bounds", ValueError, ["int32 tensor", "a list"], PACK, cu_seqlens=[0, 10]),
    case(
        "bounds on meta",
        ValueError,
        ["on the meta device", "give a batch"],
        PACK.to("meta"),
        cu_seqlens=bounds(0, 10).to("meta"),
    ),
    case("bounds elsewhere", ValueError, ["on cpu", "on meta"], PACK, cu_seqlens=bounds(0, 10).to("meta")),
    case("two rows", ValueError, ["one batch row", "batch of 2"], cu_seqlens=bounds(0, 10)),
    case(
        "longest too short",
        ValueError,
        ["max_seqlen is 5", "6 tokens"],
        PACK,
        cu_seqlens=bounds(0, 4, 10),
        max_seqlen=5,
    ),
    case("longest without bounds", ValueError, ["max_seqlen", "without cu_seqlens"], max_seqlen=10),
    case(
        "mask of a pack",
        ValueError,
        ["exclude each other"],
        PACK,
        cu_seqlens=bounds(0, 10),
        attn_mask=torch.zeros(10, 10),
    ),
    # rope
    case("rope too short", ValueError, ["[9, 8]", "[8, 8] float32"], num_prefix_tokens=1, rope=Rope(ROPE, ROPE)),
    case(
        "rope of half the channels",
        ValueError,
        ["[8, 8] or [2, 8, 8]", "[8, 4]"],
        num_prefix_tokens=2,
        rope=Rope(ROPE[:, :4], ROPE[:, :4]),
    ),
    case(
        "rope of 3 images",
        ValueError,
        ["[2, 8, 8]", "[3, 8, 8]"],
        num_prefix_tokens=2,
        rope=Rope(ROPE.expand(3, 8, 8), ROPE.expand(3, 8, 8)),
    ),
    case("cos and sin differ", ValueError, ["[8, 8]", "[1, 8]"], num_prefix_tokens=2, rope=Rope(ROPE, ROPE[:1])),
    case("rope elsewhere", ValueError, ["on cpu", "on meta"], num_prefix_tokens=2, rope=Rope(ROPE, ROPE.to("meta"))),
    case(
        "rope of integers",
        TypeError,
        ["floating point", "int64"],
        num_prefix_tokens=2,
        rope=Rope(ROPE.long(), ROPE.long()),
    ),
    case("rope as a tuple", TypeError, ["vitreg_kernels.Rope", "a tuple"], num_prefix_tokens=2, rope=(ROPE, ROPE)),
    case(
        "rope of lists", TypeError, ["vitreg_kernels.Rope", "two tensors"], num_prefix_tokens=2, rope=Rope([1.0], [0.0])
    ),
    case(
        "rope of odd channels",
        ValueError,
        ["even head dim", "7"],
        X[..., :7],
        num_prefix_tokens=2,
        rope=Rope(ROPE[:, :7], ROPE[:, :7]),
    ),
    case(
        "rope with a gradient",
        ValueError,
        ["no gradient", "detach"],
        num_prefix_tokens=2,
        rope=Rope(ROPE.clone().requires_grad_(), ROPE),
    ),
    case(
        "packed rope",
        ValueError,
        ["[6, 8]", "[8, 8]"],
        PACK,
        num_prefix_tokens=2,
        rope=Rope(ROPE, ROPE),
        cu_seqlens=bounds(0, 4, 10),
    ),
]


@pytest.mark.parametrize(("qkv", "options", "error", "message"), CASES)
def test_refused_in_one_sentence(qkv, options, error, message):
    with pytest.raises(error) as raised:
        register_attention(*qkv, **options)
    assert_sentence(raised.value, message)


@pytest.mark.parametrize(("qkv", "options", "error", "message"), CASES)
def test_explain_refuses_the_same(qkv, options, error, message):
    if error is UnsupportedError:
        assert explain(*qkv, **options).backend is None
        return
    with pytest.raises(error) as raised:
        explain(*qkv, **options)
    assert_sentence(raised.value, message)


@pytest.mark.parametrize(
    ("qkv", "message"),
    [
        (QKV[0], ["qkv must be a [B, N, 3, H, D] tensor", "[10, 3, 3, 8]"]),
        (QKV[:, :, :2], ["qkv must be a [B, N, 3, H, D] tensor", "[2, 10, 2, 3, 8]"]),
        (QKV.flatten(2), ["qkv must be a [B, N, 3, H, D] tensor", "[2, 10, 72]"]),
        (None, ["qkv must be a [B, N, 3, H, D] tensor", "a NoneType"]),
        (QKV[:, :0], ["at least one head, token and channel", "[2, 3, 0, 8]"]),
    ],
    ids=["no batch", "two of three", "flat", "nothing", "no tokens"],
)
def test_packed_projections(qkv, message):
    with pytest.raises(ValueError) as raised:  # noqa: PT011
        register_attention_qkv(qkv)
    assert_sentence(raised.value, message)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
def test_nested_tensors_are_told_to_come_as_a_pack(layout):
    qkv = torch.nested.nested_tensor([torch.zeros(n, 3, 3, 8) for n in (4, 6)], layout=layout)
    with pytest.raises(TypeError) as raised:
        register_attention_qkv(qkv)
    assert_sentence(raised.value, ["qkv is a nested tensor", "qkv.values()[None]", "cu_seqlens=qkv.offsets()"])
    query = qkv.select(2, 0).transpose(1, 2)
    with pytest.raises(TypeError) as raised:
        register_attention(query, query, query)
    assert_sentence(raised.value, ["query is a nested tensor", "query.values()[None]", "cu_seqlens=query.offsets()"])


def test_packed_projection_of_integers():
    with pytest.raises(TypeError) as raised:
        register_attention_qkv(QKV.long())
    assert_sentence(raised.value, ["fp32, fp16, bf16 or fp64", "int64"])


def test_a_device_no_backend_serves(change_backends):
    for backend in BACKENDS:
        change_backends(backend.name, op="attention", requirements=backend.requirements._replace(devices=("xpu",)))
    with pytest.raises(UnsupportedError) as raised:
        register_attention(X, X, X)
    fragments = ["no backend can serve this call", *(f"{b.name}: " for b in BACKENDS), "not on cpu"]
    assert_sentence(raised.value, fragments, longest=80 * len(BACKENDS))


def assert_sentence(error, fragments, longest=500):
    message = str(error)
    for fragment in fragments:
        assert fragment in message
    assert "\n" not in message
    assert not message.endswith((".", " ")), "error messages end like Python's own"
    assert len(message) < longest
