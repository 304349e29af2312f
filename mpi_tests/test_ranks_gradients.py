"""Central differences in float64 on real ranks: each perturbs only the blocks that it owns."""

import numpy as np
import pytest
from cases import Calls, case_config, gradient_gaps, sum_over

from tsp_ref.grid import folded
from tsp_ref.model import Model
from tsp_ref.schedules import tsp


@pytest.mark.parametrize("what", ["loss", "layers"])
def test_gradients_are_central_differences(comm, what):
    config = case_config("grouped-query", "float64", num_layers=1)
    model = Model(config, np, *folded(comm.rank, comm.size))
    gaps = gradient_gaps(Calls(tsp, comm, model), model, sum_over(comm), what)
    assert len(gaps) >= 9
    assert {name: gap for name, gap in gaps.items() if not gap < 1e-7} == {}
