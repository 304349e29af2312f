"""Central differences in float64: every gradient of every matrix, for the loss and for a random cotangent."""

import pytest
from cases import CASES, case_config, gradient_gaps, schedule_calls, single_calls, sum_over

from tsp_ref.comm.virtual import VirtualWorld
from tsp_ref.training.strategy import Plan

CLOSE = 1e-7


@pytest.mark.parametrize("what", ["loss", "layers"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_of_the_single_process_are_central_differences(case, what):
    calls, model = single_calls(case_config(case, "float64"))
    gaps = gradient_gaps(calls, model, sum_over(None), what)
    assert len(gaps) >= 9
    assert {name: gap for name, gap in gaps.items() if not gap < CLOSE} == {}


@pytest.mark.parametrize("what", ["loss", "layers"])
@pytest.mark.parametrize("plan, ranks", [
    (Plan("tp"), 2), (Plan("tp"), 4), (Plan("sp"), 2), (Plan("sp"), 4), (Plan("tp+sp", "2x2"), 4), (Plan("tsp"), 2),
    (Plan("tsp"), 3), (Plan("sp", layout="contiguous", recompute="attention"), 2), (Plan("tp", recompute="full"), 2),
    (Plan("tp+sp", "1x2", recompute="full"), 2), (Plan("tsp", recompute="full"), 2), (Plan("fsdp+sp"), 3)], ids=str)
def test_gradients_on_virtual_ranks_are_central_differences(plan, ranks, what):
    config = case_config("grouped-query", "float64", num_layers=1)

    def main(comm):
        return gradient_gaps(*schedule_calls(config, plan, comm), sum_over(comm), what)

    for gaps in VirtualWorld(ranks, seed=1).run(main):
        assert len(gaps) >= 9
        assert {name: gap for name, gap in gaps.items() if not gap < CLOSE} == {}
