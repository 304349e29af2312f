"""The accounts on real ranks: the ledger is the formula, and the memory counted is what the process really held."""

import gc
import tracemalloc

import numpy as np
import pytest
from accounts import all_plans, step_accounts
from cases import case_config, random_text

from tsp_ref.formulas.memory import activation_bytes, itemsize, model_state_bytes
from tsp_ref.formulas.messages import step_messages
from tsp_ref.model.config import make_config
from tsp_ref.training.data import Text
from tsp_ref.training.loop import Training
from tsp_ref.training.strategy import FOLDED, Plan


def test_every_schedule_s_ledger_is_the_formula_to_the_byte(comm):
    config = case_config("grouped-query", "float32")
    for plan in all_plans(comm.size):
        comm.finish()  # what was sent under the plan before was received, so its accounts can be closed
        comm.ledger.entries.clear()
        accounts = step_accounts(config, comm, plan)
        wanted = step_messages(plan.schedule, config, accounts.grid)
        assert accounts.sent == {
            (part, direction, purpose.name): (traffic.messages, traffic.elements * itemsize(config))
            for (part, direction, purpose), traffic in wanted.items()}
        assert accounts.memory.model_state_peak == model_state_bytes(config, accounts.grid)
        assert accounts.kept == activation_bytes(config, accounts.grid, folded=plan.schedule in FOLDED)


@pytest.mark.parametrize("schedule", ["tp", "sp", "tp+sp", "fsdp+sp", "tsp"])
@pytest.mark.ranks(2, 4)
def test_the_memory_counted_is_within_5_percent_of_what_python_traced(comm, schedule):
    """Two runs: in one all arrays are counted, in the other, uncounted, Python's own allocations are traced. The model
    is large enough for Python's objects, which are traced too, not to matter. Two ranks keep the least for the
    backward, four keep all."""
    recompute = {2: "full", 4: "none"}[comm.size]
    config = make_config("tiny", hidden_size=256, ffn_size=512, seq_len=1024, batch_size=1, num_layers=1, blocks=4,
                         tiles=8)
    text = Text(*np.split(np.tile(random_text().training, 2), 2), "random bytes")

    def step(counted):
        training = Training(config, comm, Plan(schedule, recompute=recompute, counted=counted), text, np)
        training.step()
        return training

    counted = step(True).model.memory.total_peak
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    step(False)
    traced = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert 0.95 * traced < counted < 1.05 * traced
