"""Bringing what is dealt out over the ranks to rank 0, one block at a time: nothing is ever gathered whole."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator
from functools import partial

from ..arrays import Array
from ..comm.communicator import Communicator
from ..comm.control import all_gather
from ..model import Model
from ..parameters import Parameters
from ..schedules.tags import Tag
from .loop import Training


def stream(
    comm: Communicator, model: Model, owner: int, shape: tuple[int, ...], mine: Callable[[], Array]
) -> Array | None:
    """An array of one owner, on rank 0; None on all other ranks. `mine` is asked on the owner only."""
    if comm.rank == owner:
        array = mine()
        if owner == 0:
            return array
        comm.Wait(comm.Isend(model.xp.ascontiguousarray(array), 0, Tag.COLLECT))
    elif comm.rank == 0:
        array = model.empty("buffers", *shape)
        comm.Wait(comm.Irecv(array, owner, Tag.COLLECT))
        return array
    return None


def owner_of(ranges: Callable[[int], range], size: int, index: int) -> int:
    """The rank whose range holds an index."""
    return next(rank for rank in range(size) if index in ranges(rank))


def stream_blocks(comm: Communicator, model: Model, parameters: Parameters) -> Iterator[tuple[str, int, Array]]:
    """(tensor, block, its array) in the canonical order, on rank 0; nothing on the others, which must iterate too."""
    for name, tensor in parameters.tensors():
        for block in range(model.config.blocks):
            owner = owner_of(model.grid.blocks_of, comm.size, block)
            position = block - model.grid.blocks.start
            array = stream(comm, model, owner, tensor.shape[1:], partial(tensor.__getitem__, position))
            if array is not None:
                yield name, block, array


def digest(training: Training) -> str:
    """SHA-256 over the bits of all losses, the last gradients, all weights and both moments; "" but on rank 0."""
    sha = hashlib.sha256()
    losses = training.losses + training.validation_losses
    sha.update(struct.pack(f"<{len(losses)}d", *losses))
    optimizer = training.optimizer
    for parameters in (training.gradients, training.weights, optimizer.first, optimizer.second):
        for _, _, array in stream_blocks(training.comm, training.model, parameters):
            sha.update(array.tobytes())
        # Every rank holds the gains: once if all copies are equal, so that N does not show; else every odd one counts.
        copies = [copy.tobytes() for copy in all_gather(training.comm, parameters.gains)]
        sha.update(copies[0] + b"".join(copy for copy in copies if copy != copies[0]))
    return sha.hexdigest() if training.comm.rank == 0 else ""
