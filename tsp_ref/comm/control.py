"""Small agreements between ranks, outside the data path: did everyone start, what shall everyone's exit code be."""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import TypeVar

import numpy as np

from ..arrays import Array
from ..errors import AgreedError, UserError
from .communicator import Communicator

Result = TypeVar("Result")

TEXT_BYTES = 2048
PATHS = "surrogateescape"  # a text may name a path that is not valid UTF-8, or be cut within a character


class ControlTag(IntEnum):
    """The purpose of messages that are no part of the model."""

    CONTROL = 100


def gather_texts(comm: Communicator, text: str) -> list[str]:
    """Every rank's text (its first 2048 bytes), in the order of ranks, on every rank."""
    mine = np.zeros(TEXT_BYTES, dtype=np.uint8)
    coded = np.frombuffer(text.encode(errors=PATHS)[:TEXT_BYTES], dtype=np.uint8)
    mine[: len(coded)] = coded
    return [row.tobytes().rstrip(b"\0").decode(errors=PATHS) for row in all_gather(comm, mine)]


def all_gather(comm: Communicator, mine: Array) -> list[Array]:
    """Every rank's array, of one shape for all, in the order of ranks, on every rank."""
    rows = [mine if rank == comm.rank else np.empty_like(mine) for rank in range(comm.size)]
    requests = [comm.Irecv(rows[rank], rank, ControlTag.CONTROL) for rank in comm.others]
    requests += [comm.Isend(mine, rank, ControlTag.CONTROL) for rank in comm.others]
    comm.Waitall(requests)
    return rows


def agreed(comm: Communicator, prepare: Callable[[], Result]) -> Result:
    """prepare(), or an `AgreedError` on every rank if a `UserError` stopped it on any: so that all stop, none waits."""
    failure = ""
    result: Result | None = None
    try:
        result = prepare()
    except UserError as error:
        failure = str(error)
    failures = gather_texts(comm, failure)
    for rank, text in enumerate(failures):
        if text:
            raise AgreedError(text if all(failures) else f"on rank {rank}: {text}")
    assert result is not None, "prepare must return something"
    return result


def text_from(comm: Communicator, source: int, text: str) -> str:
    """One rank's text, of any length, on rank 0; every rank must call it, and all others get an empty one."""
    coded = np.frombuffer(text.encode(errors=PATHS) if comm.rank == source else b"", dtype=np.uint8)
    size = int(all_gather(comm, np.array([coded.size]))[source][0])
    if comm.rank == source != 0:
        comm.Wait(comm.Isend(coded, 0, ControlTag.CONTROL))
    elif comm.rank == 0 != source:
        coded = np.empty(size, dtype=np.uint8)
        comm.Wait(comm.Irecv(coded, source, ControlTag.CONTROL))
    return coded.tobytes().decode(errors=PATHS) if comm.rank == 0 else ""


def from_root(comm: Communicator, number: int) -> int:
    """Rank 0's number, on every rank."""
    return int(all_gather(comm, np.array([number], dtype=np.int64))[0][0])
