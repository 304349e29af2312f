"""Messages between virtual ranks: what is refused, what is counted, what is repeatable, and how a run ends."""

import threading
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import numpy as np
import pytest

from tsp_ref.accounting.ledger import Entry
from tsp_ref.comm.communicator import Communicator
from tsp_ref.comm.control import agreed, all_gather, from_root, gather_texts
from tsp_ref.comm.virtual import VirtualWorld
from tsp_ref.errors import MessageError, UserError

SEEDS = [None, 0, 1, 2, 3]


class Purpose(IntEnum):
    WEIGHTS = 5
    TEXT = 6


def run(size: int, main: Callable[[Communicator], Any], seed: int | None = None) -> list[Any]:
    return VirtualWorld(size, seed).run(main)


def failure(size: int, main: Callable[[Communicator], Any], seed: int | None = None) -> str:
    with pytest.raises(MessageError) as caught:
        run(size, main, seed)
    return str(caught.value)


def zeros(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.zeros(shape, dtype=dtype)


def read_only() -> np.ndarray:
    array = zeros(2, 3)
    array.flags.writeable = False
    return array


def exchange(comm: Communicator, sent: np.ndarray, received: np.ndarray, tag: int = Purpose.WEIGHTS) -> np.ndarray:
    """Rank 0 sends, rank 1 receives."""
    comm.Wait(comm.Isend(sent, 1, tag) if comm.rank == 0 else comm.Irecv(received, 0, tag))
    return received


@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "uint8"])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_message_arrives_bit_for_bit(seed: int | None, dtype: str) -> None:
    sent = np.random.default_rng(0).integers(0, 256, (2, 3), dtype=np.uint8).astype(dtype)
    received = run(2, lambda comm: exchange(comm, sent, np.empty_like(sent)), seed)[1]
    assert received.tobytes() == sent.tobytes()


@pytest.mark.parametrize(("array", "reason"), [
    (zeros(6, 4)[:, :2], "the array must be C-contiguous; send a copy, or lay it out so"),
    (zeros(2, 6).T, "the array must be C-contiguous; send a copy, or lay it out so"),
    (zeros(6, 2, dtype="float16"), "the dtype must be one of float32, float64, int64, uint8"),
    (zeros(6, 2, dtype="int32"), "the dtype must be one of float32, float64, int64, uint8"),
    (zeros(6, 2, dtype=">f4"), "the dtype must be one of float32, float64, int64, uint8"),
])
@pytest.mark.parametrize("verb", ["send", "receive"])
def test_an_array_that_cannot_travel_is_refused_where_it_is_posted(verb: str, array: np.ndarray, reason: str) -> None:
    def main(comm: Communicator) -> None:
        if comm.rank == 2:
            _ = comm.Isend(array, 1, Purpose.WEIGHTS) if verb == "send" else comm.Irecv(array, 1, Purpose.WEIGHTS)

    direction = "to" if verb == "send" else "from"
    assert failure(3, main) == (f"{verb} on rank 2 {direction} rank 1, tag WEIGHTS, [6, 2] {array.dtype}, "
                                f"{array.nbytes} bytes: {reason}")


@pytest.mark.parametrize("verb", ["send", "receive"])
@pytest.mark.parametrize("peer", [2, 3, -1])
def test_a_peer_that_is_oneself_or_nobody_is_refused(peer: int, verb: str) -> None:
    def main(comm: Communicator) -> None:
        if comm.rank == 2:
            _ = comm.Isend(zeros(4), peer, 7) if verb == "send" else comm.Irecv(zeros(4), peer, 7)

    direction = "to" if verb == "send" else "from"
    assert failure(3, main) == (f"{verb} on rank 2 {direction} rank {peer}, tag 7, [4] float32, 16 bytes: "
                                "the peer must be another rank of 0 to 2")


def test_a_receive_into_a_read_only_array_is_refused() -> None:
    message = failure(2, lambda comm: exchange(comm, zeros(2, 3), read_only()))
    assert message == ("receive on rank 1 from rank 0, tag WEIGHTS, [2, 3] float32, 24 bytes: "
                       "the array must be writeable")


def test_a_read_only_array_may_be_sent() -> None:
    run(2, lambda comm: exchange(comm, read_only(), zeros(2, 3)))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("sent", "received", "reason"), [
    (zeros(3, 3), zeros(2, 3), "the message has 36 bytes"),
    (zeros(1, 3), zeros(2, 3), "the message has 12 bytes"),
    (zeros(2, 3, dtype="float64"), zeros(2, 3), "the message has dtype float64"),
    (zeros(1, 3, dtype="float64"), zeros(2, 3), "the message has dtype float64"),
    (zeros(3, 2), zeros(2, 3), "the message has shape [3, 2]"),
    (zeros(6), zeros(2, 3), "the message has shape [6]"),
])
def test_a_message_of_another_form_than_its_receiver_expects_is_refused(
    sent: np.ndarray, received: np.ndarray, reason: str, seed: int | None
) -> None:
    message = failure(2, lambda comm: exchange(comm, sent, received), seed)
    assert message == (f"receive on rank 1 from rank 0, tag WEIGHTS, [2, 3] float32, 24 bytes: {reason}; the send on "
                       f"rank 0 to rank 1, tag WEIGHTS, {list(sent.shape)} {sent.dtype}, {sent.nbytes} bytes")


def test_finishing_with_a_message_still_open_is_refused() -> None:
    def main(comm: Communicator) -> None:
        if comm.rank == 0:
            comm.Irecv(zeros(4), 1, Purpose.TEXT)
            comm.finish()

    assert failure(2, main) == "never completed: receive on rank 0 from rank 1, tag TEXT, [4] float32, 16 bytes"


def test_finishing_without_having_received_what_was_sent_is_refused() -> None:
    def main(comm: Communicator) -> None:
        if comm.rank == 0:
            comm.Isend(zeros(4), 1, Purpose.TEXT)
        else:
            comm.finish()

    assert failure(2, main) == "never received: send on rank 0 to rank 1, tag TEXT, [4] float32, 16 bytes"


@pytest.mark.parametrize("seed", SEEDS)
def test_finishing_in_good_order_is_accepted(seed: int | None) -> None:
    def main(comm: Communicator) -> None:
        exchange(comm, zeros(4), zeros(4))
        comm.finish()

    run(2, main, seed)


def test_the_ledger_counts_messages_and_bytes_by_verb_tag_and_peer() -> None:
    def main(comm: Communicator) -> None:
        if comm.rank == 0:
            comm.Waitall([comm.Isend(zeros(4), 1, Purpose.WEIGHTS), comm.Isend(zeros(2), 1, Purpose.WEIGHTS),
                          comm.Isend(zeros(3, dtype="uint8"), 1, Purpose.TEXT), comm.Isend(zeros(8), 2, Purpose.TEXT)])
        elif comm.rank == 1:
            comm.Waitall([comm.Irecv(zeros(4), 0, Purpose.WEIGHTS), comm.Irecv(zeros(2), 0, Purpose.WEIGHTS),
                          comm.Irecv(zeros(3, dtype="uint8"), 0, Purpose.TEXT)])
        else:
            comm.Wait(comm.Irecv(zeros(8), 0, Purpose.TEXT))

    world = VirtualWorld(3)
    world.run(main)
    zero, one, two = (comm.ledger for comm in world.communicators)
    outside = ("", "")
    assert zero.entries == {Entry("send", outside, "WEIGHTS", 1): (2, 24), Entry("send", outside, "TEXT", 1): (1, 3),
                            Entry("send", outside, "TEXT", 2): (1, 32)}
    assert one.entries == {
        Entry("receive", outside, "WEIGHTS", 0): (2, 24), Entry("receive", outside, "TEXT", 0): (1, 3)}
    assert zero.sums("send") == (4, 59)
    assert zero.sums("send", tag="TEXT") == (2, 35)
    assert zero.sums("send", peer=1) == (3, 27)
    assert zero.sums("send", "TEXT", 2) == two.sums("receive") == (1, 32)
    assert zero.sums("receive") == one.sums("send") == (0, 0)


def test_messages_are_counted_under_the_phase_in_which_they_are_posted() -> None:
    def main(comm: Communicator) -> None:
        here = "send" if comm.rank == 0 else "receive"
        late = comm.Isend(zeros(1), 1, 0) if comm.rank == 0 else comm.Irecv(zeros(1), 0, 0)
        for phase in (("mlp", "forward"), ("mlp", "backward"), ("head", "backward"), ("mlp", "forward")):
            comm.phase = phase
            assert comm.phase == phase
            exchange(comm, zeros(4), zeros(4))
        comm.Wait(late)  # posted before the first phase, so it is counted outside
        comm.phase = ("", "")
        exchange(comm, zeros(2), zeros(2), tag=Purpose.TEXT)
        assert comm.ledger.entries == {
            Entry(here, ("", ""), "0", 1 - comm.rank): (1, 4),
            Entry(here, ("mlp", "forward"), "WEIGHTS", 1 - comm.rank): (2, 32),
            Entry(here, ("mlp", "backward"), "WEIGHTS", 1 - comm.rank): (1, 16),
            Entry(here, ("head", "backward"), "WEIGHTS", 1 - comm.rank): (1, 16),
            Entry(here, ("", ""), "TEXT", 1 - comm.rank): (1, 8),
        }

    run(2, main)


def test_the_ledger_sums_by_part_and_by_direction() -> None:
    def main(comm: Communicator) -> None:
        for number, phase in enumerate([("mlp", "forward"), ("mlp", "backward"), ("head", "backward"), ("", "")]):
            comm.phase = phase
            exchange(comm, zeros(10**number), zeros(10**number), tag=Purpose.TEXT if number == 2 else Purpose.WEIGHTS)

    world = VirtualWorld(2)
    world.run(main)
    ledger = world.communicators[0].ledger
    assert ledger.sums("send") == (4, 4444)
    assert ledger.sums("send", sublayer="mlp") == (2, 44)
    assert ledger.sums("send", direction="backward") == (2, 440)
    assert ledger.sums("send", sublayer="mlp", direction="backward") == (1, 40)
    assert ledger.sums("send", sublayer="") == ledger.sums("send", direction="") == (1, 4000), "outside is a phase, too"
    assert ledger.sums("send", "TEXT", 1, sublayer="head") == (1, 400)
    assert ledger.sums("send", "TEXT", sublayer="mlp") == ledger.sums("receive", sublayer="mlp") == (0, 0)


def test_the_ledger_does_not_count_what_was_refused() -> None:
    comm = VirtualWorld(2).communicators[0]
    with pytest.raises(MessageError):
        comm.Isend(zeros(4, 4).T[:2], 1, 0)
    assert comm.ledger.entries == {}
    comm.finish()


@pytest.mark.parametrize("seed", [*SEEDS, *range(4, 20)])
def test_messages_of_one_kind_arrive_in_the_order_in_which_they_were_sent(seed: int | None) -> None:
    def main(comm: Communicator) -> list[int]:
        arrays = [np.full(3, 100 * comm.rank + number, dtype=np.int64) for number in range(6)]
        if comm.rank < 2:
            comm.Waitall([comm.Isend(array, 2, tag) for array in arrays for tag in (7, 8)])
            return []
        received = [(source, tag, zeros(3, dtype="int64")) for tag in (8, 7) for source in (1, 0) for _ in range(6)]
        comm.Waitall([comm.Irecv(array, source, tag) for source, tag, array in received])
        return [int(array[0]) for _, _, array in received]

    expected = [100 * source + number for _ in (8, 7) for source in (1, 0) for number in range(6)]
    assert run(3, main, seed)[2] == expected


@pytest.mark.parametrize("seed", SEEDS)
def test_waiting_for_any_returns_every_message_once(seed: int | None) -> None:
    def main(comm: Communicator) -> None:
        others = [rank for rank in range(comm.size) if rank != comm.rank]
        arrays = {rank: zeros(1, dtype="int64") for rank in others}
        pending = [(rank, comm.Irecv(arrays[rank], rank, 0)) for rank in others]
        sends = [comm.Isend(np.array([comm.rank], dtype=np.int64), rank, 0) for rank in others]
        while pending:
            rank, _ = pending.pop(comm.Waitany([request for _, request in pending]))
            assert arrays[rank][0] == rank
        comm.Waitall(sends)
        comm.finish()

    run(4, main, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_testing_until_a_message_is_there_ends(seed: int | None) -> None:
    def main(comm: Communicator) -> int:
        array = np.full(2, comm.rank, dtype=np.int64)
        request = comm.Isend(array, 1, 0) if comm.rank == 0 else comm.Irecv(array, 0, 0)
        while not comm.Test(request):
            pass
        assert comm.Test(request)
        comm.finish()
        return int(array[0])

    assert run(2, main, seed) == [0, 0]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_send_buffer_changed_before_the_wait_changes_what_arrives(seed: int | None) -> None:
    def main(comm: Communicator) -> float:
        array = np.ones(1, dtype=np.float32)
        if comm.rank == 0:
            request = comm.Isend(array, 1, 0)
            array[0] = 2.0
            comm.Wait(request)
        else:
            comm.Wait(comm.Irecv(array, 0, 0))
        return float(array[0])

    assert run(2, main, seed) == [2.0, 2.0]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_send_buffer_changed_after_the_wait_does_not(seed: int | None) -> None:
    def main(comm: Communicator) -> float:
        array = np.ones(1, dtype=np.float32)
        if comm.rank == 0:
            comm.Wait(comm.Isend(array, 1, 0))
            array[0] = 2.0
        else:
            comm.Wait(comm.Irecv(array, 0, 0))
        return float(array[0])

    assert run(2, main, seed) == [2.0, 1.0]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_send_is_not_complete_before_its_receive_is_posted(seed: int | None) -> None:
    def main(comm: Communicator) -> None:
        if comm.rank == 0:
            request = comm.Isend(zeros(4), 1, Purpose.TEXT)
            assert not any(comm.Test(request) for _ in range(20))
            comm.Waitall([comm.Isend(zeros(1), 1, Purpose.WEIGHTS), request])
        else:
            comm.Wait(comm.Irecv(zeros(1), 0, Purpose.WEIGHTS))
            comm.Wait(comm.Irecv(zeros(4), 0, Purpose.TEXT))
        comm.finish()

    run(2, main, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_receive_buffer_read_before_the_wait_is_still_the_old_one(seed: int | None) -> None:
    def main(comm: Communicator) -> list[float]:
        array = np.full(1, 1.0 + comm.rank, dtype=np.float32)
        request = comm.Isend(array, 1, 0) if comm.rank == 0 else comm.Irecv(array, 0, 0)
        early = float(array[0])
        comm.Wait(request)
        return [early, float(array[0])]

    assert run(2, main, seed)[1] == [2.0, 1.0]


@pytest.mark.parametrize("seed", SEEDS)
def test_ranks_that_all_send_before_they_receive_stop_and_say_who_waits_for_whom(seed: int | None) -> None:
    def main(comm: Communicator) -> None:
        comm.Wait(comm.Isend(zeros(4), (comm.rank + 1) % 3, Purpose.TEXT))
        comm.Wait(comm.Irecv(zeros(4), (comm.rank - 1) % 3, Purpose.TEXT))

    message = failure(3, main, seed)
    assert message.startswith("deadlock")
    for rank in range(3):
        assert f"send on rank {rank} to rank {(rank + 1) % 3}, tag TEXT, [4] float32, 16 bytes" in message


@pytest.mark.parametrize("seed", SEEDS)
def test_a_wait_for_a_rank_that_has_ended_stops(seed: int | None) -> None:
    def main(comm: Communicator) -> None:
        if comm.rank == 1:
            comm.Wait(comm.Irecv(zeros(4), 0, 9))

    message = failure(2, main, seed)
    assert message.startswith("deadlock")
    assert "receive on rank 1 from rank 0, tag 9, [4] float32, 16 bytes" in message


@pytest.mark.parametrize("seed", SEEDS)
def test_a_message_of_another_tag_is_not_taken(seed: int | None) -> None:
    def main(comm: Communicator) -> None:
        exchange(comm, zeros(4), zeros(4), tag=7 + comm.rank)

    message = failure(2, main, seed)
    assert "send on rank 0 to rank 1, tag 7" in message
    assert "receive on rank 1 from rank 0, tag 8" in message


def events(seed: int | None) -> list[tuple[int, int, int]]:
    """Who received what when, of four ranks that all speak to all, three times."""
    log: list[tuple[int, int, int]] = []

    def main(comm: Communicator) -> None:
        for turn in range(3):
            others = [rank for rank in range(4) if rank != comm.rank]
            pending = [comm.Irecv(zeros(1), rank, turn) for rank in others]
            sends = [comm.Isend(zeros(1), rank, turn) for rank in others]
            while pending:
                request = pending.pop(comm.Waitany(pending))
                log.append((turn, comm.rank, request.peer))
            comm.Waitall(sends)

    run(4, main, seed)
    return log


@pytest.mark.parametrize("seed", SEEDS)
def test_a_seed_repeats_the_order_of_events_exactly(seed: int | None) -> None:
    assert events(seed) == events(seed)


def test_every_seed_gives_another_order_of_the_same_events() -> None:
    orders = [events(seed) for seed in (None, *range(10))]
    assert len({tuple(order) for order in orders}) == len(orders)
    assert len({tuple(sorted(order)) for order in orders}) == 1


@pytest.mark.parametrize("seed", SEEDS)
def test_an_exception_in_one_rank_ends_all_and_is_raised_with_the_ranks_number(seed: int | None) -> None:
    reached: list[int] = []

    def main(comm: Communicator) -> None:
        if comm.rank == 2:
            raise ZeroDivisionError("one over nothing")
        comm.Wait(comm.Irecv(zeros(1), 2, 0))
        reached.append(comm.rank)

    threads = threading.active_count()
    with pytest.raises(ZeroDivisionError, match="one over nothing") as caught:
        run(4, main, seed)
    assert caught.value.__notes__ == ["on virtual rank 2 of 4"]
    assert reached == []
    assert threading.active_count() == threads


def test_one_rank_alone_runs_and_returns_its_result() -> None:
    assert run(1, lambda comm: (comm.rank, comm.size)) == [(0, 1)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_every_rank_gathers_every_ranks_array_in_order(size: int, seed: int | None) -> None:
    def main(comm: Communicator) -> list[int]:
        rows = all_gather(comm, np.array([comm.rank, comm.rank**2], dtype=np.int64))
        comm.finish()
        return np.concatenate(rows).tolist()

    assert run(size, main, seed) == [[number for rank in range(size) for number in (rank, rank**2)]] * size


def test_every_rank_gathers_every_ranks_text() -> None:
    texts = ["", "naïve", "x" * 3000]
    assert run(3, lambda comm: gather_texts(comm, texts[comm.rank])) == [["", "naïve", "x" * 2048]] * 3


@pytest.mark.parametrize("size", [1, 2, 5])
def test_every_rank_is_given_the_number_of_rank_zero(size: int) -> None:
    assert run(size, lambda comm: from_root(comm, 7 + comm.rank)) == [7] * size


@pytest.mark.parametrize("seed", SEEDS)
def test_where_all_agree_every_rank_has_its_own_result(seed: int | None) -> None:
    assert run(3, lambda comm: agreed(comm, lambda: 10 * comm.rank + 1), seed) == [1, 11, 21]


def refusals(size: int, failing: tuple[int, ...], seed: int | None = None) -> list[str]:
    """The error that each rank meets when the failing ones refuse the request."""
    def prepare(rank: int) -> int:
        if rank in failing:
            raise UserError("--text a is missing")
        return rank + 1

    def main(comm: Communicator) -> str:
        with pytest.raises(UserError) as caught:
            agreed(comm, lambda: prepare(comm.rank))
        comm.finish()
        return str(caught.value)

    return run(size, main, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_where_one_rank_refuses_every_rank_raises_its_error_and_names_it(seed: int | None) -> None:
    assert refusals(3, (1,), seed) == ["on rank 1: --text a is missing"] * 3
    assert refusals(3, (1, 2), seed) == ["on rank 1: --text a is missing"] * 3


@pytest.mark.parametrize("size", [1, 3])
def test_where_all_ranks_refuse_every_rank_raises_the_error_as_it_is(size: int) -> None:
    assert refusals(size, tuple(range(size))) == ["--text a is missing"] * size


def test_a_bug_in_a_rank_is_not_taken_for_a_refusal() -> None:
    def prepare(rank: int) -> int:
        return 1 // (1 - rank)

    with pytest.raises(ZeroDivisionError) as caught:
        run(3, lambda comm: agreed(comm, lambda: prepare(comm.rank)))
    assert caught.value.__notes__ == ["on virtual rank 1 of 3"]


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_the_others_are_all_other_ranks_beginning_with_the_next(size: int) -> None:
    for comm in VirtualWorld(size).communicators:
        assert sorted([*comm.others, comm.rank]) == list(range(size))
        assert comm.others[:1] == [(comm.rank + 1) % size][: size - 1]
