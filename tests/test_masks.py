"""Masks: what is masked has no say, and queries without any key give zeros."""

from __future__ import annotations

import pytest
import torch
from cases import MASKS, PLAIN_BACKENDS, Spec, make_mask, make_qkv, make_rope, needs, serving, views, widest

from vitreg_kernels.functional import register_attention
from vitreg_kernels.ops.attention import features
from vitreg_kernels.ops.attention.types import OUTPUT_NAMES

every_backend = pytest.mark.parametrize("backend", PLAIN_BACKENDS)
# Those that serve any mask.
masking_backends = pytest.mark.parametrize("backend", serving(features.BOOL_MASK, features.ADDITIVE_MASK))


def double(**changes):
    return Spec(dtype=torch.float64, **changes)


def gradients(qkv, mask, backend, upstream):
    """Of qkv, and of the mask if it is differentiable."""
    qkv = qkv.detach().requires_grad_()
    leaves = [qkv, mask] if mask.requires_grad else [qkv]
    return torch.autograd.grad(register_attention(*views(qkv), attn_mask=mask, backend=backend), leaves, upstream)


@every_backend
def test_masked_keys_are_as_good_as_absent(backend):
    qkv = make_qkv(Spec(batch=1, dtype=widest(backend)))
    keep = torch.rand(21) > 0.4
    padded, padded_statistics = register_attention(
        *views(qkv), attn_mask=keep[None, None, None], outputs=("lse", "received_attention"), backend=backend
    )
    query, key, value = views(qkv)
    logits = query @ key[:, :, keep].transpose(-2, -1) * 16**-0.5
    torch.testing.assert_close(padded, logits.softmax(-1) @ value[:, :, keep])
    torch.testing.assert_close(padded_statistics.lse, logits.logsumexp(-1))
    assert (padded_statistics.received_attention[..., ~keep] == 0).all()


HIDING = {
    "key_padding": (3, 1, 1, 21),
    "key_padding_of_all": (1, 1, 1, 21),
    "bool": (3, 1, 21, 21),
    "bool_of_heads": (1, 2, 1, 21),
    "additive": (3, 2, 21, 21),
    "additive_2d": (21, 21),
}


@every_backend
@pytest.mark.parametrize("rope", [None, "halves"])
@pytest.mark.parametrize("held", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("kind", HIDING)
def test_a_key_that_no_query_sees_may_hold_anything(backend, kind, held, rope):
    """To the last bit what the call gives where those keys and values are 0: outputs, statistics and gradients."""
    spec = Spec(batch=3, mask=kind, rope=rope)
    needs(backend, spec)
    hidden = torch.rand((*HIDING[kind][:-2], 1, 21)) < 0.3
    seen = torch.rand(HIDING[kind]) < 0.8 if "key_padding" not in kind else torch.ones(HIDING[kind], dtype=torch.bool)
    mask = seen & ~hidden
    if kind.startswith("additive"):
        mask = torch.randn(mask.shape).masked_fill(~mask, -torch.inf).requires_grad_("2d" not in kind)
    hidden = hidden.mT.expand(3, 2, 21, 1) if hidden.ndim > 2 else hidden.T
    query, key, value = views(make_qkv(spec))
    results = []
    for content in (0.0, held):
        leaves = [query, key.masked_fill(hidden, content), value.masked_fill(hidden, content)]
        leaves = [x.detach().requires_grad_() for x in leaves] + [mask] * mask.requires_grad
        options = {"num_prefix_tokens": 5, "rope": make_rope(spec) if rope else None, "outputs": OUTPUT_NAMES}
        output, statistics = register_attention(*leaves[:3], attn_mask=mask, backend=backend, **options)
        upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
        results.append([output, *statistics, *torch.autograd.grad(output, leaves, upstream)])
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)
        assert not poisoned.isnan().any()
    for gradient in results[1][-2 - mask.requires_grad :][:2]:
        assert (gradient.masked_select(hidden.expand_as(gradient)) == 0).all()


@masking_backends
@pytest.mark.parametrize(
    "shape",
    [(21, 21), (1, 21), (21, 1), (2, 21, 21), (3, 1, 1, 21), (1, 2, 21, 1), (3, 2, 21, 21), (1, 1), (3, 1, 1, 1)],
)
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_any_shape_that_broadcasts(backend, shape, kind):
    qkv = make_qkv(double(batch=3))
    mask = torch.rand(shape) > 0.3 if kind == "bool" else torch.randn(shape, dtype=torch.float64)
    options = {"num_prefix_tokens": 5, "outputs": OUTPUT_NAMES, "backend": backend}
    actual = register_attention(*views(qkv), attn_mask=mask, **options)
    full = mask.expand(3, 2, 21, 21).contiguous()
    expected = register_attention(*views(qkv), attn_mask=full, **options)
    torch.testing.assert_close(actual, expected)


@masking_backends
def test_bool_is_additive_of_infinity(backend):
    spec = double(batch=3, mask="bool")
    qkv, keep = make_qkv(spec), make_mask(spec)
    added = torch.zeros(keep.shape, dtype=torch.float64).masked_fill(~keep, -torch.inf)
    options = {"num_prefix_tokens": 5, "outputs": OUTPUT_NAMES, "backend": backend}
    torch.testing.assert_close(
        register_attention(*views(qkv), attn_mask=keep, **options),
        register_attention(*views(qkv), attn_mask=added, **options),
    )


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", MASKS)
def test_queries_without_a_key(backend, dtype, kind):
    """Zeros, and zero gradients; nothing is ever NaN."""
    spec = Spec(batch=3, dtype=dtype, mask=kind)
    needs(backend, spec)
    qkv, mask = make_qkv(spec), make_mask(spec)
    if kind.startswith("additive"):
        mask[..., 0, :] = -torch.inf
        alone = mask.expand(3, 2, 21, 21).eq(-torch.inf).all(-1)
    else:
        mask[..., 0, :] = False
        alone = ~mask.expand(3, 2, 21, 21).any(-1)
    assert alone.any()
    output = register_attention(*views(qkv), attn_mask=mask, backend=backend)
    assert (output[alone] == 0).all()
    (gradient,) = gradients(qkv, mask, backend, torch.randn_like(output))
    grad_query = views(gradient)[0]
    assert (grad_query[alone] == 0).all()
    assert output.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("backend", serving(features.MASK_GRADIENT))
@pytest.mark.parametrize("shape", [(21, 21), (3, 1, 1, 21), (1, 2, 21, 1), (3, 2, 21, 21)])
def test_gradient_of_an_additive_mask(backend, shape):
    """Summed to the mask's own shape; zero for a query without a key."""
    qkv = make_qkv(double(batch=3))
    mask = torch.randn(shape, dtype=torch.float64)
    mask[..., 0, :] = -torch.inf
    upstream = torch.randn(3, 2, 21, 16, dtype=torch.float64)
    _, grad_mask = gradients(qkv, mask.requires_grad_(), backend, upstream)

    leaf = mask.detach().masked_fill(mask == -torch.inf, -1e4).requires_grad_()
    query, key, value = views(qkv)
    plain = (query @ key.transpose(-2, -1) / 4 + leaf).softmax(-1)
    dead = (mask == -torch.inf).expand(3, 2, 21, 21).all(-1, keepdim=True)
    (expected,) = torch.autograd.grad((plain @ value).masked_fill(dead, 0.0), leaf, upstream)
    torch.testing.assert_close(grad_mask, expected)
