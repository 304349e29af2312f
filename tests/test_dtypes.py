"""No float64 in a float32 run: every array that the model makes is watched."""

import numpy as np
import pytest
from cases import case_config, random_text

from tsp_ref.comm.virtual import VirtualWorld
from tsp_ref.ops import attention, loss, mlp, norm
from tsp_ref.training.loop import Training
from tsp_ref.training.strategy import Plan


class Watched(np.ndarray):
    """An array whose descendants, views and results alike, must not be float64."""

    def __array_finalize__(self, origin):
        if self.dtype == np.float64:
            raise TypeError("an array of float64 in a float32 run")


class WatchedNumpy:
    """NumPy, whose new arrays are watched; from there watching spreads to every result."""

    def __getattr__(self, name):
        attribute = getattr(np, name)
        if name in {"empty", "zeros", "full", "arange", "asarray", "stack", "empty_like"}:
            return lambda *arguments, **named: attribute(*arguments, **named).view(Watched)
        return attribute


def float32_run(comm, schedule):
    """Two training steps and a validation on watched arrays."""
    config = case_config("grouped-query", "float32")
    training = Training(config, comm, Plan(schedule), random_text(), WatchedNumpy())
    for _ in range(2):
        training.step()
    training.validate()
    comm.finish()
    return training


@pytest.mark.parametrize("schedule, ranks", [
    ("single", 1), ("tsp", 1), ("tsp", 3), ("tp", 3), ("sp", 3), ("tp+sp", 4), ("fsdp+sp", 3)])
def test_a_float32_run_makes_no_float64_array(schedule, ranks):
    for training in VirtualWorld(ranks).run(lambda comm: float32_run(comm, schedule)):
        assert isinstance(training.weights.embedding, Watched)
        assert training.weights.embedding.dtype == np.float32


@pytest.mark.parametrize("module, name", [
    (norm, "rmsnorm_backward"), (mlp, "swiglu_forward"), (attention, "attend_forward"), (loss, "merge_triples")])
def test_a_float64_scalar_anywhere_in_the_maths_is_seen(module, name, monkeypatch):
    honest = getattr(module, name)

    def promoting(xp, first, *rest, **named):
        return honest(xp, first * np.float64(1.0), *rest, **named)

    monkeypatch.setattr(module, name, promoting)
    with pytest.raises(TypeError, match="float64"):
        VirtualWorld(2).run(lambda comm: float32_run(comm, "tsp"))
