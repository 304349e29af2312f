"""What a forward keeps for its backward, and that the backward uses it up, for each way to recompute."""

import numpy as np
import pytest
from cases import case_config, cut, random_batch, schedule_calls, single_calls

from tsp_ref.comm.virtual import VirtualWorld
from tsp_ref.model.model import RECOMPUTE
from tsp_ref.model.parameters import initial_parameters, zero_parameters
from tsp_ref.training.strategy import Plan

ATTENTION = {"attention.keys_values", "attention.q", "attention.heads", "attention.logsumexp"}
INPUTS_AND_MLP = {"attention.x", "mlp.x", "mlp.projected"}
KEPT = {"none": ATTENTION | INPUTS_AND_MLP, "attention": INPUTS_AND_MLP, "full": {"attention.x"}}


TOGETHER = "attention.together"
"""The same arrays again, of several blocks at once: what is kept of one block is a view of them."""


def kept(saved, layer):
    """The names of what is kept of a layer."""
    return {f"{part}.{name}" for part in ("attention", "mlp")
            for name, arrays in vars(getattr(saved, part)[layer]).items()
            if (bool(arrays) if isinstance(arrays, dict) else arrays is not None)}


@pytest.mark.parametrize("plan, ranks", [
    (Plan("single"), 1), (Plan("tp"), 2), (Plan("sp"), 2), (Plan("tp+sp", "2x2"), 4), (Plan("fsdp+sp"), 2),
    (Plan("tsp"), 2)], ids=str)
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_what_is_recomputed_is_not_kept_and_what_is_kept_is_used_up(plan, ranks, recompute):
    config = case_config("plain", "float32", tiles=4)

    def main(comm):
        calls, model = single_calls(config) if plan.schedule == "single" else schedule_calls(config, plan, comm)
        model.recompute = recompute
        weights, gradients = initial_parameters(model), zero_parameters(model, "gradients")
        _, saved = calls.model_forward(weights, *(cut(model, whole) for whole in random_batch(config)))
        together = recompute == "none" and plan.schedule in ("single", "tp")
        wanted = KEPT[recompute] | ({TOGETHER} if together else set())
        assert [kept(saved, layer) for layer in range(config.num_layers)] == [wanted] * config.num_layers
        for attention in saved.attention if together else ():
            whole = attention.together
            for name in ("keys_values", "q", "heads", "logsumexp"):
                assert all(np.shares_memory(part, getattr(whole, name)) for part in getattr(attention, name).values())
        assert len(saved.head.x) == len(saved.head.logsumexp) == len(model.grid.slots)
        calls.model_backward(saved, weights, gradients)
        assert saved.attention == saved.mlp == []

    VirtualWorld(ranks, seed=1).run(main)
