"""What follows from counted norms: moments, percentiles to within a bin of numpy's, outliers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from vitreg_kernels import NormDistribution, TokenLayout, TokenNormStats
from vitreg_kernels.functional import token_norm_stats
from vitreg_kernels.ops.token_norms.api import accumulate
from vitreg_kernels.ops.token_norms.backends import composite
from vitreg_kernels.ops.token_norms.bins import bin_edges

ALL_PATCHES = TokenLayout(num_cls_tokens=0, num_registers=0)
LAYOUT = TokenLayout(num_registers=4)
BIN = 1 / 64  # the widest a bin is, of what it begins at

CRITERIA = [{}, {"norm": 150.0}, {"median": 3.0}, {"mad": 20.0}, {"percentile": 98.5}]
QS = (0.0, 0.1, 1.0, 25.0, 50.0, 75.0, 90.0, 99.0, 99.9, 100.0)


def distribution(norms: Tensor) -> NormDistribution:
    return token_norm_stats(norms.reshape(1, -1), ALL_PATCHES).patches


SAMPLES = {
    "log-normal": lambda: torch.empty(10001).log_normal_(3.0, 1.0),
    "narrow": lambda: torch.randn(5000) * 0.5 + 40.0,
    "uniform": lambda: torch.rand(999) * 100,
    "two clusters": lambda: torch.cat((torch.rand(500) + 20, torch.rand(20) * 50 + 300)),
    "few": lambda: torch.tensor([3.0, 50.0, 7.0, 500.0]),
    "one": lambda: torch.tensor([42.0]),
    "alike": lambda: torch.full((100,), 17.3),
    "zeros": lambda: torch.zeros(10),
    "tiny": lambda: torch.full((10,), 1e-7),
    "huge": lambda: torch.full((10,), 3e12),
}
every_criterion = pytest.mark.parametrize("given", CRITERIA, ids=str)
every_sample = pytest.mark.parametrize("sample", SAMPLES)


class TestMoments:
    @every_sample
    def test_numpy_s(self, sample):
        norms = SAMPLES[sample]()
        found, values = distribution(norms), norms.double().numpy()
        assert found.count == len(values)
        assert found.min == norms.min()
        assert found.max == norms.max()
        np.testing.assert_allclose(found.mean, values.mean(), rtol=1e-13)
        np.testing.assert_allclose(found.std, values.std(), rtol=1e-9, atol=1e-7 * values.mean())

    def test_a_spread_far_below_the_mean(self):
        """Where a sum of squares in fp32 has nothing left of the variance."""
        norms = torch.randn(10000) * 0.01 + 1000.0
        np.testing.assert_allclose(distribution(norms).std, norms.double().numpy().std(), rtol=1e-4)

    def test_norms_alike_have_no_spread(self):
        """Whether their variance is rounded to a little more than 0 or to a little less."""
        for norm in np.linspace(1.1, 97.3, 20, dtype=np.float32):
            np.testing.assert_allclose(distribution(torch.full((777,), norm.item())).std, 0.0, atol=1e-6 * norm)

    def test_of_no_tokens(self):
        for empty in (NormDistribution.zeros((), "cpu"), distribution(torch.tensor([math.nan, math.inf, -math.inf]))):
            assert empty.count == 0
            for name in ("mean", "std", "min", "max", "median", "median_deviation"):
                assert getattr(empty, name).isnan(), name
            assert empty.percentile(99.0).isnan()
        assert (empty.num_nan, empty.num_inf) == (1, 2)

    def test_groups_that_a_layout_does_not_have(self):
        stats = token_norm_stats(torch.rand(3, 7), TokenLayout(num_registers=0))
        assert [group.count.item() for group in stats] == [3, 0, 18]
        assert stats.registers.mean.isnan()
        only_prefix = token_norm_stats(torch.rand(3, 5), LAYOUT)
        assert [group.count.item() for group in only_prefix] == [3, 12, 0]


class TestPercentiles:
    @every_sample
    def test_within_half_a_bin_of_numpy_s(self, sample):
        norms = SAMPLES[sample]()
        found, values = distribution(norms), norms.double().numpy()
        for q in QS:
            exact = np.percentile(values, q, method="inverted_cdf")
            np.testing.assert_allclose(found.percentile(q), exact, rtol=BIN / 2)
        assert found.percentile(0.0).dtype == torch.float32
        assert found.median == found.percentile(50.0)

    @given(values=st.lists(st.floats(2.0**-12, 2.0**20, width=32, exclude_max=True), min_size=1, max_size=40),
           q=st.floats(0.0, 100.0))  # fmt: skip
    def test_of_any_norms(self, values, q):
        found = distribution(torch.tensor(values)).percentile(q)
        rank = max(math.ceil(q / 100.0 * len(values)), 1)
        exact = sorted(values)[rank - 1]
        assert abs(found - exact) <= exact * BIN  # half a bin, but for the first, whose tokens may be smaller

    def test_the_median_is_numpy_s_where_tokens_are_many(self):
        norms = SAMPLES["log-normal"]()
        np.testing.assert_allclose(distribution(norms).median, np.median(norms.numpy()), rtol=BIN)

    @every_sample
    def test_median_deviation_within_a_bin(self, sample):
        norms = SAMPLES[sample]()
        values = norms.double().numpy()
        median = np.percentile(values, 50, method="inverted_cdf")
        exact = np.percentile(np.abs(values - median), 50, method="inverted_cdf")
        error = (distribution(norms).median_deviation - exact).abs()
        assert error <= BIN / 2 * (
            median + (median + exact)
        )  # half a bin of the median, and of who is that far from it


def test_nothing_waits_for_the_device():
    """Fake tensors have no values: whatever had to see one, to learn a size or to decide, would raise."""
    with FakeTensorMode():
        norms = torch.empty(6, 21)
        stats = token_norm_stats(norms, LAYOUT)
        composite.accumulate(norms, LAYOUT, NormDistribution.zeros((3,), "cpu"))
        patches = stats.patches.merged(stats.registers)
        assert patches.percentile(99.0).shape == patches.median_deviation.shape == ()
        assert all(x.shape == () for x in (patches.mean, patches.std, patches.min, patches.max, patches.count))
        for criterion in CRITERIA:
            assert all(x.shape == () for x in stats.outliers(**criterion))


class TestMerging:
    def test_is_counting_all_at_once(self):
        batches = [torch.empty(n, 21).log_normal_(3.0, 2.0) for n in (2, 5, 1)]
        batches[1][0, 0], batches[2][0, 9] = math.nan, math.inf
        batches.append(torch.empty(0, 21))
        into = NormDistribution.zeros((3,), "cpu")
        merged = NormDistribution.zeros((3,), "cpu")
        for norms in batches:
            accumulate(norms, LAYOUT, into)
            one = NormDistribution.zeros((3,), "cpu")
            accumulate(norms, LAYOUT, one)
            merged = merged.merged(one)
        for name, a, b in zip(into._fields, merged, into, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=1e-14 if name == "sums" else 0.0, atol=0.0)

    def test_leaves_both_as_they_were(self):
        a, b = distribution(torch.rand(10)), distribution(torch.rand(20))
        before = [x.clone() for x in (*a, *b)]
        merged = a.merged(b)
        assert all(torch.equal(x, y) for x, y in zip((*a, *b), before, strict=True))
        assert not {x.data_ptr() for x in merged} & {x.data_ptr() for x in (*a, *b)}


class TestLayers:
    """Leading dimensions: each layer as by itself."""

    @pytest.fixture
    def norms(self):
        """Norms of four layers, whose medians are far apart; the third is not finite anywhere."""
        norms = torch.empty(4, 6, 37).log_normal_(0.0, 0.3) * torch.tensor([1.0, 10.0, 100.0, 50.0])[:, None, None]
        norms[2] = math.nan
        return norms

    @pytest.fixture
    def layers(self, norms):
        state = NormDistribution.zeros((4, 3), "cpu")
        for i in range(4):
            accumulate(norms[i], LAYOUT, NormDistribution(*(x[i] for x in state)))
        return TokenNormStats.of_stacked(state)

    def test_every_number(self, norms, layers):
        for i in range(4):
            single = token_norm_stats(norms[i], LAYOUT)
            for stacked, alone in zip(layers, single, strict=True):
                for name in ("count", "mean", "std", "min", "max", "median", "median_deviation", "num_nan", "num_inf"):
                    every = getattr(stacked, name)
                    assert every.shape == (4,)
                    assert torch.equal(every[i].nan_to_num(-1.0), getattr(alone, name).nan_to_num(-1.0)), name
                torch.testing.assert_close(stacked.percentile(90.0)[i], alone.percentile(90.0), equal_nan=True)
                assert torch.equal(stacked.count_from(9.0)[i], alone.count_from(9.0))

    @pytest.mark.parametrize(
        "given", [{}, {"median": 1.5}, {"mad": 2.0}, {"percentile": 90.0}, {"norm": 12.0}], ids=str
    )
    def test_outliers_by_the_thresholds_of_their_own_layer(self, norms, layers, given):
        every = layers.outliers(**given)
        for i in range(4):
            single = token_norm_stats(norms[i], LAYOUT).outliers(**given)
            for a, b in zip(every, single, strict=True):
                assert a.shape == (4,)
                torch.testing.assert_close(a[i], b, rtol=0.0, atol=0.0, equal_nan=True)
        assert every.threshold[2].isnan() == ("norm" not in given)
        assert every.patches[2] == 0

    def test_they_are_views(self):
        state = NormDistribution.zeros((4, 3), "cpu")
        stats = TokenNormStats.of_stacked(state)
        accumulate(torch.ones(2, 21), LAYOUT, NormDistribution(*(x[1] for x in state)))
        assert stats.patches.count.tolist() == [0, 32, 0, 0]


class TestOutliers:
    @pytest.fixture
    def norms(self):
        """Patches of norm 35 to 45; of the registers one at 300."""
        norms = torch.rand(8, 261) * 10 + 35
        norms[:, 2] = 300.0
        return norms

    @pytest.fixture
    def planted(self, norms):
        """The same with a hundredth of the patches planted at 200 to 500, where nothing else is."""
        planted = norms.clone()
        place = torch.randperm(8 * 256)[:20]
        patches = planted[:, 5:].reshape(-1)
        patches[place] = torch.rand(20) * 300 + 200
        planted[:, 5:] = patches.view(8, 256)
        return planted

    @every_criterion
    def test_every_planted_one_is_found(self, planted, given):
        found = token_norm_stats(planted, LAYOUT).outliers(**given)
        assert (found.cls, found.registers, found.patches) == (0, 8, 20)

    @pytest.mark.parametrize("given", [c for c in CRITERIA if "percentile" not in c], ids=str)
    def test_none_is_invented(self, norms, given):
        found = token_norm_stats(norms, LAYOUT).outliers(**given)
        assert (found.cls, found.registers, found.patches) == (0, 8, 0)

    @every_criterion
    def test_counts_are_exact_for_the_threshold_that_is_returned(self, planted, given):
        stats = token_norm_stats(planted, LAYOUT)
        found = stats.outliers(**given)
        assert found.threshold in bin_edges("cpu")
        for count, group in zip(found[1:], LAYOUT.split(planted), strict=True):
            assert count == (group >= found.threshold).sum()

    def test_a_threshold_is_rounded_up(self):
        edges = bin_edges("cpu")[1:-1]
        norms = torch.stack((torch.nextafter(edges, torch.zeros(1)), edges), -1).flatten()
        stats = token_norm_stats(norms[None], ALL_PATCHES)
        for i in (0, 1, 777, 1100, 2045):
            exactly = stats.outliers(norm=edges[i].item())
            assert exactly.threshold == edges[i]
            assert exactly.patches == 2 * (2047 - i) - 1
            above = stats.outliers(norm=np.nextafter(edges[i].item(), np.inf))  # which fp32 does not tell apart
            assert above.threshold == edges[i + 1]
            assert above.patches == 2 * (2047 - i) - 3

    def test_150_is_an_edge(self):
        norms = torch.tensor([[150.0, np.nextafter(np.float32(150), np.float32(0)), 149.0, 151.0, 1e9]])
        found = token_norm_stats(norms, ALL_PATCHES).outliers(norm=150.0)
        assert found.threshold == 150.0
        assert found.patches == 3

    def test_thresholds_at_both_ends(self):
        norms = torch.tensor([[0.0, 1e-9, 5.0, 1e9, math.inf, math.nan]])
        stats = token_norm_stats(norms, ALL_PATCHES)
        assert stats.outliers(norm=0).patches == 4
        smallest = stats.outliers(norm=1e-30)
        assert (smallest.threshold, smallest.patches) == (bin_edges("cpu")[1], 2)
        beyond = stats.outliers(norm=2e6)  # nothing is told apart there, so nothing is found
        assert (beyond.threshold, beyond.patches) == (math.inf, 0)

    def test_relative_to_patches_that_are_not_there(self):
        stats = token_norm_stats(torch.full((2, 5), 1e9), LAYOUT)
        for criterion in CRITERIA:
            found = stats.outliers(**criterion)
            assert found.threshold.isnan() == ("norm" not in criterion)
            assert found.cls == (2 if "norm" in criterion else 0)

    def test_three_medians_unless_told(self):
        stats = token_norm_stats(torch.rand(4, 50) + 1, LAYOUT)
        assert stats.outliers() == stats.outliers(median=3.0)
