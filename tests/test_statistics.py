"""What ``outputs=`` gives on every backend: shapes, dtypes, meaning, and that it never holds N x N."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import PLAIN_BACKENDS, Spec, make_options, make_qkv, needs, views

from vitreg_kernels import AttentionOutputs
from vitreg_kernels.functional import register_attention
from vitreg_kernels.ops.attention.types import OUTPUT_NAMES

every_backend = pytest.mark.parametrize("backend", PLAIN_BACKENDS)


def attend(spec, backend, **changes):
    return register_attention(*views(make_qkv(spec)), **{**make_options(spec), **changes}, backend=backend)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prefix", [0, 5, 21])
def test_shapes_and_dtypes(backend, dtype, prefix):
    _, statistics = attend(Spec(batch=3, dtype=dtype, prefix=prefix), backend)
    assert {name: tuple(x.shape) for name, x in statistics._asdict().items()} == {
        "lse": (3, 2, 21),
        "prefix_attention": (3, 2, prefix, 21),
        "received_attention": (3, 2, 21),
        "max_logit": (3, 2),
        "token_norms": (3, 21),
    }
    assert {x.dtype for x in statistics} == {torch.float32}


@every_backend
def test_shapes_when_packed(backend):
    _, statistics = attend(Spec(batch=1, lengths=(6, 9, 6)), backend)
    shapes = [(1, 2, 21), (1, 2, 5, 21), (1, 2, 21), (3, 2), (1, 21)]
    assert [tuple(x.shape) for x in statistics] == shapes


@every_backend
def test_only_what_was_asked_for(backend):
    """Every subset, in any order, has the same numbers as all together."""
    everything_and_output = attend(Spec(), backend)
    for count in range(1, 5):
        for names in itertools.combinations(reversed(OUTPUT_NAMES), count):
            output, statistics = attend(Spec(), backend, outputs=names)
            assert isinstance(statistics, AttentionOutputs)
            torch.testing.assert_close(output, everything_and_output[0])
            for name, x in statistics._asdict().items():
                if name not in names:
                    assert x is None, name
                else:
                    torch.testing.assert_close(x, getattr(everything_and_output[1], name), msg=f"{name} of {names}")
    assert isinstance(attend(Spec(), backend, outputs=[]), torch.Tensor)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "spec",
    [Spec(), Spec(rope="halves"), Spec(mask="key_padding", seed=1), Spec(mask="bool"), Spec(mask="additive")],
    ids=str,
)
def test_they_agree_with_one_another(backend, dtype, spec):
    needs(backend, spec)
    spec = spec._replace(batch=4, dtype=dtype)
    output, (lse, prefix_attention, received_attention, max_logit, token_norms) = attend(spec, backend)
    has_keys = lse > -torch.inf
    # Probabilities sum to 1 along the keys of every query that has any; so does their mean over the queries.
    torch.testing.assert_close(prefix_attention.sum(-1), has_keys[:, :, :5].float())
    torch.testing.assert_close(received_attention.sum(-1), has_keys.float().mean(-1))
    # The largest logit bounds the log-sum-exp from both sides.
    assert (lse.amax(-1) >= max_logit).all()
    assert (lse <= max_logit[:, :, None] + torch.tensor(21.0).log() + 1e-5).all()
    # A probability is exp(logit - lse), so no logit of the prefix exceeds the largest.
    assert (prefix_attention.log() + lse[:, :, :5, None] <= max_logit[:, :, None, None] + 1e-4).all()
    torch.testing.assert_close(token_norms, output.float().square().sum((1, 3)).sqrt())
    assert (output.transpose(2, 3).isfinite()).all()


@every_backend
def test_image_without_a_key(backend):
    keep = torch.ones(3, 1, 1, 21, dtype=torch.bool)
    keep[1] = False
    output, statistics = attend(Spec(batch=3), backend, attn_mask=keep)
    assert (output[1] == 0).all()
    assert (statistics.lse[1] == -torch.inf).all()
    assert (statistics.max_logit[1] == -torch.inf).all()
    assert (statistics.prefix_attention[1] == 0).all()
    assert (statistics.received_attention[1] == 0).all()
    assert (statistics.token_norms[1] == 0).all()
    for image in (0, 2):
        for name, x in statistics._asdict().items():
            assert x[image].isfinite().all(), name
            assert (x[image] != 0).any(), name


def peak_memory(function):
    """Bytes of tensors that were alive at once, beyond those alive before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def attention_memory(tokens, backend, **options):
    qkv = make_qkv(Spec(batch=1, heads=1, tokens=tokens))
    return peak_memory(
        lambda: register_attention(*views(qkv), num_prefix_tokens=5, outputs=OUTPUT_NAMES, backend=backend, **options)
    )


def test_the_meter_sees_n_by_n():
    assert attention_memory(2000, "reference") > 2000 * 2000 * 4


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_memory_never_holds_n_by_n(masked):
    tokens = 7000
    options = {"attn_mask": torch.rand(1, 1, 1, tokens) > 0.2} if masked else {}
    assert attention_memory(tokens, "sdpa", **options) < tokens * tokens * 4 / 2
