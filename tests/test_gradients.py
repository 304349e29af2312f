"""Central differences in float64: every gradient of every matrix, for the loss and for a random cotangent."""

import numpy as np
import pytest
from cases import CASES, Calls, case_config, gradient_gaps, single_calls, sum_over

from tsp_ref.comm.virtual import VirtualWorld
from tsp_ref.grid import folded
from tsp_ref.model import Model
from tsp_ref.schedules import tsp

CLOSE = 1e-7


@pytest.mark.parametrize("what", ["loss", "layers"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_of_the_single_process_are_central_differences(case, what):
    calls, model = single_calls(case_config(case, "float64"))
    gaps = gradient_gaps(calls, model, sum_over(None), what)
    assert len(gaps) >= 9
    assert {name: gap for name, gap in gaps.items() if not gap < CLOSE} == {}


@pytest.mark.parametrize("what", ["loss", "layers"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_gradients_on_virtual_ranks_are_central_differences(ranks, what):
    config = case_config("grouped-query", "float64", num_layers=1)

    def main(comm):
        model = Model(config, np, *folded(comm.rank, comm.size))
        return gradient_gaps(Calls(tsp, comm, model), model, sum_over(comm), what)

    for gaps in VirtualWorld(ranks, seed=1).run(main):
        assert {name: gap for name, gap in gaps.items() if not gap < CLOSE} == {}
