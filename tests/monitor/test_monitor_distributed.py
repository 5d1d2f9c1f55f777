"""Two processes count what one counts that is given all their tokens."""

from __future__ import annotations

import pytest
import torch
from monitor_cases import Doublings, assert_same_counts, monitored
from ranks import RANKS, WRAPPINGS, main, share

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="two ranks talk over gloo"
)


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory):
    """What each rank has reported."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(main, args=(str(folder),), nprocs=RANKS)
    # Their reports are our own classes, in files written a moment ago.
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


def counted(*batches):
    monitor = monitored(model := Doublings())
    for x in batches:
        model(x)
    return monitor.compute()


@pytest.mark.parametrize("attached", ["before", "after", "on meta"])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_ranks_add_up(of_ranks, wrapping, attached):
    if (wrapping, attached) == ("DDP", "on meta"):
        pytest.skip("DDP wants weights when it wraps")
    everything = counted(*map(share, range(RANKS)))
    assert everything.stats.patches.num_nan.tolist() == [1, 1, 1]
    for rank, reports in enumerate(of_ranks):
        before, all_ranks, asked_again, after = reports[f"{wrapping}, attached {attached}"]
        assert_same_counts(all_ranks, everything)
        assert_same_counts(asked_again, everything)
        # Each keeps its own.
        assert_same_counts(before, counted(share(rank)))
        assert_same_counts(after, before)


def test_a_group_of_ranks_can_be_asked(of_ranks):
    assert_same_counts(of_ranks[0]["alone"][0], counted(share(0)))
