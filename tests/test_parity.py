"""Every backend of attention usable here on the shapes of ViTs and at extremes, beside what tests/contract holds it to.

``TRITON_INTERPRET=1 pytest tests/test_parity.py`` adds the Triton kernels.
"""

from __future__ import annotations

import pytest
import torch
from cases import LAYOUTS, TORCHS_KERNELS, VIT_TOKENS, Spec, assert_parity, make_options, make_qkv, oracle, views

from vitreg_kernels._triton.mode import INTERPRETING
from vitreg_kernels.functional import register_attention, register_attention_qkv
from vitreg_kernels.measure.cases.attention import MASSIVE_QUERY_AND_KEY
from vitreg_kernels.measure.check import usable_backends
from vitreg_kernels.ops.attention.backends import BACKENDS
from vitreg_kernels.ops.attention.types import OUTPUT_NAMES

# The reference is what the others are held against; test_reference.py holds it against a formula of its own.
HERE = usable_backends("attention", torch.device("cpu"))
USABLE = [b for b in BACKENDS if b.name in HERE and b.name not in ("reference", *TORCHS_KERNELS)]

every_backend = pytest.mark.parametrize("backend", USABLE, ids=lambda backend: backend.name)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def test_there_is_something_to_test():
    assert ({"triton", "sdpa"} if INTERPRETING else {"sdpa"}) <= {backend.name for backend in USABLE}


@every_backend
@every_dtype
@pytest.mark.parametrize("tokens", VIT_TOKENS)
def test_shapes_of_vits(backend, dtype, tokens):
    if dtype not in backend.requirements.dtypes:
        pytest.skip("not declared")
    heads = 3 if tokens < 1000 else 1
    assert_parity(Spec(batch=1, heads=heads, tokens=tokens, head_dim=64, dtype=dtype), backend.name)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("massive", [0, 1, 2, [0, 1]], ids=["query", "key", "value", "query and key"])
def test_massive_activations(backend, dtype, massive):
    """One token of norm 500 among tokens of norm 20."""
    if dtype not in backend.requirements.dtypes:
        pytest.skip("not declared")
    qkv = make_qkv(Spec(batch=2 if INTERPRETING else 12, tokens=69, head_dim=64))
    qkv *= 20 / qkv.norm(dim=-1, keepdim=True)
    if massive == [0, 1]:
        qkv[:, 41, massive] = MASSIVE_QUERY_AND_KEY[:, None]
    else:
        qkv[:, 41, massive] *= 25
    errors = oracle(qkv.to(dtype), num_prefix_tokens=5, outputs=OUTPUT_NAMES).errors(backend.name)
    assert not [f"{name}: {accuracy}" for name, accuracy in errors.items() if not accuracy.passed]


@every_backend
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_logits_that_overflow_the_dtype(backend, dtype):
    """Query and key of one token along one direction, norm 500: a raw product of 250000, which fp16 cannot hold."""
    if dtype not in backend.requirements.dtypes:
        pytest.skip("not declared")
    qkv = make_qkv(Spec(tokens=69, head_dim=64))
    qkv[:, 41, :2] = 62.5
    judge = oracle(qkv.to(dtype), num_prefix_tokens=5, outputs=OUTPUT_NAMES)
    results = judge.call.run(backend.name)
    assert all(tensor.isfinite().all() for tensor in results.values())
    names = ("output", "lse", "max_logit")
    errors = judge.compare({name: results[name] for name in names})
    assert not [f"{name}: {accuracy}" for name, accuracy in errors.items() if not accuracy.passed]


@every_backend
@pytest.mark.parametrize(
    "spec",
    [
        *(Spec(layout=layout) for layout in LAYOUTS),
        Spec(mask="key_padding"),
        Spec(rope="pairs"),
        Spec(batch=1, lengths=(9, 12)),
        Spec(batch=0),
        Spec(heads=1),
    ],
    ids=str,
)
def test_layout_of_the_output(backend, spec):
    """A ``[B, H, N, D]`` view of contiguous ``[B, N, H, D]`` memory, and ``[B, N, C]`` of the same numbers."""
    qkv, options = make_qkv(spec), make_options(spec)
    output, _ = register_attention(*views(qkv), **options, backend=backend.name)
    assert output.transpose(1, 2).is_contiguous()
    packed, _ = register_attention_qkv(qkv, **options, backend=backend.name)
    assert packed.is_contiguous()
    assert torch.equal(packed, output.transpose(1, 2).flatten(2))


@every_backend
def test_gradient_of_the_packed_projection(backend):
    """The same numbers as the gradients of query, key and value, in qkv's shape."""
    spec = Spec(rope="halves", mask="key_padding")
    qkv = make_qkv(spec).requires_grad_()
    options = make_options(spec)
    gradient = torch.randn(2, 21, 32)
    packed, _ = register_attention_qkv(qkv, **options, backend=backend.name)
    output, _ = register_attention(*views(qkv), **options, backend=backend.name)
    (actual,) = torch.autograd.grad(packed, qkv, gradient)
    (expected,) = torch.autograd.grad(output.transpose(1, 2).flatten(2), qkv, gradient)
    if backend.opaque:
        assert actual.is_contiguous()
    torch.testing.assert_close(actual, expected)
