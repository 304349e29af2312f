"""The ranks' clocks compared, and what they recorded brought to rank 0, on its clock."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from .communicator import Communicator
from .control import ControlTag, all_gather
from .timeline import Lane, Message, Span, Timeline

QUESTIONS = 25  # of which the one that was answered fastest tells most


@contextmanager
def recording(comm: Communicator) -> Iterator[Timeline]:
    """Write down what this rank does meanwhile."""
    timeline = comm.timeline = Timeline(comm.phase)
    try:
        yield timeline
    finally:
        timeline.end()
        comm.timeline = None


def clock_offsets(comm: Communicator) -> list[tuple[float, float]]:
    """By how many seconds each rank's clock is before rank 0's, and by how many that may be wrong; on rank 0 only.

    As NTP does: rank 0 asks what time it is. The answer was given between question and answer, most likely in the
    middle, and wrong by half of that time at most.
    """
    if comm.rank:
        for _ in range(QUESTIONS):
            comm.Wait(comm.Irecv(np.empty(1), 0, ControlTag.CONTROL))
            comm.Wait(comm.Isend(np.array([time.perf_counter()]), 0, ControlTag.CONTROL))
        return []
    return [(0.0, 0.0), *(min((_ask(comm, peer) for _ in range(QUESTIONS)), key=lambda found: found[1])
                          for peer in range(1, comm.size))]


def _ask(comm: Communicator, peer: int) -> tuple[float, float]:
    answer = np.empty(1)
    begin = time.perf_counter()
    comm.Waitall([comm.Isend(answer.copy(), peer, ControlTag.CONTROL), comm.Irecv(answer, peer, ControlTag.CONTROL)])
    end = time.perf_counter()
    return float(answer[0]) - (begin + end) / 2, (end - begin) / 2


def gather_lanes(comm: Communicator, timeline: Timeline) -> list[Lane]:
    """What every rank did, in seconds since the first of them began; on rank 0 only."""
    link, comm.link = comm.link, None  # which is for the model's messages
    offsets = clock_offsets(comm)
    lane = timeline.lane(comm.rank)
    text = np.frombuffer(json.dumps([lane.spans, lane.messages]).encode(), dtype=np.uint8)
    texts = [np.empty(int(size[0]), dtype=np.uint8) for size in all_gather(comm, np.array([text.size]))]
    if comm.rank:
        comm.Wait(comm.Isend(text, 0, ControlTag.CONTROL))
    else:
        comm.Waitall([comm.Irecv(texts[peer], peer, ControlTag.CONTROL) for peer in comm.others])
        texts[0] = text
    comm.link = link
    lanes = []
    for rank, (offset, error) in enumerate(offsets):
        spans, messages = json.loads(texts[rank].tobytes())
        found = Lane(rank, [Span(*span) for span in spans], [Message(*message) for message in messages], error)
        lanes.append(found.moved(-offset))
    first = min((lane.spans[0].begin for lane in lanes), default=0.0)
    return [lane.moved(-first) for lane in lanes]
