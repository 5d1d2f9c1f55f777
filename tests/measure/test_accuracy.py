"""The rule everything else is judged by: what it lets pass and what it does not."""

from __future__ import annotations

import math

import pytest
import torch

from vitreg_kernels.measure.accuracy import compare

EXACT = torch.linspace(-4, 4, 1001, dtype=torch.float64)
EPS = torch.finfo(torch.float32).eps


def off_by(error):
    return EXACT + error


def judged(actual, eager=EXACT, terms=1, **options):
    return compare(actual, EXACT, eager, terms=terms, **options)


def test_up_to_twice_the_eager_error_passes():
    eager = off_by(1e-3)
    assert judged(off_by(1.99e-3), eager).passed
    assert not judged(off_by(2.01e-3), eager).passed


def test_one_large_error_does_not_pass():
    actual = off_by(1e-4)
    actual[500] += 2e-3
    accuracy = judged(actual, off_by(1e-3))
    assert accuracy.mean_error < accuracy.mean_bound
    assert not accuracy.passed


def test_many_small_errors_do_not_pass():
    """Far below the largest eager error, but everywhere."""
    eager = EXACT.clone()
    eager[500] += 0.01  # on average 1e-5
    accuracy = judged(off_by(2.5e-5), eager)
    assert accuracy.max_error < accuracy.max_bound
    assert not accuracy.passed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rounding_the_exact_result_always_passes(dtype):
    assert judged(EXACT.to(dtype), EXACT.to(dtype)).passed


def test_the_accumulator_may_be_off_by_eps_root_k():
    """In fp32, of the largest exact value; also for half-precision results, whose accumulator is fp32."""
    exact = torch.full((64,), 4.0, dtype=torch.float64)
    for terms in (1, 100):
        allowed = 4 * EPS * math.sqrt(terms)
        actual = torch.full((64,), 4.0, dtype=torch.float32)
        assert compare(actual + allowed * 0.99, exact, actual, terms=terms).passed
        assert not compare(actual + 2 * allowed, exact, actual, terms=terms).passed


def test_a_result_of_another_dtype_is_no_answer():
    """Statistics are fp32 whatever the input: in half precision they would be judged by a half-precision rounding."""
    with pytest.raises(ValueError, match="must have the eager formula's dtype"):
        judged(EXACT.half(), EXACT.float())


def test_the_scale_of_cancelling_terms():
    accuracy = compare(torch.full((9,), 1e-5), torch.zeros(9), torch.zeros(9), terms=1)
    assert accuracy.max_bound == 0.0
    assert not accuracy.passed
    assert accuracy.error_over_bound == math.inf
    assert compare(torch.full((9,), 1e-5), torch.zeros(9), torch.zeros(9), terms=1, scale_of=torch.tensor(1e3)).passed


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_does_not_pass(value):
    actual = EXACT.clone()
    actual[3] = value
    accuracy = judged(actual, off_by(1.0))
    assert not accuracy.passed
    assert accuracy.error_over_bound == math.inf


def test_infinities_belong_where_the_exact_result_has_them():
    exact = EXACT.clone()
    exact[3] = -math.inf
    assert compare(exact.clone(), exact, exact, terms=1).passed
    for wrong in (math.inf, 0.0, math.nan):
        actual = exact.clone()
        actual[3] = wrong
        assert not compare(actual, exact, exact, terms=1).passed


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_eager_formula_that_overflowed_allows_nothing(value):
    eager = EXACT.clone()
    eager[3] = value
    assert not judged(off_by(1e-3), eager).passed


def test_the_error_over_its_bound():
    assert judged(off_by(1e-3), off_by(1e-3)).error_over_bound == pytest.approx(0.5, rel=1e-3)
    assert judged(EXACT.clone()).error_over_bound == 0.0


def test_nothing_to_compare_passes():
    nothing = torch.empty(0, 3)
    assert compare(nothing, nothing, nothing, terms=1).passed


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"\(3,\), \(3, 1\), \(3,\)"):
        compare(torch.zeros(3), torch.zeros(3, 1), torch.zeros(3), terms=1)


def test_a_result_beyond_the_dtype_allows_nothing():
    """Neither eager nor rounding is finite then; an infinite bound would let everything pass."""
    exact = torch.full((4,), 1e6, dtype=torch.float64)
    assert not compare(torch.zeros(4).half(), exact, exact.half(), terms=1).passed
