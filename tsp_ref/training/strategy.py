"""Which computation a run is: the single process, or a schedule with its ranks, behind one set of calls."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ..arrays import Array, Namespace
from ..backends.host import Backend
from ..comm.communicator import Communicator
from ..comm.mesh import make_mesh
from ..errors import UserError
from ..model.activations import Saved
from ..model.config import MULTIPLES, Config
from ..model.model import Model
from ..model.parameters import Parameters
from ..reference import single
from ..schedules import fsdp_sp, sp, tp, tp_sp, tsp

SCHEDULES = ("single", "tp", "sp", "tp+sp", "fsdp+sp", "tsp")
FOLDED = ("fsdp+sp", "tsp")
"""Schedules that cut weights and tokens over the same ranks."""


@dataclass(frozen=True)
class Plan:
    """How a model is dealt out, and what of it is kept: nothing that changes a bit of the result.

    schedule   one of SCHEDULES
    mesh       "TxΣ", ranks for weights by ranks for tokens, of tp+sp; None: as square as N allows
    layout     zigzag or contiguous: which tiles a rank holds
    recompute  none, attention or full: what the backward recomputes
    counted    count every array and every matrix product: for measuring, slower
    stack      how many tiles go through an operation at a time; None: chosen by their size
    """

    schedule: str = "tsp"
    mesh: str | None = None
    layout: str = "zigzag"
    recompute: str = "none"
    counted: bool = False
    stack: int | None = None

    def __str__(self) -> str:
        return f"{self.schedule} {self.mesh}" if self.mesh else self.schedule


@dataclass(frozen=True)
class Strategy:
    """The model as this rank holds it, and the three calls of a training step, with model and ranks filled in."""

    model: Model
    forward: Callable[[Parameters, Array, Array], tuple[float, Saved]]
    backward: Callable[[Saved, Parameters, Parameters], None]
    gradient_norm: Callable[[Parameters], float]


def choose_strategy(plan: Plan, comm: Communicator, config: Config, library: Namespace | Backend) -> Strategy:
    """The strategy of a plan on these ranks, or a `UserError` that names what does not fit."""
    if plan.mesh is not None and plan.schedule != "tp+sp":
        raise UserError(f"--mesh {plan.mesh} is for --schedule tp+sp: {plan.schedule} has no mesh, leave it out")
    _require_finite_angles(config)
    build = partial(Model, config, library, layout=plan.layout, recompute=plan.recompute, counted=plan.counted,
                    stack=plan.stack)
    if plan.schedule == "single":
        if comm.size != 1:
            raise UserError(f"--schedule single is one process, and this job has {comm.size} ranks: run it without "
                            "mpirun, or use --schedule tsp")
        model = build()
        return Strategy(model, partial(single.model_forward, model), partial(single.model_backward, model),
                        partial(single.gradient_norm, model))
    if plan.schedule == "tp":
        _require_enough(config, for_weights=comm.size)
        model = build(*tp.place(comm))
        return Strategy(model, partial(tp.model_forward, comm, model), partial(tp.model_backward, comm, model),
                        partial(tp.gradient_norm, comm, model))
    if plan.schedule == "sp":
        _require_enough(config, for_tokens=comm.size)
        model = build(*sp.place(comm))
        return Strategy(model, partial(sp.model_forward, comm, model), partial(sp.model_backward, comm, model),
                        partial(sp.gradient_norm, comm, model))
    if plan.schedule == "tp+sp":
        sides = mesh_sides(plan.mesh, comm.size)
        _require_enough(config, *sides)
        mesh = make_mesh(comm, *sides)
        model = build(*tp_sp.place(mesh))
        return Strategy(model, partial(tp_sp.model_forward, mesh, model), partial(tp_sp.model_backward, mesh, model),
                        partial(tp_sp.gradient_norm, mesh, model))
    if plan.schedule == "fsdp+sp":
        _require_enough(config, comm.size, comm.size)
        model = build(*fsdp_sp.place(comm))
        return Strategy(model, partial(fsdp_sp.model_forward, comm, model),
                        partial(fsdp_sp.model_backward, comm, model), partial(fsdp_sp.gradient_norm, comm, model))
    if plan.schedule == "tsp":
        _require_enough(config, comm.size, comm.size)
        model = build(*tsp.place(comm))
        return Strategy(model, partial(tsp.model_forward, comm, model), partial(tsp.model_backward, comm, model),
                        partial(tsp.gradient_norm, comm, model))
    raise UserError(f"--schedule {plan.schedule} is unknown: use one of {', '.join(SCHEDULES)}")


def _require_enough(config: Config, for_weights: int = 1, for_tokens: int = 1) -> None:
    """A `UserError` where a rank of so many for the weights, or for the tokens, would hold none: with the way out that
    this model has, for a field can be raised only as far as sizes are multiples of it."""
    for ranks, field, what, schedule in ((for_weights, "blocks", "weight block", "sp, which deals out no weights"),
                                         (for_tokens, "tiles", "token tile", "tp, which deals out no tokens")):
        count, of = getattr(config, field), [name for name, divisor in MULTIPLES if divisor == field]
        if ranks <= count:
            continue
        most = math.gcd(*(getattr(config, name) for name in of))
        remedy = (f"raise {field} with --set" if ranks <= most else
                  f"--schedule {schedule} ({field}={most} is the most that {', '.join(of)} can be multiples of)")
        raise UserError(f"ranks={ranks} is not possible: with {field}={count}, not every rank would hold a {what}; use "
                        f"{'1 rank' if count == 1 else f'1 to {count} ranks'}, or {remedy}")


INFINITE = {"float32": 128, "float64": 1024}
"""The power of two from which on a number of a dtype is infinite."""


def _require_finite_angles(config: Config) -> None:
    """A `UserError` for a base with which it, or an angle position · theta^(-2i/e) of the rotary embedding, overflows.
    Otherwise only the loss would show it, and the learning rate be blamed."""
    base = math.log2(config.rope_theta)
    fastest = math.log2(config.seq_len) + max(0.0, -base * (1 - 2 / config.head_dim))
    if max(base, fastest) >= INFINITE[config.dtype]:
        raise UserError(f"rope_theta={config.rope_theta:g} is not valid: the angles that positions are turned by would "
                        f"not be finite in {config.dtype}; use a number from 1 to 1e30, as 10000")


def meshes(size: int) -> list[str]:
    """Every mesh of so many ranks: 1x8, 2x4, 4x2, 8x1."""
    return [f"{side}x{size // side}" for side in range(1, size + 1) if size % side == 0]


def mesh_sides(mesh: str | None, size: int) -> tuple[int, int]:
    """The ranks for weights and the ranks for tokens of a mesh; without one, as square as it can be."""
    possible = meshes(size)
    if mesh is None:
        mesh = possible[(len(possible) - 1) // 2]
    if mesh not in possible:
        raise UserError(f"--mesh {mesh} is not a mesh of {size} ranks: use one of {', '.join(possible)}, the ranks for "
                        "weights by the ranks for tokens")
    first, second = mesh.split("x")
    return int(first), int(second)
