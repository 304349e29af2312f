"""Reading a trace: who waits in a training step, for what message, and what travels under what.

Objective: after this lesson you can read the timeline of a training step: say of each rank how long it waits and for
which message, how fast a message was and whether that was the link's fault, and how much of the messages' time lay
under the computation; and you can follow a message's arrow from rank to rank in a trace viewer.

    mpirun -n 4 python lessons/16_reading_a_trace.py
    mpirun -n 4 python lessons/16_reading_a_trace.py --trace step.json      (for https://ui.perfetto.dev)
    python lessons/16_reading_a_trace.py --ranks 4 --shuffle 7

A timeline is two lists a rank. Its spans follow one another without a gap: the rank computes, on a tile with a block or
between tiles, or it waits, and then the span says with which message the wait ended. Its messages are the ends on this
rank: from the post to the moment at which the rank noticed that it was complete. `tsp_ref/comm/timeline.py` has both.

Look at: the chart; then, in the tables, the longest waits and what they were for; the bandwidth of messages, which is
never more than the link's and often far less; and which messages are on their way under the work of which sub-layer.

Write it: `waited_share`, `longest_wait`, `bandwidth` and `hidden_seconds` are yours. They are judged on timelines that
are drawn at random, and then by the project's own figures for this step. In a file of your own, one or all of them:

    mpirun -n 2 python lessons/16_reading_a_trace.py --answer mine.py

Try it: in `hidden_seconds`, leave out the merging: let `merged` be the sorted list itself. Where two messages are on
their way at once, their time then counts twice, and the check of the drawn timelines fails, as does that of this step.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from numbers import Real
from statistics import median

from stage import Lesson, Sent, drawn_text, run, sent_since, table_with

import numpy as np
from rich.markup import escape

from tsp_ref.comm.clocks import gather_lanes, recording
from tsp_ref.comm.communicator import Communicator
from tsp_ref.comm.control import agreed
from tsp_ref.comm.link import Link
from tsp_ref.comm.timeline import NONE, Lane, Message, Pair, Span, pairs
from tsp_ref.comm.virtual import VirtualCommunicator, VirtualWorld
from tsp_ref.commands.files import WholeFile
from tsp_ref.model.config import make_config
from tsp_ref.pictures.axis import end_of
from tsp_ref.pictures.chart import chart
from tsp_ref.pictures.trace import trace
from tsp_ref.process.terminal import console_for
from tsp_ref.training.loop import Training
from tsp_ref.training.strategy import Plan

CONFIG = make_config("tiny", steps=2, warmup_steps=1)
LINK = Link(20e6, 100e-6)
SEED, DRAWN = 2604, 40  # timelines drawn at random
ROUNDING = 1e-9  # seconds


def on_its_way(pair: Pair) -> tuple[float, float]:
    """Since when a message can travel, for both ends have posted it, and when its receiver has it. (Not before it can
    travel, which the comparison of two clocks may say that it was.)"""
    return pair.both_posted, max(pair.both_posted, pair.received.end)


# Yours.


def waited_share(lane: Lane) -> float:
    """The part of its time that a rank waits."""
    seconds = sum(span.end - span.begin for span in lane.spans if span.what == "wait")
    return seconds / (lane.spans[-1].end - lane.spans[0].begin)


def longest_wait(lane: Lane) -> tuple[float, Message] | None:
    """The seconds of the rank's longest wait for a message, and that message; None if it waits for none. (A virtual
    rank also waits for other ranks' turns: these spans name no message.)"""
    waits = [span for span in lane.spans if span.what == "wait" and span.message != NONE]
    if not waits:
        return None
    longest = max(waits, key=lambda span: span.end - span.begin)
    return longest.end - longest.begin, lane.messages[longest.message]


def bandwidth(pair: Pair) -> float:
    """Bytes a second of a message, from when it could travel to when its receiver had it."""
    begin, end = on_its_way(pair)
    return pair.received.size / (end - begin) if end > begin else float("inf")


def hidden_seconds(lane: Lane, incoming: list[Pair]) -> float:
    """The seconds in which a rank computes while at least one of the messages that come to it is on its way."""
    merged: list[tuple[float, float]] = []
    for begin, end in sorted(map(on_its_way, incoming)):
        if merged and begin <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((begin, end))
    computing = [(span.begin, span.end) for span in lane.spans if span.what == "compute"]
    return sum(max(0.0, min(end, until) - max(begin, since)) for begin, end in merged for since, until in computing)


# The judge.


def drawn_timeline(generator: random.Random) -> list[Lane]:
    """A few ranks' timelines in whole seconds, so that no sum is rounded: what they say could not have happened, but
    can be read."""
    size, length, begin = generator.randint(2, 4), generator.randint(20, 60), generator.randint(1, 30)
    lanes = [Lane(rank, [], []) for rank in range(size)]
    for number in range(generator.randint(3, 12)):
        source, dest = generator.sample(range(size), 2)
        posts = [begin + generator.randrange(length - 1) for _ in range(2)]
        end, nbytes = generator.randint(max(posts) + 1, begin + length), generator.randint(1, 999)
        what = f"MESSAGE_{number}", nbytes, "mlp", "forward"
        lanes[source].messages.append(Message(posts[0], end, "send", dest, *what))
        lanes[dest].messages.append(Message(posts[1], end, "receive", source, *what))
    for lane in lanes:
        cuts = sorted(generator.sample(range(begin + 1, begin + length), generator.randint(3, 15)))
        for since, until in zip([begin, *cuts], [*cuts, begin + length]):
            what, message = generator.choice(("compute", "wait")), NONE
            if what == "wait" and lane.messages and generator.random() < 0.7:
                message = generator.randrange(len(lane.messages))
            lane.spans.append(Span(float(since), float(until), what, "mlp", "forward", message=message))
    return lanes


def swept(lane: Lane, incoming: list[Pair]) -> float:
    """What `hidden_seconds` has to find, in another way: the time is cut wherever anything begins or ends, and each
    piece is asked whether the rank computes in it and how many messages are on their way."""
    computing = [(span.begin, span.end) for span in lane.spans if span.what == "compute"]
    travelling = list(map(on_its_way, incoming))
    cuts = np.unique(np.array([*computing, *travelling], dtype=np.float64).ravel())
    middles = (cuts[1:] + cuts[:-1]) / 2
    in_flight = [np.searchsorted(np.sort([begin for begin, _ in some]), middles)
                 - np.searchsorted(np.sort([end for _, end in some]), middles) for some in (computing, travelling)]
    return float(np.sum((cuts[1:] - cuts[:-1])[(in_flight[0] > 0) & (in_flight[1] > 0)]))


def same(found: object, wanted: float) -> bool:
    """Equal but for rounding; what is no number is wrong."""
    return isinstance(found, Real) and abs(found - wanted) <= ROUNDING * max(1.0, abs(wanted))


def is_longest(found: object, lane: Lane) -> bool:
    """Whether this is a longest wait for a message; there may be several."""
    waits = {number: span.end - span.begin for number, span in enumerate(lane.spans)
             if span.what == "wait" and span.message != NONE}
    if found is None or not waits:
        return found is None and not waits
    most = max(waits.values())
    return found in [(most, lane.messages[lane.spans[number].message]) for number in waits if waits[number] == most]


def show_judged(lesson: Lesson) -> None:
    """The four functions that are the reader's, on timelines drawn at random."""
    lesson.part("Four questions to a timeline")
    lesson.say(f"Asked of {DRAWN} timelines drawn at random, of two to four ranks:")
    generator = random.Random(SEED)
    timelines = [drawn_timeline(generator) for _ in range(DRAWN)]
    lanes = [lane for timeline in timelines for lane in timeline]
    found = [pairs(timeline) for timeline in timelines]
    lesson.check("waited_share: what part of its time each rank waits", all(same(waited_share(lane), sum(
        span.end - span.begin for span in lane.spans if span.what != "compute") / (
            max(span.end for span in lane.spans) - min(span.begin for span in lane.spans))) for lane in lanes))
    lesson.check("longest_wait: the longest wait for a message, and the message",
                 all(is_longest(longest_wait(lane), lane) for lane in lanes))
    lesson.check("bandwidth: bytes over the time since both ends were posted", all(
        same(bandwidth(pair), pair.sent.size / (pair.received.end - max(pair.sent.begin, pair.received.begin)))
        for some in found for pair in some))
    lesson.check("hidden_seconds: the time in which a rank computes and something comes to it", all(
        same(hidden_seconds(lane, to(lane.rank, some)), swept(lane, to(lane.rank, some)))
        for timeline, some in zip(timelines, found) for lane in timeline))


def to(rank: int, some: list[Pair]) -> list[Pair]:
    """The messages that come to a rank."""
    return [pair for pair in some if pair.dest == rank]


# The step.


def recorded_step(comm: Communicator) -> tuple[Lane, Sent, list[Lane]]:
    """The second step of a training under TSP, over the link: this rank's own record of it, what its ledger says that
    it sent, and on rank 0 everyone's record."""
    training = Training(CONFIG, comm, Plan("tsp"), drawn_text(), np)
    comm.travel_by("poll", Link(LINK.bandwidth, LINK.latency))  # each rank's own: a link knows what it is busy with
    training.step()
    before = sent_since(comm, {})
    with recording(comm) as timeline:
        training.step()
    comm.travel_by("wait", None)
    return timeline.lane(comm.rank), sent_since(comm, before), gather_lanes(comm, timeline)


def sent_by(lane: Lane) -> Sent:
    """What a rank has sent, counted in its timeline."""
    sent: Sent = {}
    for message in lane.messages:
        if message.verb == "send":
            key = message.sublayer, message.direction, message.tag
            messages, size = sent.get(key, (0, 0))
            sent[key] = messages + 1, size + message.size
    return sent


def show_step(lesson: Lesson, own: Lane, sent: Sent, lanes: list[Lane]) -> list[Pair]:
    """The chart, and that the record has everything. Returns all messages, on rank 0."""
    lesson.part("A step")
    found = pairs(lanes)
    if lanes:
        lesson.say(f"A training step of {CONFIG.num_parameters:,} parameters under TSP, over a link of "
                   f"{LINK.bandwidth / 1e6:.0f} MB/s and {1e6 * LINK.latency:.0f} µs: {1e3 * end_of(lanes):.0f} ms, "
                   f"{len(found):,} messages.\nClocks are compared to within "
                   f"{1e6 * max(lane.clock_error for lane in lanes):.0f} µs.")
        lesson.say(chart(lanes, lesson.console.width))
    if isinstance(lesson.comm, VirtualCommunicator):
        lesson.say("Only one virtual rank computes at a time, so that the others wait for their turn most of the time.")
    lesson.check("on every rank the spans follow one another without a gap",
                 all(one.end == following.begin for one, following in zip(own.spans, own.spans[1:])))
    lesson.check("and the messages that were sent are the ledger's: sub-layer, direction, purpose, number and bytes",
                 sent_by(own) == sent)
    lesson.check("each message has two ends, of the same size",
                 2 * len(found) == sum(len(lane.messages) for lane in lanes)
                 and all(pair.sent.size == pair.received.size for pair in found))
    return found


def show_waits(lesson: Lesson, own: Lane, lanes: list[Lane]) -> None:
    """Who waits, and for what."""
    lesson.part("Who waits, for what, how long")
    table = table_with("rank", "computes", "waits", "longest, ms", "in", "for", "bytes")
    for lane in lanes:
        share, cells = waited_share(lane), []
        match longest_wait(lane):
            case float(seconds), Message() as message:
                cells = [f"{1e3 * seconds:.1f}", f"{message.sublayer} {message.direction}", name_of(message),
                         f"{message.size:,}"]
        table.add_row(str(lane.rank), f"{lane.share('compute'):.0%}", f"{share:.0%}" if isinstance(share, Real) else "",
                      *cells)
    lesson.say(table)
    lesson.check("waited_share is the project's own figure, on every rank", same(waited_share(own), own.share("wait")))
    lesson.check("longest_wait: none is longer, on any rank", is_longest(longest_wait(own), own))
    waits = [span for span in own.spans if span.what == "wait" and span.message != NONE]
    lesson.check("every wait for a message ended when the message had been noticed to be complete, not before",
                 all(own.messages[span.message].end <= span.end for span in waits))


def name_of(message: Message) -> str:
    """A message in a few words."""
    return f"{message.tag} {'to' if message.verb == 'send' else 'from'} rank {message.peer}"


def show_under(lesson: Lesson, lanes: list[Lane], found: list[Pair]) -> None:
    """What is on its way to the rank that waits most, under which of its sub-layers."""
    lesson.part("What travels under what")
    lane = max(lanes, key=lambda lane: lane.share("wait"), default=None)
    together = step = 0.0
    if lane is not None:
        lesson.say(f"Rank {lane.rank}, which waits most, by sub-layer; and which messages, how many of each, are on "
                   "their way to it while\nit computes that one:")
        table = table_with("sub-layer", "computes, ms", "waits, ms", "on their way meanwhile")
        table.columns[3].justify = "left"
        incoming = [(*on_its_way(pair), pair.received.tag) for pair in to(lane.rank, found)]
        for phase in dict.fromkeys((span.sublayer, span.direction) for span in lane.spans):
            spans = [span for span in lane.spans if (span.sublayer, span.direction) == phase]
            work, waits = (sum(span.end - span.begin for span in spans if span.what == what)
                           for what in ("compute", "wait"))
            under = Counter(tag for begin, end, tag in incoming if any(
                begin < span.end and span.begin < end for span in spans if span.what == "compute"))
            table.add_row(" ".join(phase).strip() or "between sub-layers", f"{1e3 * work:.1f}", f"{1e3 * waits:.1f}",
                          ", ".join(f"{tag} {count}" for tag, count in under.most_common(4)))
            together += work + waits
        lesson.say(table)
        step = lane.spans[-1].end - lane.spans[0].begin
    lesson.check("both columns together are the step", same(together, step))


def show_speed(lesson: Lesson, lanes: list[Lane], found: list[Pair]) -> None:
    """How fast messages were."""
    lesson.part("How fast a message was")
    lesson.say("From when both ends were posted. A slow message waited: behind another on the link, or for somebody\n"
               "to notice it; and what a few bytes take is the latency. Medians, by purpose:")
    table = table_with("purpose", "messages", "bytes", "ms", "MB/s")
    for tag in dict.fromkeys(pair.sent.tag for pair in found):
        some = [pair for pair in found if pair.sent.tag == tag]
        took = [end - begin for begin, end in map(on_its_way, some)]
        speeds = [speed for speed in map(bandwidth, some) if isinstance(speed, Real)]
        table.add_row(tag, f"{len(some):,}", f"{median(pair.sent.size for pair in some):,.0f}",
                      f"{1e3 * median(took):.2f}", f"{median(speeds) / 1e6:.2f}" if speeds else "")
    lesson.say(table)
    slack = 2 * max((lane.clock_error for lane in lanes), default=0.0)
    lesson.check(f"none was faster than the link, {LINK.bandwidth / 1e6:.0f} MB/s, but for what clocks may be wrong by",
                 all(isinstance(speed := bandwidth(pair), Real) and speed > 0
                     and pair.sent.size <= LINK.bandwidth * (pair.sent.size / speed + slack) for pair in found))
    lesson.check("no message arrived before it was sent",
                 all(pair.sent.begin <= pair.received.end + slack for pair in found))


def show_hidden(lesson: Lesson, lanes: list[Lane], found: list[Pair]) -> None:
    """What of the messages' time lies under computation."""
    lesson.part("What is hidden")
    table = table_with("rank", "something comes, ms", "of it while it computes, ms", "part")
    right = True
    for lane in lanes:
        incoming = to(lane.rank, found)
        everything = Lane(lane.rank, [span._replace(what="compute") for span in lane.spans], [])
        hidden, whole = hidden_seconds(lane, incoming), swept(everything, incoming)
        right = right and same(hidden, swept(lane, incoming))
        table.add_row(str(lane.rank), f"{1e3 * whole:.1f}",
                      *((f"{1e3 * hidden:.1f}", f"{hidden / whole:.0%}") if isinstance(hidden, Real) else ("", "")))
    lesson.say(table)
    lesson.say("Where something comes while the rank waits, a faster link would help, or looking more often;\n"
               "where it waits and nothing comes, the other rank is late.")
    lesson.check("hidden_seconds is what sweeping over the step finds, on every rank", right)


def show_trace(lesson: Lesson, lanes: list[Lane], found: list[Pair], file: WholeFile) -> None:
    """The same as a file for a trace viewer."""
    lesson.part("The trace")
    text = trace(lanes, "a training step under TSP")
    events = json.loads(text)["traceEvents"]
    kinds = Counter(event["ph"] for event in events)
    lesson.say(f"A trace is a list of events, {len(events):,} here. X: a span, with its begin and duration in µs. "
               "b and e: a\nmessage's begin and end. s and f: where an arrow starts and ends. Here, of the message "
               "that was longest on its way:")
    starts, ends = ({event["id"]: event for event in events if event["ph"] == kind} for kind in "sf")
    if found:
        number = max(range(len(found)), key=lambda index: on_its_way(found[index])[1] - on_its_way(found[index])[0])
        for event in (starts[hex(number)], ends[hex(number)]):
            lesson.say("  " + escape(json.dumps(event)))
    lesson.check("one X for each span, and one arrow for each message, with both its ends",
                 kinds["X"] == sum(len(lane.spans) for lane in lanes)
                 and len(starts) == len(ends) == len(found) and set(starts) == set(ends))
    lesson.check("each arrow leads from the sender to the receiver", all(
        (starts[hex(number)]["pid"], ends[hex(number)]["pid"]) == (pair.source + 1, pair.dest + 1)
        for number, pair in enumerate(found)))
    file.write(text)
    if file.path is None:
        lesson.say("With --trace FILE it is written to a file, for https://ui.perfetto.dev.")
    else:
        lesson.say(f"Written to {escape(file.path)}, for https://ui.perfetto.dev: a row for each rank; choose a "
                   "span, and see the\narrows that lead to it and from it.")


def main(lesson: Lesson) -> None:
    """The lesson, part by part."""
    lesson.require_ranks(CONFIG.max_ranks)
    path = lesson.options.trace if lesson.rank == 0 else None
    file = agreed(lesson.comm, lambda: WholeFile("--trace", path))
    show_judged(lesson)
    if lesson.size == 1:
        alone(lesson, file)
    else:
        read(lesson, file)


def read(lesson: Lesson, file: WholeFile) -> None:
    """Record a step, and read it."""
    own, sent, lanes = recorded_step(lesson.comm)
    found = show_step(lesson, own, sent, lanes)
    show_waits(lesson, own, lanes)
    show_under(lesson, lanes, found)
    show_speed(lesson, lanes, found)
    show_hidden(lesson, lanes, found)
    show_trace(lesson, lanes, found, file)


def alone(lesson: Lesson, file: WholeFile) -> None:
    """One rank has no messages, so four virtual ones take its place."""
    own, _, _ = recorded_step(lesson.comm)
    lesson.check("one rank never waits, and has no messages", same(waited_share(own), 0.0) and not own.messages)
    lesson.say("So the lesson goes on with 4 virtual ranks inside this one.")

    def teach(comm: Communicator) -> list[str]:
        inner = Lesson(comm, console_for(comm.rank))
        read(inner, file if comm.rank == 0 else WholeFile("--trace", None))
        return inner.failures

    lesson.failures += VirtualWorld(4).run(teach)[0]


def own_options(parser: argparse.ArgumentParser) -> None:
    """What this lesson asks for beside what all do."""
    parser.add_argument("--trace", metavar="FILE", help="write the step to a file that https://ui.perfetto.dev reads")


if __name__ == "__main__":
    run(__doc__, main, holes=(waited_share, longest_wait, bandwidth, hidden_seconds), more=own_options)
