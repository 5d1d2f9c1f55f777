"""Dropout of attention weights: unbiased, of the right strength, reproducible, and unseen by the statistics."""

from __future__ import annotations

import pytest
import torch
from cases import Spec, make_options, make_qkv, serving, views

from vitreg_kernels.functional import register_attention, register_attention_qkv
from vitreg_kernels.ops.attention import features
from vitreg_kernels.ops.attention.types import OUTPUT_NAMES

P = 0.25

every_backend = pytest.mark.parametrize("backend", serving(features.DROPOUT))


@every_backend
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_mean_and_variance_over_many_runs(backend, masked):
    """A weight is kept with probability 1 - p and then divided by it: mean P V, variance p / (1 - p) P^2 V^2."""
    runs, tokens = 20_000, 6
    qkv = make_qkv(Spec(batch=1, heads=1, tokens=tokens, head_dim=8))
    options = {"num_prefix_tokens": tokens, "backend": backend}
    if masked:
        options["attn_mask"] = torch.tensor([True, True, False, True, True, False])[None, None, None]
    mean, statistics = register_attention(*views(qkv), **options, outputs=("prefix_attention",))
    value = views(qkv)[2]
    variance = P / (1 - P) * statistics.prefix_attention.square() @ value.square()

    dropped = register_attention(*views(qkv.expand(runs, -1, -1, -1, -1)), **options, dropout_p=P)
    standard_error = (variance / runs).sqrt()
    assert ((dropped.mean(0, keepdim=True) - mean).abs() < 5 * standard_error).all()
    torch.testing.assert_close(dropped.var(0, keepdim=True), variance, rtol=0.1, atol=0.0)


@every_backend
@pytest.mark.parametrize(
    "spec", [Spec(), Spec(mask="bool"), Spec(rope="pairs"), Spec(batch=1, lengths=(9, 12))], ids=str
)
def test_the_seed_decides(backend, spec):
    qkv, options = make_qkv(spec), make_options(spec)

    def run(seed):
        torch.manual_seed(seed)
        return register_attention_qkv(qkv, **options, dropout_p=P, backend=backend)[0]

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


@every_backend
def test_none_at_zero(backend):
    """Exactly the call without dropout, and no random number is drawn."""
    qkv = make_qkv(Spec())
    state = torch.get_rng_state()
    zero = register_attention_qkv(qkv, dropout_p=0.0, backend=backend)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(zero, register_attention_qkv(qkv, backend=backend))


@every_backend
def test_statistics_describe_the_softmax_before_dropout(backend):
    spec = Spec(mask="key_padding", seed=1)
    qkv, options = make_qkv(spec), make_options(spec)
    output, dropped = register_attention(*views(qkv), **options, dropout_p=0.5, backend=backend)
    undropped_output, undropped = register_attention(*views(qkv), **options, backend=backend)
    assert not torch.equal(output, undropped_output)
    for name in OUTPUT_NAMES[:-1]:
        torch.testing.assert_close(getattr(dropped, name), getattr(undropped, name), msg=name)
    # Token norms are those of the output, which dropout does change.
    torch.testing.assert_close(dropped.token_norms, output.square().sum((1, 3)).sqrt())


@every_backend
def test_the_gradient_has_the_forward_s_dropout(backend):
    """The output is linear in the value, dropout included: <dO, O> = <dV, V>."""
    query, key, value = views(make_qkv(Spec(dtype=torch.float64)))
    value = value.detach().requires_grad_()
    output = register_attention(query, key, value, dropout_p=0.5, backend=backend)
    upstream = torch.randn_like(output)
    (gradient,) = torch.autograd.grad(output, value, upstream)
    torch.testing.assert_close((gradient * value).sum(), (upstream * output).sum())
