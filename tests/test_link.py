"""A link that one can slow down, and who helps messages on: when a message counts as complete, and nothing else."""

import time

import numpy as np
import pytest

from tsp_ref.comm.link import Link, bandwidth_for, describe_link, parse_link
from tsp_ref.comm.rehearsal import LocalCopies
from tsp_ref.comm.virtual import VirtualWorld
from tsp_ref.errors import UserError


@pytest.mark.parametrize(("text", "bandwidth", "latency"), [
    ("200MB/s,50us", 200e6, 50e-6), ("1Gbit/s", 125e6, 0.0), ("1.5GB/s, 2ms", 1.5e9, 2e-3), ("800kbit/s,1s", 1e5, 1.0),
    ("7B/s", 7.0, 0.0)])
def test_a_link_is_described_by_bandwidth_and_latency(text, bandwidth, latency):
    link = parse_link(text)
    assert (link.bandwidth, link.latency) == pytest.approx((bandwidth, latency))


@pytest.mark.parametrize("text", ["fast", "0MB/s", "1MB/s,5", "-1MB/s", "..GB/s", "1MB", "1MB/s,5us,6us", ""])
def test_what_is_no_link_is_refused_with_an_example(text):
    with pytest.raises(UserError, match=r"--link .*is not a link: give a bandwidth and a latency, as 200MB/s,50us"):
        parse_link(text)


@pytest.mark.parametrize(("bandwidth", "text"), [
    (88.4e6, "88MB/s,50us"), (1.26e9, "1.3GB/s,50us"), (996e6, "1GB/s,50us"), (0.2, "1B/s,50us"),
    (3.1e12, "3100GB/s,50us")])
def test_a_link_s_description_in_two_digits_is_read_as_that_link(bandwidth, text):
    assert describe_link(bandwidth, 50e-6) == text
    assert parse_link(text).latency == pytest.approx(50e-6)
    assert parse_link(text).bandwidth == pytest.approx(max(bandwidth, 1.0), rel=0.05)


@pytest.mark.parametrize(("rest", "bandwidth"), [(0.0, 200.0), (0.1, 250.0), (0.3, 500.0)])
def test_the_right_bandwidth_leaves_room_for_what_messages_take_besides(rest, bandwidth):
    assert bandwidth_for(100, wanted=0.5) == 200.0, "nothing tried yet: nothing besides"
    assert bandwidth_for(100, 0.5, tried=50.0, taken=2.0 + rest) == pytest.approx(bandwidth)
    assert rest + 100 / bandwidth == pytest.approx(0.5)


def test_a_bandwidth_is_found_even_where_what_messages_take_besides_is_too_long():
    assert bandwidth_for(100, 0.5, tried=200.0, taken=10.0) == pytest.approx(2000.0)


def test_messages_of_one_direction_go_one_after_the_other():
    link = Link(bandwidth=1000.0, latency=0.5)
    assert link.through("receive", 1, 2000, now=10.0) == 12.5
    assert link.through("receive", 1, 1000, now=10.0) == 13.5, "the latencies of two messages overlap"
    assert link.through("receive", 1, 1000, now=20.0) == 21.5, "an idle link begins at once"
    assert link.through("send", 1, 1000, now=10.0) == 11.0, "a send is over when its last byte has left"


def test_each_peer_has_a_link_of_its_own_unless_it_is_shared():
    alone, shared = Link(1000.0), Link(1000.0, shared=True)
    assert [alone.through("receive", peer, 1000, 0.0) for peer in (1, 2)] == [1.0, 1.0]
    assert [shared.through("receive", peer, 1000, 0.0) for peer in (1, 2)] == [1.0, 2.0]
    assert shared.through("send", 1, 1000, 0.0) == 1.0, "the other direction is another link"


def ping(comm, progress, computing):
    """Rank 0 sends 20,000 bytes over a link of a megabyte a second while rank 1 is busy: seconds until they are here,
    and that it then still waited."""
    comm.travel_by(progress, Link(1e6))
    begin = time.perf_counter()
    if comm.rank == 0:
        comm.Wait(comm.Isend(np.zeros(20000, dtype=np.uint8), 1, 5))
        return 0.0, 0.0
    request = comm.Irecv(np.zeros(20000, dtype=np.uint8), 0, 5)
    while time.perf_counter() < begin + computing:
        comm.progress(0, 0)
    waited = time.perf_counter()
    comm.Wait(request)
    return time.perf_counter() - begin, time.perf_counter() - waited


def test_a_message_is_not_complete_before_it_is_through_the_link():
    seconds, _ = VirtualWorld(2).run(lambda comm: ping(comm, "wait", 0.0))[1]
    assert seconds >= 0.020


def test_a_message_that_nobody_helps_on_sets_off_when_it_is_waited_for():
    _, waited = VirtualWorld(2).run(lambda comm: ping(comm, "wait", 0.05))[1]
    assert waited >= 0.020


def test_a_message_that_is_helped_on_travels_under_the_computation():
    _, waited = VirtualWorld(2).run(lambda comm: ping(comm, "poll", 0.05))[1]
    assert waited < 0.020


def test_a_wait_for_one_message_moves_all_others_on():
    """As inside MPI: else messages without computation would travel one by one, and seem to take longer."""
    comm = LocalCopies(0, 2)
    comm.travel_by("wait", Link(1e4))
    first, second = (comm.Irecv(np.zeros(1000, dtype=np.uint8), 1, tag) for tag in (5, 6))
    comm.Wait(first)
    assert second.arrived and not second.done


def test_an_unknown_way_of_progress_is_refused_and_a_thread_on_virtual_ranks():
    comm = VirtualWorld(1).communicators[0]
    with pytest.raises(UserError, match="--progress magic is unknown: use one of wait, poll, thread"):
        comm.travel_by("magic", None)
    with pytest.raises(UserError, match="--progress thread is for real ranks: use mpirun, or --progress poll"):
        comm.travel_by("thread", None)
