"""``cu_seqlens``: a pack gives what its images give one by one."""

from __future__ import annotations

import pytest
import torch
from cases import PLAIN_BACKENDS, Spec, make_cu_seqlens, make_qkv, make_rope, views, widest

from vitreg_kernels import Rope
from vitreg_kernels.functional import register_attention, register_attention_qkv
from vitreg_kernels.ops.attention.types import OUTPUT_NAMES

PREFIX = 3
PACKS = {
    "one image": (20,),
    "one length": (9, 9, 9),
    "multi-crop": (21, 21, 9, 9, 9, 9),
    "mixed": (9, 21, 9, 4, 30),
    "a prefix alone": (3, 12, 3),
}

every_backend = pytest.mark.parametrize("backend", PLAIN_BACKENDS)
every_pack = pytest.mark.parametrize("lengths", PACKS.values(), ids=PACKS)


def one_by_one(qkv, lengths, rope, backend):
    """Output, gradient and statistics of each image called alone, put side by side."""
    outputs, statistics = [], []
    patches = iter(zip(*(x.split([n - PREFIX for n in lengths]) for x in rope[:2]), strict=True) if rope else ())
    for image in qkv.split(lengths, 1):
        own = Rope(*next(patches), rope.interleaved) if rope else None
        output, stats = register_attention(
            *views(image), num_prefix_tokens=PREFIX, rope=own, outputs=OUTPUT_NAMES, backend=backend
        )
        outputs.append(output)
        statistics.append(stats)
    lse, prefix, received, max_logit, norms = zip(*statistics, strict=True)
    joined = (
        torch.cat(lse, -1),
        torch.cat(prefix, -1),
        torch.cat(received, -1),
        torch.cat(max_logit),
        torch.cat(norms, -1),
    )
    return torch.cat(outputs, 2), joined


@every_backend
@every_pack
@pytest.mark.parametrize("rope", [None, "halves", "pairs"])
def test_equals_the_images_alone(backend, lengths, rope):
    spec = Spec(batch=1, tokens=sum(lengths), lengths=lengths, prefix=PREFIX, rope=rope, dtype=widest(backend))
    qkv = make_qkv(spec).requires_grad_()
    rope = make_rope(spec) if rope else None
    output, statistics = register_attention(
        *views(qkv),
        num_prefix_tokens=PREFIX,
        rope=rope,
        cu_seqlens=make_cu_seqlens(lengths),
        outputs=OUTPUT_NAMES,
        backend=backend,
    )
    expected, expected_statistics = one_by_one(qkv, lengths, rope, backend)
    torch.testing.assert_close(output, expected)
    for name, actual, exact in zip(OUTPUT_NAMES, statistics, expected_statistics, strict=True):
        torch.testing.assert_close(actual, exact, msg=name)
    gradient = torch.randn_like(output)
    (grad,) = torch.autograd.grad(output, qkv, gradient)
    (expected_grad,) = torch.autograd.grad(expected, qkv, gradient)
    torch.testing.assert_close(grad, expected_grad)


@every_backend
def test_no_image_sees_another(backend):
    """Values of 1e4 in one image leave no trace in its neighbours."""
    lengths = (9, 21, 9)
    qkv = make_qkv(Spec(batch=1, tokens=39))
    loud = qkv.clone()
    loud[:, 9:30] *= 1e4
    packed = {"cu_seqlens": make_cu_seqlens(lengths), "num_prefix_tokens": PREFIX, "backend": backend}
    quiet_output, loud_output = (register_attention_qkv(x, **packed) for x in (qkv, loud))
    assert torch.equal(quiet_output[:, :9], loud_output[:, :9])
    assert torch.equal(quiet_output[:, 30:], loud_output[:, 30:])
    assert not torch.equal(quiet_output[:, 9:30], loud_output[:, 9:30])


@every_backend
def test_max_seqlen_and_int64_bounds_change_nothing(backend):
    lengths = (9, 21, 9)
    qkv = make_qkv(Spec(batch=1, tokens=39))
    expected = register_attention_qkv(qkv, cu_seqlens=make_cu_seqlens(lengths), backend=backend)
    bounds = make_cu_seqlens(lengths).long()
    for longest in (None, 21, 100):
        actual = register_attention_qkv(qkv, cu_seqlens=bounds, max_seqlen=longest, backend=backend)
        assert torch.equal(actual, expected)


@every_backend
def test_received_attention_sums_to_one_an_image(backend):
    lengths = (9, 21, 9)
    _, statistics = register_attention_qkv(
        make_qkv(Spec(batch=1, tokens=39)),
        cu_seqlens=make_cu_seqlens(lengths),
        outputs=("received_attention",),
        backend=backend,
    )
    for image in statistics.received_attention.split(lengths, -1):
        torch.testing.assert_close(image.sum(-1), torch.ones(1, 2))
