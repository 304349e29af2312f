"""Central differences in float64 on real ranks: each perturbs the blocks that it holds, copies of a block alike."""

import pytest
from cases import case_config, gradient_gaps, schedule_calls, sum_over

from tsp_ref.training.strategy import Plan


def wrong_gradients(comm, schedule, what):
    """The gradients that are not central differences, with their gaps."""
    config = case_config("grouped-query", "float64", num_layers=1)
    gaps = gradient_gaps(*schedule_calls(config, Plan(schedule), comm), sum_over(comm), what)
    assert len(gaps) >= 9
    return {name: gap for name, gap in gaps.items() if not gap < 1e-7}


@pytest.mark.parametrize("what", ["loss", "layers"])
def test_gradients_are_central_differences(comm, what):
    assert wrong_gradients(comm, "tsp", what) == {}


@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize("schedule", ["tp", "sp", "tp+sp"])
def test_gradients_where_weights_or_tokens_have_copies_are_central_differences(comm, schedule):
    assert wrong_gradients(comm, schedule, "loss") == {}
    assert wrong_gradients(comm, schedule, "layers") == {}
