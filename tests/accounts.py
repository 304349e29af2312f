"""What tests of the accounts share: a step under some plan, counted, and what each rank's accounts then say."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from cases import random_text

from tsp_ref.accounting.memory import Memory
from tsp_ref.comm.communicator import Communicator
from tsp_ref.comm.virtual import VirtualWorld
from tsp_ref.grid.grid import Grid
from tsp_ref.model.config import Config
from tsp_ref.schedules.tags import Tag
from tsp_ref.training.loop import Training
from tsp_ref.training.strategy import Plan, meshes

Sent = dict[tuple[str, str, str], tuple[int, int]]


@dataclass
class Accounts:
    """One rank's, after a training step."""

    grid: Grid
    sent: Sent  # (part, direction, purpose) -> messages, bytes
    kept: int  # bytes of activations held between the forward and the backward
    memory: Memory
    flops: dict[tuple[str, str], int]


def all_plans(size: int, **changes: str) -> list[Plan]:
    """Every schedule on so many ranks, and every mesh."""
    kinds = [("tp", None), ("sp", None), *(("tp+sp", mesh) for mesh in meshes(size)), ("fsdp+sp", None),
             ("tsp", None)]
    return [Plan(schedule, mesh, counted=True, **changes) for schedule, mesh in kinds]


def sent_by(comm: Communicator) -> Sent:
    """What the ledger says was sent, agreements between ranks left out."""
    messages: Counter[tuple[str, str, str]] = Counter()
    sizes: Counter[tuple[str, str, str]] = Counter()
    for entry, (count, size) in comm.ledger.entries.items():
        if entry.verb == "send" and entry.tag in Tag.__members__:
            messages[*entry.phase, entry.tag] += count
            sizes[*entry.phase, entry.tag] += size
    return {key: (messages[key], sizes[key]) for key in messages}


def step_accounts(config: Config, comm: Communicator, plan: Plan) -> Accounts:
    """One training step on this rank."""
    training = Training(config, comm, plan, random_text(), np)
    _, saved = training.forward()
    training.strategy.backward(saved, training.weights, training.gradients)
    training.update()
    model = training.model
    return Accounts(model.grid, sent_by(comm), training.kept_bytes, model.memory, model.work.flops)


def virtual_accounts(config: Config, size: int, plan: Plan) -> list[Accounts]:
    """One training step on every virtual rank."""
    return VirtualWorld(size, seed=size).run(lambda comm: step_accounts(config, comm, plan))
