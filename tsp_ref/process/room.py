"""Whether what a run must hold fits this machine's memory, counted before anything of it is made.

What is counted is a lower bound, by `formulas/memory.py`: the model state and what a forward keeps for its backward,
which are there together. What a sub-layer works with comes on top.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..comm.communicator import Communicator
from ..comm.control import agreed
from ..errors import UserError
from ..formulas.memory import activation_bytes, model_state_bytes
from ..grid.grid import ALONE, Grid, Place, folded
from ..model.config import Config
from ..training.strategy import FOLDED, Plan, mesh_sides

SYSTEM = Path("/")


@dataclass(frozen=True)
class Need:
    """Bytes that a rank must hold."""

    state: int
    kept: int

    @property
    def total(self) -> int:
        """Both together."""
        return self.state + self.kept


def require_room(comm: Communicator, config: Config, plan: Plan, beside: Plan | None = None) -> None:
    """Refuse on every rank what cannot fit. Every rank must call it, before it allocates anything of the run.

    beside  what rank 0 computes too, at the same time
    """
    # Agreed: none begins to allocate, and so to change what is available, before all have looked.
    agreed(comm, lambda: _require(comm, config, plan, beside))


def _require(comm: Communicator, config: Config, plan: Plan, beside: Plan | None) -> bool:
    needs = [need_of(config, grid, plan) for grid in grids(config, plan, comm.size)]
    extra = sum(need_of(config, grid, beside).total for grid in grids(config, beside, 1)) if beside else 0
    # Of several machines this one's ranks are not known by number: the smallest of all will do for a lower bound.
    here = max(comm.process_on_node[1], comm.ranks_in_process)
    wanted = sum(sorted(need.total for need in needs)[:here]) + extra * (here == comm.size)
    there = available_bytes()
    if not needs or there is None or wanted <= there:
        return True
    most = max(needs, key=lambda need: need.total)
    ranks = "" if len(needs) == 1 else f" for each rank, {amount(wanted)} for the {here} of a machine"
    also = f" (with the single process on rank 0: {amount(extra)})" if extra else ""
    raise UserError(
        f"hidden_size={config.hidden_size} num_layers={config.num_layers} ffn_size={config.ffn_size} "
        f"vocab_size={config.vocab_size} batch_size={config.batch_size} seq_len={config.seq_len} takes at least "
        f"{amount(most.total)}{ranks}{also}: model state {amount(most.state)}, activations {amount(most.kept)}; "
        f"{amount(there)} of memory are available: use smaller sizes")


def grids(config: Config, plan: Plan, size: int) -> Iterator[Grid]:
    """Every rank's grid under a plan; none where the plan is impossible, which is refused, and explained, elsewhere."""
    weights, tokens = {"single": (1, 1), "tp": (size, 1), "sp": (1, size),
                       "tp+sp": mesh_sides(plan.mesh, size) if plan.schedule == "tp+sp" else (1, 1)
                       }.get(plan.schedule, (0, 0))
    if plan.schedule in FOLDED:
        places: Sequence[tuple[Place, Place]] = [folded(rank, size) for rank in range(size)]
    else:
        places = [(Place(one, weights) if weights > 1 else ALONE, Place(other, tokens) if tokens > 1 else ALONE)
                  for one in range(weights) for other in range(tokens)]
    with suppress(UserError):
        for weight_axis, token_axis in places:
            yield Grid(config.blocks, config.tiles, config.tile_len, weight_axis, token_axis, plan.layout)


def need_of(config: Config, grid: Grid, plan: Plan) -> Need:
    """What the rank with this grid must hold under a plan."""
    kept = activation_bytes(config, grid, plan.recompute, plan.schedule in FOLDED) if plan.recompute in (
        "none", "attention", "full") else 0
    return Need(model_state_bytes(config, grid), kept)


def available_bytes(system: Path = SYSTEM) -> int | None:
    """What can still be allocated on this machine, or in this process's control groups if one of them has less; with
    the machine's free swap, which a group may not be allowed: an upper bound. None where neither can be known."""
    machine = _machine(system)
    swap = machine.get("SwapFree", 0)
    found = [machine["MemAvailable"]] if "MemAvailable" in machine else []
    found += [left for group, limit, used in _groups(system) for left in _left(group, limit, used)]
    return min(found) + swap if found else None


def _machine(system: Path) -> dict[str, int]:
    """Linux's account of memory, in bytes."""
    with suppress(OSError, ValueError, IndexError):
        lines = (line.split(":") for line in (system / "proc/meminfo").read_text().splitlines())
        return {name: 1024 * int(rest.split()[0]) for name, rest in lines}
    return {}


def _groups(system: Path) -> Iterator[tuple[Path, str, str]]:
    """Every control group that this process is in, up to the root, with its files of limit and use: versions 2 and 1.

    In a container its own group may be the root, whatever path the system knows it by.
    """
    with suppress(OSError, ValueError):
        for line in (system / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            group = Path(path.lstrip("/"))
            for part in (group, *group.parents):
                if controllers == "":
                    yield system / "sys/fs/cgroup" / part, "memory.max", "memory.current"
                elif "memory" in controllers.split(","):
                    yield (system / "sys/fs/cgroup/memory" / part, "memory.limit_in_bytes", "memory.usage_in_bytes")


def _left(group: Path, limit: str, used: str) -> Iterator[int]:
    """What a control group's limit leaves, if it has one."""
    with suppress(OSError, ValueError):  # ValueError: "max", no limit
        most = int((group / limit).read_text())
        known = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # The files that were read, and could be forgotten, count as used. (Version 1 names a group's whole tree apart.)
        forgettable = (known.get(f"total_{name}", known.get(name, 0)) for name in ("inactive_file", "active_file"))
        yield most - int((group / used).read_text()) + sum(map(int, forgettable))


def amount(count: float) -> str:
    """A number of bytes for reading."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}" if unit != "bytes" else f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:,.4g} TB"
