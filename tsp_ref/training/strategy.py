"""Which computation a run is: the single process, or a schedule with its communicator, behind one set of calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ..activations import Saved
from ..arrays import Tiles
from ..comm.communicator import Communicator
from ..errors import UserError
from ..model import Model
from ..parameters import Parameters
from ..reference import single
from ..schedules import tsp

SCHEDULES = ("single", "tsp")


@dataclass(frozen=True)
class Strategy:
    """The three calls of a training step, with model and communicator filled in."""

    forward: Callable[[Parameters, Tiles, Tiles], tuple[float, Saved]]
    backward: Callable[[Saved, Parameters, Parameters], None]
    gradient_norm: Callable[[Parameters], float]


def choose_strategy(name: str, comm: Communicator, model: Model) -> Strategy:
    """The strategy called `name`, on these ranks."""
    if name == "single":
        if comm.size != 1:
            raise UserError(f"--schedule single is one process, and this job has {comm.size} ranks: run it without "
                            "mpirun, or use --schedule tsp")
        return Strategy(
            partial(single.model_forward, model),
            partial(single.model_backward, model),
            partial(single.gradient_norm, model),
        )
    if name == "tsp":
        return Strategy(
            partial(tsp.model_forward, comm, model),
            partial(tsp.model_backward, comm, model),
            partial(tsp.gradient_norm, comm, model),
        )
    raise UserError(f"--schedule {name} is unknown: use one of {', '.join(SCHEDULES)}")
