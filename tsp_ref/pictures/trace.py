"""A step in the Trace Event Format, for https://ui.perfetto.dev or chrome://tracing.

Each rank is a process. Its one thread has what it computes and its waits, as complete events; its messages, which
overlap, are asynchronous events; flow events lead from where a message is sent to where its receiver has it.
"""

from __future__ import annotations

import json
from typing import Any

from ..comm.timeline import Lane, Message, Span, pairs

Event = dict[str, Any]


def trace(lanes: list[Lane], title: str) -> str:
    """The whole file."""
    events = [event for lane in lanes for event in _names(lane)]
    # Spans first: a flow event belongs to the span that has begun before it.
    events += [_span(lane, span) for lane in lanes for span in lane.spans]
    ends = [(lane.rank, message) for lane in lanes for message in lane.messages]
    for number, (rank, message) in enumerate(ends):
        events += _message(rank, message, number)
    for number, pair in enumerate(pairs(lanes)):
        flow = {"name": pair.sent.tag, "cat": "flow", "id": hex(number)}
        events.append(flow | {"ph": "s", "ts": _microseconds(pair.sent.begin)} | _place(pair.source))
        events.append(flow | {"ph": "f", "bp": "e", "ts": _microseconds(pair.received.end)} | _place(pair.dest))
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": events, "otherData": {"title": title}})


def _place(rank: int) -> Event:
    """A rank's process and thread: numbers from 1 on, all different, for some readers know a thread by it alone."""
    return {"pid": rank + 1, "tid": rank + 1}


def _names(lane: Lane) -> list[Event]:
    names = {"process_name": f"rank {lane.rank}", "thread_name": "computation and waits"}
    return [{"name": what, "ph": "M", "args": {"name": name}} | _place(lane.rank) for what, name in names.items()]


def _span(lane: Lane, span: Span) -> Event:
    begin = _microseconds(span.begin)
    name = f"{span.sublayer} {span.direction}".strip() or "other"
    arguments: Event = {"sublayer": span.sublayer, "direction": span.direction}
    if span.what == "wait":
        name = f"wait: {_name(lane.messages[span.message])}" if span.message >= 0 else "other ranks' turns"
    elif span.block >= 0:
        last = span.slot + span.tiles - 1
        name += f", block {span.block}, " + (f"slot {last}" if span.tiles == 1 else f"slots {span.slot}-{last}")
        arguments |= {"block": span.block, "slot": span.slot, "tiles": span.tiles}
    return {"name": name, "cat": span.what, "ph": "X", "ts": begin, "dur": _microseconds(span.end) - begin,
            "args": arguments} | _place(lane.rank)


def _message(rank: int, message: Message, number: int) -> list[Event]:
    event = {"name": _name(message), "cat": "message", "id": hex(number)} | _place(rank)
    arguments = {"bytes": message.size, "peer": message.peer, "sublayer": message.sublayer,
                 "direction": message.direction}
    return [event | {"ph": "b", "ts": _microseconds(message.begin), "args": arguments},
            event | {"ph": "e", "ts": _microseconds(message.end)}]


def _name(message: Message) -> str:
    return f"{message.verb} {message.tag} {'to' if message.verb == 'send' else 'from'} rank {message.peer}"


def _microseconds(seconds: float) -> float:
    """In eighths: binary fractions, so that the end of a span, begin plus duration, is exactly the next one's begin."""
    return round(8e6 * seconds) / 8
