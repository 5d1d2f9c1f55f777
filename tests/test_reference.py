"""The specification itself: the softmax formula written once more in numpy, and its gradients by finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import MASKS, Spec, make_cu_seqlens, make_mask, make_options, make_qkv, views

from vitreg_kernels import Rope
from vitreg_kernels.functional import register_attention
from vitreg_kernels.ops.attention.types import OUTPUT_NAMES


def formula(query, key, value, scale, added=0.0):
    """Output, probabilities, logits of ``[..., N, D]`` arrays."""
    logits = scale * query @ np.swapaxes(key, -1, -2) + added
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities = weights / weights.sum(-1, keepdims=True)
    return probabilities @ value, probabilities, logits


def rotated(x, angle, prefix, interleaved):
    """Patches turned as complex numbers, a pair of channels each."""
    half = x.shape[-1] // 2
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    turned = (first + 1j * second) * np.exp(1j * angle)
    pairs = (turned.real, turned.imag)
    patches = np.stack(pairs, -1).reshape(x.shape) if interleaved else np.concatenate(pairs, -1)
    return np.concatenate((x[..., :prefix, :], patches[..., prefix:, :]), -2)


def attend(qkv, **options):
    return register_attention(*views(qkv), **options, backend="reference")


def double(**changes):
    return Spec(tokens=9, head_dim=8, prefix=3, dtype=torch.float64, **changes)


@pytest.mark.parametrize("scale", [None, 0.7, -0.7, 0.0])
def test_output_and_statistics_are_the_formula(scale):
    qkv = make_qkv(double())
    output, statistics = attend(qkv, scale=scale, num_prefix_tokens=3, outputs=OUTPUT_NAMES)
    query, key, value = (x.numpy() for x in views(qkv))
    exact, probabilities, logits = formula(query, key, value, 8**-0.5 if scale is None else scale)
    expected = {
        "lse": np.log(np.exp(logits).sum(-1)),
        "prefix_attention": probabilities[:, :, :3],
        "received_attention": probabilities.mean(-2),
        "max_logit": logits.max((-1, -2)),
        "token_norms": np.sqrt((exact**2).sum((1, 3))),
    }
    np.testing.assert_allclose(output, exact, rtol=1e-12, atol=1e-14)
    for name, array in expected.items():
        np.testing.assert_allclose(getattr(statistics, name), array, rtol=1e-12, atol=1e-14, err_msg=name)


@pytest.mark.parametrize("kind", ["bool_of_heads", "additive_2d", "additive_of_queries"])
def test_masks_add_to_the_logits(kind):
    spec = double(mask=kind, seed=1)
    qkv, mask = make_qkv(spec), make_mask(spec)
    added = np.where(mask, 0.0, -np.inf) if mask.dtype == torch.bool else mask.numpy()
    has_keys = np.broadcast_to(added > -np.inf, (2, 2, 9, 9)).any(-1, keepdims=True)
    query, key, value = (x.numpy() for x in views(qkv))
    exact, _, _ = formula(query, key, value, 8**-0.5, np.where(has_keys, added, 0.0))
    np.testing.assert_allclose(attend(qkv, attn_mask=mask), np.where(has_keys, exact, 0.0), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("images", [1, 2], ids=["one rotation", "one an image"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
def test_rope_turns_the_patches_only(interleaved, images):
    qkv = make_qkv(double())
    angle = np.random.default_rng(0).uniform(0, 6.28, (images, 6, 4))
    table = np.repeat(angle, 2, -1) if interleaved else np.concatenate((angle, angle), -1)
    cos, sin = torch.from_numpy(np.cos(table)), torch.from_numpy(np.sin(table))
    rope = Rope(cos, sin, interleaved) if images > 1 else Rope(cos[0], sin[0], interleaved)
    query, key, value = (x.numpy() for x in views(qkv))
    of_all_tokens = np.concatenate((np.zeros((images, 3, 4)), angle), 1)[:, None]
    query, key = (rotated(x, of_all_tokens, 3, interleaved) for x in (query, key))
    exact, _, _ = formula(query, key, value, 8**-0.5)
    np.testing.assert_allclose(attend(qkv, num_prefix_tokens=3, rope=rope), exact, rtol=1e-12, atol=1e-14)


def test_packed_images_attend_to_themselves():
    lengths = (4, 3, 7)
    qkv = torch.randn(1, sum(lengths), 3, 2, 8, dtype=torch.float64)
    output = attend(qkv, num_prefix_tokens=3, cu_seqlens=make_cu_seqlens(lengths))
    images = (formula(*(x.numpy() for x in views(image)), 8**-0.5)[0] for image in qkv.split(lengths, 1))
    np.testing.assert_allclose(output, np.concatenate(list(images), 2), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "spec",
    [
        Spec(),
        *(Spec(mask=mask, seed=1) for mask in MASKS),
        Spec(rope="halves", scale=-0.4),
        Spec(rope="pairs", rope_batch=True),
        Spec(batch=1, lengths=(2, 3), rope="pairs"),
    ],
    ids=str,
)
def test_gradients(spec):
    spec = spec._replace(
        tokens=sum(spec.lengths) or 4, head_dim=2, prefix=2, dtype=torch.float64, layout="head_major", outputs=()
    )
    options = make_options(spec)
    mask = options.pop("attn_mask", None)
    leaves = [x.clone().requires_grad_() for x in views(make_qkv(spec))]
    if mask is not None and mask.dtype != torch.bool:
        mask.masked_fill_(mask == -torch.inf, -30.0)  # finite differences of an infinity say nothing
        leaves.append(mask.requires_grad_())
        mask = None

    def function(query, key, value, added=mask):
        return register_attention(query, key, value, attn_mask=added, **options, backend="reference")

    torch.autograd.gradcheck(function, leaves)
