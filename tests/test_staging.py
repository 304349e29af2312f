"""Messages of a GPU's arrays: in which order they start and end, and that a missing wait is noticed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cases import random_text
from gpu_ranks import GpuCommunicator, on_gpus
from strict import Race, StrictCupy
from test_backend import CONFIG, digest_on

from tsp_ref.backends import gpu as backends
from tsp_ref.backends.gpu import CupyBackend
from tsp_ref.comm.clocks import recording
from tsp_ref.comm.communicator import Communicator
from tsp_ref.comm.link import Link
from tsp_ref.comm.request import Request
from tsp_ref.comm.staging import DeviceTransport, StagedTransport
from tsp_ref.comm.virtual import VirtualWorld
from tsp_ref.errors import MessageError, UserError
from tsp_ref.schedules.tags import Tag
from tsp_ref.training.collect import digest
from tsp_ref.training.loop import Training
from tsp_ref.training.strategy import Plan

BOTH = pytest.mark.parametrize("gpu_aware", [False, True], ids=["staged", "gpu-aware"])
PLANS = [(Plan(name), size) for name in ("tp", "sp", "tp+sp", "fsdp+sp", "tsp") for size in (2, 4)]


def train(comm: Communicator, plan: Plan, backend: CupyBackend | Any) -> str:
    training = Training(CONFIG, comm, plan, random_text(), backend)
    training.step()
    training.validate()
    return digest(training)


@pytest.fixture(scope="module")
def wanted() -> str:
    return digest_on(np, Plan("single"), 1)


@BOTH
@pytest.mark.parametrize(("plan", "ranks"), PLANS, ids=str)
def test_every_schedule_has_numpy_s_bits_when_each_rank_has_a_gpu(
    plan: Plan, ranks: int, gpu_aware: bool, wanted: str
) -> None:
    assert on_gpus(ranks, lambda comm, backend: train(comm, plan, backend), gpu_aware, seed=ranks)[0] == wanted


@BOTH
def test_links_and_polling_change_no_bit_of_it(gpu_aware: bool, wanted: str) -> None:
    def on_a_link(comm: Communicator, backend: CupyBackend) -> str:
        comm.travel_by("poll", Link(1e9, 1e-5))
        return train(comm, Plan("tsp"), backend)

    assert on_gpus(2, on_a_link, gpu_aware, seed=5)[0] == wanted


@BOTH
def test_the_ledger_and_the_timeline_know_the_same_messages_as_on_numpy(gpu_aware: bool) -> None:
    def posted(comm: Communicator, backend: Any) -> Any:
        training = Training(CONFIG, comm, Plan("tsp"), random_text(), backend)
        with recording(comm) as timeline:
            training.step()
        lane = timeline.lane(comm.rank)
        assert all(message.begin < message.end for message in lane.messages)
        return dict(comm.ledger.entries), sorted(message[2:] for message in lane.messages)

    assert on_gpus(2, posted, gpu_aware) == VirtualWorld(2).run(lambda comm: posted(comm, np))


@BOTH
def test_ranks_that_wait_for_a_receive_first_still_send(gpu_aware: bool) -> None:
    """What is deferred starts when anything is tested: nobody asks about the send before its receiver has it."""

    def exchange(comm: Communicator, backend: CupyBackend) -> list[float]:
        other = 1 - comm.rank
        received, sent = backend.xp.zeros(3, dtype="float32"), backend.xp.full(3, 1.0 + comm.rank, dtype="float32")
        receive, send = comm.Irecv(received, other, 1), comm.Isend(sent, other, 1)
        comm.Wait(receive)
        comm.Wait(send)
        return backend.to_host(received).tolist()

    for seed in range(5):
        assert on_gpus(2, exchange, gpu_aware, seed) == [[2.0] * 3, [1.0] * 3]


@BOTH
def test_messages_of_one_tag_arrive_in_order_whatever_lies_where(gpu_aware: bool) -> None:
    def exchange(comm: Communicator, backend: CupyBackend) -> list[Any]:
        numbers = [np.full(4, float(number)) for number in range(6)]
        mixed = [backend.from_host(each) if index % 3 else each for index, each in enumerate(numbers)]
        if comm.rank == 0:
            comm.Waitall([comm.Isend(each, 1, 7) for each in mixed])
            return []
        places = [backend.xp.zeros(4, dtype="float64") if index % 2 else np.zeros(4) for index in range(6)]
        comm.Waitall([comm.Irecv(place, 0, 7) for place in places])
        return [(backend.to_host(place) if index % 2 else place)[0] for index, place in enumerate(places)]

    for seed in range(5):
        assert on_gpus(2, exchange, gpu_aware, seed)[1] == [0, 1, 2, 3, 4, 5]


class Mark:
    """A point that the device comes to when the test says so."""

    def __init__(self, done: bool = False) -> None:
        self.done = done


class ByHand:
    """A device and a wire whose every step is the test's."""

    kind = "cuda"

    def __init__(self) -> None:
        self.marks: list[Mark] = []
        self.begun: list[tuple[str, int]] = []
        self.arrived: set[int] = set()

    def owns(self, array: Any) -> bool:
        return not isinstance(array, np.ndarray)

    def mark(self, *_: Any) -> Mark:
        self.marks.append(Mark())
        return self.marks[-1]

    copy_out = copy_in = mark

    def pinned(self, size: int) -> Any:
        return np.zeros(size, dtype=np.uint8)

    def begin(self, request: Request, buffer: Any) -> Any:
        self.begun.append((request.verb, request.array.nbytes))
        return request.array.nbytes

    def over(self, request: Request, handle: Any) -> bool:
        return handle in self.arrived


def message(verb: str, size: int, tag: int = 1, on_host: bool = False) -> Request:
    """Told apart by its size."""
    array = np.zeros(size, dtype=np.uint8) if on_host else SimpleNamespace(nbytes=size)
    return Request(verb, array, 0, 1, tag)  # type: ignore[arg-type]


def test_a_staged_send_starts_when_its_copy_is_done_and_not_at_the_post() -> None:
    hand = ByHand()
    transport = StagedTransport(hand, hand)
    send = message("send", 10)
    transport.post(send)
    posted, copied = hand.marks
    posted.done = True
    assert not transport.test(send) and hand.begun == []
    copied.done = True
    assert not transport.test(send) and hand.begun == [("send", 10)]
    hand.arrived.add(10)
    assert transport.pinned_bytes == transport.pinned_peak == 10
    assert transport.test(send)
    assert (transport.pinned_bytes, transport.pinned_peak, send.handle) == (0, 10, None)


def test_a_staged_receive_starts_at_once_and_is_complete_when_its_copy_is_done() -> None:
    hand = ByHand()
    transport = StagedTransport(hand, hand)
    receive = message("receive", 10)
    transport.post(receive)
    assert hand.begun == [("receive", 10)] and len(hand.marks) == 1
    hand.arrived.add(10)
    assert not transport.test(receive) and len(hand.marks) == 2
    hand.marks[1].done = True
    assert transport.test(receive)


@pytest.mark.parametrize("verb", ["send", "receive"])
def test_a_gpu_aware_message_starts_when_what_was_launched_before_is_done(verb: str) -> None:
    hand = ByHand()
    transport = DeviceTransport(hand, hand)
    request = message(verb, 10)
    transport.post(request)
    assert not transport.test(request) and hand.begun == []
    hand.marks[0].done = True
    assert not transport.test(request) and hand.begun == [(verb, 10)]
    hand.arrived.add(10)
    assert transport.test(request)


def test_a_message_waits_for_those_of_its_peer_and_tag_and_for_no_others() -> None:
    hand = ByHand()
    transport = DeviceTransport(hand, hand)
    first, second, third = message("send", 1), message("send", 2), message("send", 3, on_host=True)
    other = message("send", 4, tag=2, on_host=True)
    for request in (first, second, third, other):
        transport.post(request)
    assert hand.begun == [("send", 4)]
    hand.marks[1].done = True
    assert not transport.test(third) and hand.begun == [("send", 4)]
    hand.marks[0].done = True
    transport.test(other)
    assert hand.begun == [("send", 4), ("send", 1), ("send", 2), ("send", 3)]


@BOTH
def test_a_message_that_nobody_waits_for_is_named_at_the_end(gpu_aware: bool) -> None:
    def forget(comm: Communicator, backend: CupyBackend) -> None:
        if comm.rank == 0:
            comm.Isend(backend.xp.zeros(3, dtype="float32"), 1, Tag.LOSS)

    with pytest.raises(MessageError, match="never completed: send on rank 0 to rank 1, tag LOSS"):
        on_gpus(2, forget, gpu_aware)


def test_a_thread_that_helps_messages_on_uses_the_rank_s_gpu() -> None:
    """A new thread begins on GPU 0, whichever the rank has."""
    backend = CupyBackend(StrictCupy(gpus=2), gpu=1)
    array, pinned = backend.from_host(np.arange(4.0)), backend.pinned(32)
    copied: list[Any] = []
    helper = threading.Thread(target=lambda: copied.append(backend.copy_out(array, pinned, backend.mark())))
    helper.start()
    helper.join()
    while not copied[0].done:
        pass
    assert pinned.view(np.float64).tolist() == [0, 1, 2, 3]


class CopiesOutTooEarly(CupyBackend):
    """The copy does not wait for what computes the array."""

    def copy_out(self, array: Any, pinned: Any, after: Any) -> Any:
        return super().copy_out(array, pinned, self._event(self._copies))


class CopiesInTooEarly(CupyBackend):
    """The copy does not wait for what still reads the array."""

    def copy_in(self, pinned: Any, array: Any, after: Any) -> Any:
        return super().copy_in(pinned, array, self._event(self._copies))


class SaysThatCopiesInAreDone(CupyBackend):
    """A receive is complete while its copy is in flight."""

    def copy_in(self, pinned: Any, array: Any, after: Any) -> Any:
        self.kept = [*getattr(self, "kept", []), pinned]
        super().copy_in(pinned, array, after)
        return Mark(done=True)


class SaysThatCopiesOutAreDone(CupyBackend):
    """MPI sends what is not copied yet."""

    def copy_out(self, array: Any, pinned: Any, after: Any) -> Any:
        self.kept = [*getattr(self, "kept", []), pinned, array]
        super().copy_out(array, pinned, after)
        return Mark(done=True)


class MarksNothing(CupyBackend):
    """What was launched before the post is taken for done."""

    def mark(self) -> Any:
        return Mark(done=True)


@pytest.mark.parametrize(("backend", "gpu_aware", "noticed"), [
    (CopiesOutTooEarly, False, "stream 1 reads what stream 0 writes"),
    (CopiesInTooEarly, False, "stream 1 writes what stream 0 (read|write)s"),
    (SaysThatCopiesInAreDone, False, "stream 0 (read|write)s what stream 1 writes"),
    (MarksNothing, True, "MPI is handed to (send|receive) what stream 0"),
])
@pytest.mark.parametrize("schedule", ["tp", "tsp"])  # under sp a send's copy always lies between, and orders both
def test_a_wait_that_is_left_out_is_a_race(
    backend: type[CupyBackend], gpu_aware: bool, noticed: str, schedule: str
) -> None:
    with pytest.raises(Race, match=noticed):
        for seed in range(6):  # in some orders the host happens to have seen enough
            on_gpus(2, lambda comm, library: train(comm, Plan(schedule), library), gpu_aware, seed, backend)


def test_a_send_of_what_is_not_copied_yet_sends_rubbish() -> None:
    """As MPI would: it reads pinned memory at any time, and no stream knows of it."""

    def exchange(comm: Communicator, backend: CupyBackend) -> bytes:
        array = backend.xp.full(64, 1.0, dtype="float32")
        if comm.rank == 0:
            comm.Wait(comm.Isend(array, 1, 1))
        else:
            comm.Wait(comm.Irecv(array, 0, 1))
        return backend.to_host(array).tobytes()

    assert len(set(on_gpus(2, exchange))) == 1
    assert set(on_gpus(2, exchange, backend=SaysThatCopiesOutAreDone)[1]) == {0xA5}


def probe(corrupt: Callable[[Any], Any]) -> list[bool]:
    """What each of two ranks finds of the trial message, if rank 1 sends another."""

    def main(comm: Communicator, backend: CupyBackend) -> bool:
        if comm.rank == 1:
            plain = backend.from_host
            backend.from_host = lambda array: plain(corrupt(array))  # type: ignore[method-assign]
        return backends._round_trip(comm, backend)

    return on_gpus(2, main, gpu_aware=True)


def test_the_trial_message_tells_a_wrong_number_from_right_ones() -> None:
    assert probe(lambda array: array) == [True, True]
    assert probe(lambda array: array + (np.arange(array.size) == 77)) == [False, True]
    assert backends._require_intact(True)
    with pytest.raises(UserError, match="arrived with other numbers than were sent"):
        backends._require_intact(False)


def test_each_rank_has_a_gpu_of_its_own() -> None:
    """The harness is what it says: no rank's arrays meet another's."""

    def arrays(comm: Communicator, backend: CupyBackend) -> Any:
        assert isinstance(comm, GpuCommunicator) and isinstance(comm.transport, StagedTransport)
        return backend.xp.zeros(1, dtype="float32")

    first, second = on_gpus(2, arrays)
    with pytest.raises(TypeError, match="another GPU"):
        first + second
