"""What readers might write in the holes of the lessons, right and wrong, and which checks a wrong answer fails."""

from __future__ import annotations

from dataclasses import dataclass

OVERLAP, RING, TRACE = "14_the_overlap_that_was_not_there.py", "15_overlap_made_real.py", "16_reading_a_trace.py"
TIME, GPU = "17_where_the_time_goes.py", "18_the_same_code_on_a_gpu.py"


@dataclass(frozen=True)
class Answer:
    """A reader's file for a lesson, and how the checks begin that must fail; none, if the answer is right."""

    lesson: str
    text: str
    fails: tuple[str, ...] = ()


BOTH = "in_flight = [comm.Irecv(incoming, left, Tag.MATRIX), comm.Isend(held, right, Tag.MATRIX)]"
SEND = "comm.Isend(held, right, Tag.MATRIX)"
RECEIVE = "comm.Irecv(incoming, left, Tag.MATRIX)"
LOOK, WAIT = "testall(comm, in_flight)", "comm.Waitall(in_flight)"


def ring(before: str, between: str, after: str, fails: tuple[str, ...] = ()) -> Answer:
    """An answer to lesson 15: what is done before, between and after the products of a step that is not the last."""
    return Answer(RING, f"""
def overlapped(comm, own, spare, multiply):
    left, right = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
    held = own
    for step in range(comm.size):
        in_flight, last = [], step + 1 == comm.size
        incoming = spare[step % 2]
        if not last:
            {before}
        for tile in range(TILES):
            {between}
            multiply(step, tile, held)
        if not last:
            {after}
        held = incoming
""", fails)


LEAVING, BEHIND = "stage_out, send: each product", "send: when a message leaves"
COMING, UNHURRIED = "stage_in: each product", "stage_in: the copy"

BITS, POSTED, COMPLETE = (f"overlapped: {what}" for what in ("every product", "at each step", "every message"))

RIGHT = {
    "14: as rounds, and turned round": Answer(OVERLAP, """
def by_turns(runs, repeats, seconds_of):
    rounds = [[seconds_of(each) for each in runs] for _ in range(repeats)]
    return [float(np.median(column)) for column in zip(*rounds)]

def hidden(messages, computation, both):
    return 1 - (both - max(messages, computation)) / min(messages, computation)
"""),
    "15: looks after every second product": ring(BOTH, f"if tile % 2: {LOOK}", WAIT),
    "15: the send first": ring(f"in_flight = [{SEND}, {RECEIVE}]", "[comm.Test(each) for each in in_flight]", WAIT),
    "16: one of four": Answer(TRACE, """
def bandwidth(pair):
    return pair.sent.size / max(pair.received.end - max(pair.sent.begin, pair.received.begin), 1e-12)
"""),
    "17: by the result's shape, and by trying": Answer(TIME, """
def product_flops(left, right):
    return 2 * math.prod((*left[:-1], right[-1])) * left[-1]

def least_tokens(inner, columns, intensity, size):
    return tried(inner, columns, intensity, size)
"""),
    "18: waited for as soon as it is staged": Answer(GPU, """
def stage_out(stream, array, pinned):
    stream.copy(array, pinned)
    copied = stream.record()
    copied.wait()
    return copied
"""),
    "18: looks until the message is here": Answer(GPU, """
def stage_in(comm, stream, message, pinned, array):
    while not comm.Test(message):
        pass
    stream.copy(pinned, array)
    return stream.record()
"""),
}

WRONG = {
    "14: by_turns not written": Answer(
        OVERLAP, "def by_turns(runs, repeats, seconds_of): ...", ("by_turns: in each round", "by_turns: it returns")),
    "14: one run after the other": Answer(OVERLAP, """
def by_turns(runs, repeats, seconds_of):
    return [median(seconds_of(each) for _ in range(repeats)) for each in runs]
""", ("by_turns: in each round",)),
    "14: means": Answer(OVERLAP, """
def by_turns(runs, repeats, seconds_of):
    rounds = [[seconds_of(each) for each in runs] for _ in range(repeats)]
    return [sum(column) / repeats for column in zip(*rounds)]
""", ("by_turns: it returns",)),
    "14: hidden not written": Answer(OVERLAP, "def hidden(messages, computation, both): ...", ("hidden: ",)),
    "14: a part of the longer": Answer(OVERLAP, """
def hidden(messages, computation, both):
    return (messages + computation - both) / max(messages, computation)
""", ("hidden: ",)),
    "15: not written": Answer(
        RING, "def overlapped(comm, own, spare, multiply): ...", (BITS, POSTED, COMPLETE)),
    "15: nobody looks": ring(BOTH, "pass", WAIT, (COMPLETE,)),
    "15: one look, before the first product": ring(BOTH, f"if tile == 0: {LOOK}", WAIT, (COMPLETE,)),
    "15: all posted after the products": ring("pass", LOOK, f"{BOTH}; {WAIT}", (POSTED, COMPLETE)),
    "15: the receive posted after the products": ring(
        f"in_flight = [{SEND}]", LOOK, f"in_flight.append({RECEIVE}); {WAIT}", (POSTED, COMPLETE)),
    "15: one buffer": ring(f"incoming = spare[0]; {BOTH}", LOOK, WAIT, (BITS,)),
    "15: the send not waited for": ring(BOTH, LOOK, "comm.Wait(in_flight[0])", (BITS,)),
    "15: everybody sends first, and waits": ring(
        f"comm.Wait({SEND}); in_flight = [{RECEIVE}]", LOOK, WAIT, (BITS, POSTED, COMPLETE)),
    "16: waited_share not written": Answer(
        TRACE, "def waited_share(lane): ...", ("waited_share: ", "waited_share is")),
    "16: waits since the clock's zero": Answer(TRACE, """
def waited_share(lane):
    return sum(span.end - span.begin for span in lane.spans if span.what == "wait") / lane.spans[-1].end
""", ("waited_share: ",)),
    "16: the longest of all spans": Answer(TRACE, """
def longest_wait(lane):
    span = max(lane.spans, key=lambda span: span.end - span.begin)
    return span.end - span.begin, lane.messages[span.message] if lane.messages else None
""", ("longest_wait: the longest",)),
    "16: since the receive was posted": Answer(TRACE, """
def bandwidth(pair):
    return pair.received.size / (pair.received.end - pair.received.begin)
""", ("bandwidth: ",)),
    "16: a time counts twice": Answer(TRACE, """
def hidden_seconds(lane, incoming):
    return sum(max(0.0, min(end, span.end) - max(begin, span.begin))
               for begin, end in map(on_its_way, incoming) for span in lane.spans if span.what == "compute")
""", ("hidden_seconds: ", "hidden_seconds is")),
    "17: nothing written": Answer(TIME, """
def product_flops(left, right): ...
def product_bytes(left, right, size): ...
def least_tokens(inner, columns, intensity, size): ...
""", ("product_flops: ", "product_bytes: ", "least_tokens: ", "product_flops, summed", "product_bytes, summed",
      "least_tokens says")),
    "17: multiplications alone": Answer(TIME, """
def product_flops(left, right):
    return math.prod(left) * right[-1]
""", ("product_flops: ", "product_flops, summed")),
    "17: leading sizes forgotten": Answer(TIME, """
def product_flops(left, right):
    return 2 * left[-2] * left[-1] * right[-1]
""", ("product_flops: ",)),
    "17: the result is not written": Answer(TIME, """
def product_bytes(left, right, size):
    return size * (math.prod(left) + math.prod(right))
""", ("product_bytes: ", "product_bytes, summed")),
    "17: all numbers have four bytes": Answer(TIME, """
def product_bytes(left, right, size):
    return 4 * (math.prod(left) + math.prod(right) + math.prod(left[:-1]) * right[-1])
""", ("product_bytes: ",)),
    "17: rounded down": Answer(TIME, """
def least_tokens(inner, columns, intensity, size):
    gain = 2 * inner * columns - intensity * size * (inner + columns)
    return int(intensity * size * inner * columns / gain) if gain > 0 else None
""", ("least_tokens: ",)),
    "17: any intensity can be had": Answer(TIME, """
def least_tokens(inner, columns, intensity, size):
    gain = 2 * inner * columns - intensity * size * (inner + columns)
    return math.ceil(intensity * size * inner * columns / (gain or 1))
""", ("least_tokens: ",)),
    "18: nothing written": Answer(GPU, """
def stage_out(stream, array, pinned): ...
def send(comm, staged, pinned, dest): ...
def stage_in(comm, stream, message, pinned, array): ...
""", (LEAVING, BEHIND, COMING)),
    "18: sent at once": Answer(GPU, """
def send(comm, staged, pinned, dest):
    return comm.Isend(pinned, dest, Tag.PIECE)
""", (LEAVING,)),
    "18: the whole stream waited for": Answer(GPU, """
def send(comm, staged, pinned, dest):
    staged.stream.synchronise()
    return comm.Isend(pinned, dest, Tag.PIECE)
""", (BEHIND,)),
    "18: marked before the copy": Answer(GPU, """
def stage_out(stream, array, pinned):
    copied = stream.record()
    stream.copy(array, pinned)
    return copied
""", (LEAVING,)),
    "18: copied by the host": Answer(GPU, """
def stage_out(stream, array, pinned):
    pinned[...] = array
    return stream.record()
""", (LEAVING,)),
    "18: never sent": Answer(GPU, """
def send(comm, staged, pinned, dest):
    staged.wait()
""", (LEAVING, BEHIND)),
    "18: free before it is copied": Answer(GPU, """
def stage_in(comm, stream, message, pinned, array):
    comm.Wait(message)
    free = stream.record()
    stream.copy(pinned, array)
    return free
""", (COMING,)),
    "18: copied before it is here": Answer(GPU, """
def stage_in(comm, stream, message, pinned, array):
    stream.copy(pinned, array)
    comm.Wait(message)
    return stream.record()
""", (COMING,)),
    "18: the copy waited for": Answer(GPU, """
def stage_in(comm, stream, message, pinned, array):
    comm.Wait(message)
    stream.copy(pinned, array)
    stream.synchronise()
    return stream.record()
""", (UNHURRIED,)),
}
