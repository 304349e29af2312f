"""What tests of the timeline share: a step recorded on every rank, what must be true of it, and a reader of traces."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from cases import random_text

from tsp_ref.comm.clocks import gather_lanes, recording
from tsp_ref.comm.communicator import Communicator
from tsp_ref.comm.timeline import NONE, Lane, pairs
from tsp_ref.comm.virtual import VirtualCommunicator
from tsp_ref.grid.grid import Grid
from tsp_ref.model.config import Config
from tsp_ref.training.loop import Training
from tsp_ref.training.strategy import Plan

Posted = Counter[tuple[Any, ...]]


@dataclass
class Recorded:
    """One rank's: what it recorded of a step, the step's times by its own clock, what its ledger says was posted."""

    grid: Grid
    own: Lane
    begin: float
    end: float
    messages: Posted
    sizes: Posted
    lanes: list[Lane]  # everyone's, on rank 0
    virtual: bool


def recorded_step(config: Config, comm: Communicator, plan: Plan) -> Recorded:
    """The second step of a training."""
    training = Training(config, comm, plan, random_text(), np)
    training.step()
    before = dict(comm.ledger.entries)
    with recording(comm) as timeline:
        training.step()
    messages, sizes = Posted(), Posted()
    for entry, (count, size) in comm.ledger.entries.items():
        was = before.get(entry, (0, 0))
        messages[entry.verb, entry.peer, entry.tag, *entry.phase] += count - was[0]
        sizes[entry.verb, entry.peer, entry.tag, *entry.phase] += size - was[1]
    begin, end = timeline.marks[0][1], timeline.marks[-1][1]
    lanes = gather_lanes(comm, timeline)
    return Recorded(training.model.grid, timeline.lane(comm.rank), begin, end, +messages, +sizes, lanes,
                    isinstance(comm, VirtualCommunicator))


def check_own(recorded: Recorded) -> None:
    """What is true of one rank's record: its spans cover the step, and its messages are the ledger's."""
    lane = recorded.own
    assert lane.spans[0].begin == recorded.begin and lane.spans[-1].end == recorded.end
    assert all(span.begin < span.end for span in lane.spans)
    assert all(span.end == following.begin for span, following in zip(lane.spans, lane.spans[1:]))
    assert {span.what for span in lane.spans} <= {"compute", "wait"}
    assert abs(lane.share("compute") + lane.share("wait") - 1) < 1e-9

    messages, sizes = Posted(), Posted()
    for message in lane.messages:
        key = (message.verb, message.peer, message.tag, message.sublayer, message.direction)
        messages[key] += 1
        sizes[key] += message.size
        assert recorded.begin < message.begin < message.end < recorded.end
    assert (messages, sizes) == (recorded.messages, recorded.sizes)

    for span in lane.spans:
        if span.what == "wait" and span.message == NONE:
            assert recorded.virtual  # it has handed on its turn
        elif span.what == "wait":
            assert lane.messages[span.message].begin < span.begin
            assert span.begin < lane.messages[span.message].end < span.end


def check_all(lanes: list[Lane]) -> None:
    """What is true of all ranks' records: each message has two ends, and none arrives before it is sent."""
    found = pairs(lanes)
    assert 2 * len(found) == sum(len(lane.messages) for lane in lanes) > 0
    for pair in found:
        assert pair.sent.size == pair.received.size and pair.sent.tag == pair.received.tag
        assert (pair.sent.peer, pair.received.peer) == (pair.dest, pair.source)
        error = lanes[pair.source].clock_error + lanes[pair.dest].clock_error
        assert pair.sent.begin <= pair.received.end + error
    assert min(lane.spans[0].begin for lane in lanes) == 0


def tiles(lane: Lane, part: str, direction: str) -> set[tuple[int, int]]:
    """The (block, slot) with which a rank computed in a phase."""
    return {(span.block, slot) for span in lane.spans for slot in range(span.slot, span.slot + span.tiles)
            if (span.what, span.sublayer, span.direction) == ("compute", part, direction) and span.block != NONE}


REQUIRED = {"X": {"cat", "ts", "dur"}, "M": {"args"}, "b": {"cat", "id", "ts"}, "e": {"cat", "id", "ts"},
            "s": {"cat", "id", "ts"}, "f": {"cat", "id", "ts"}}
"""What the Trace Event Format asks of each type of event that is used here, beside name, ph, pid and tid."""


def read_trace(text: str) -> dict[str, list[dict[str, Any]]]:
    """The events of a trace by type. An `AssertionError` where it is not as the format has it, or an arrow has no two
    ends that lie within spans."""
    whole = json.loads(text)
    assert whole["displayTimeUnit"] in ("ms", "ns")
    events: dict[str, list[dict[str, Any]]] = {kind: [] for kind in REQUIRED}
    for event in whole["traceEvents"]:
        assert REQUIRED[event["ph"]] | {"name", "pid", "tid"} <= set(event), event
        assert all(type(event[key]) is int for key in ("pid", "tid")) and type(event["name"]) is str, event
        for key in {"ts", "dur"} & set(event):
            assert type(event[key]) in (int, float) and event[key] >= 0, event
        events[event["ph"]].append(event)

    threads = {(event["pid"], event["tid"]) for kind in "Xbesf" for event in events[kind]}
    named = Counter((event["name"], event["pid"], event["tid"]) for event in events["M"] if event["args"]["name"])
    assert named == Counter((name, *thread) for name in ("process_name", "thread_name") for thread in threads)
    assert len({tid for _, tid in threads}) == len(threads)

    spans: dict[int, list[tuple[int, int]]] = {tid: [] for _, tid in threads}
    for event in sorted(events["X"], key=lambda event: float(event["ts"])):
        # As Perfetto reads them: in whole nanoseconds, cut off. What then overlaps by a single one, it leaves out.
        begin, duration = int(1000 * event["ts"]), int(1000 * event["dur"])
        lane = spans[event["tid"]]
        assert not lane or lane[-1][1] <= begin, f"overlaps the span before it: {event}"
        lane.append((begin, begin + duration))
    for begins, ends in ("be", "sf"):
        first = {(event["cat"], event["id"], event["name"]): event for event in events[begins]}
        last = {(event["cat"], event["id"], event["name"]): event for event in events[ends]}
        assert len(first) == len(events[begins]) and len(last) == len(events[ends]) and set(first) == set(last)
    assert all(event["bp"] == "e" for event in events["f"])
    for event in [*events["s"], *events["f"]]:
        assert any(begin <= 1000 * event["ts"] <= end for begin, end in spans[event["tid"]]), f"outside: {event}"
    return events
