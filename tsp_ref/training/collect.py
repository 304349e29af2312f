"""Bringing what is dealt out over the ranks to rank 0, one array at a time: nothing is ever gathered whole."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import numpy as np

from ..arrays import Array
from ..comm.communicator import Communicator
from ..comm.control import all_gather
from ..model.model import Model
from ..model.parameters import Parameters
from ..schedules.tags import Tag
from .loop import Training

Key = TypeVar("Key")


def stream(
    comm: Communicator, model: Model, holder: int, shape: tuple[int, ...], mine: Callable[[], Array]
) -> Array | None:
    """One holder's array, on rank 0; None on all other ranks. `mine` is asked on the holder only."""
    if comm.rank == holder:
        array = mine()
        if holder == 0:
            return array
        comm.Wait(comm.Isend(model.xp.ascontiguousarray(array), 0, Tag.COLLECT))
    elif comm.rank == 0:
        array = model.empty("buffers", *shape)
        comm.Wait(comm.Irecv(array, holder, Tag.COLLECT))
        return array
    return None


def holders(comm: Communicator, keys: Sequence[Key], held: Callable[[Key], bool]) -> list[list[int]]:
    """For each key, the ranks that hold it; `held` says it of this rank."""
    rows = all_gather(comm, np.array([held(key) for key in keys], dtype=np.uint8))
    return [[rank for rank, row in enumerate(rows) if row[index]] for index in range(len(keys))]


def stream_blocks(
    comm: Communicator, model: Model, parameters: Parameters, copies: bool = False
) -> Iterator[tuple[str, int, int, Array]]:
    """(tensor, block, its holder, its array) in the canonical order, on rank 0; nothing on the others, which must
    iterate too. Of each block its first holder's array, or with `copies` every holder's."""
    own = model.grid.blocks
    held_by = holders(comm, range(model.config.blocks), own.__contains__)
    for name, tensor in parameters.tensors():
        for block, ranks in enumerate(held_by):
            for holder in ranks if copies else ranks[:1]:
                array = stream(comm, model, holder, tensor.shape[1:], partial(tensor.__getitem__, block - own.start))
                if array is not None:
                    yield name, block, holder, array


def odd_copies(comm: Communicator, model: Model, parameters: Parameters) -> bytes:
    """A hash of each copy of a block, or of the gains, that is not equal to that of its first holder: none, if all
    ranks that should hold the same do."""
    names = [name for name, _ in parameters.tensors()]
    # Of every block of every tensor, and of the gains, the hash; zeros for what this rank does not hold.
    mine = np.zeros((len(names) * model.config.blocks + 1, hashlib.sha256().digest_size), dtype=np.uint8)
    rows = [number * model.config.blocks + block for number in range(len(names)) for block in model.grid.blocks]
    arrays = [array for _, tensor in parameters.tensors() for array in tensor]
    for row, array in zip([*rows, -1], [*arrays, parameters.gains]):
        mine[row] = np.frombuffer(hashlib.sha256(model.backend.to_host(array).tobytes()).digest(), dtype=np.uint8)
    odd = b""
    for copies in zip(*all_gather(comm, mine)):
        found = [copy.tobytes() for copy in copies if copy.any()]
        odd += b"".join(copy for copy in found if copy != found[0])
    return odd


def digest(training: Training) -> str:
    """SHA-256 over the bits of all losses, the last gradients, all weights and both moments; "" but on rank 0.

    What several ranks hold counts once if all copies are equal, so that neither N nor the schedule shows; else every
    odd one counts.
    """
    sha = hashlib.sha256()
    losses = training.losses + training.validation_losses
    sha.update(struct.pack(f"<{len(losses)}d", *losses))
    optimizer, to_host = training.optimizer, training.model.backend.to_host
    for parameters in (training.gradients, training.weights, optimizer.first, optimizer.second):
        for _, _, _, array in stream_blocks(training.comm, training.model, parameters):
            sha.update(to_host(array).tobytes())
        sha.update(to_host(parameters.gains).tobytes() + odd_copies(training.comm, training.model, parameters))
    return sha.hexdigest() if training.comm.rank == 0 else ""
