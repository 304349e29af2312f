"""Ranks in rows: who is on which axis, and that what is sent along one is nobody else's."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tsp_ref.accounting.ledger import Entry
from tsp_ref.comm.communicator import Communicator
from tsp_ref.comm.mesh import Axis, Mesh, make_mesh
from tsp_ref.comm.virtual import VirtualWorld
from tsp_ref.errors import MessageError

MESHES = [(1, 1), (1, 4), (4, 1), (2, 2), (2, 4), (4, 2), (3, 2)]
SEEDS = [None, 0, 1, 2]


def on_a_mesh(weights: int, tokens: int, main: Callable[[Mesh], Any], seed: int | None = None) -> list[Any]:
    """main(mesh) on every virtual rank, which must leave no message behind."""

    def live(comm: Communicator) -> Any:
        result = main(make_mesh(comm, weights, tokens))
        comm.finish()
        return result

    return VirtualWorld(weights * tokens, seed).run(live)


def swap(axis: Communicator, number: int, tag: int = 0) -> list[int]:
    """Every rank's number, in the order of the axis: each sends its own to all others."""
    rows = [np.array([number if place == axis.rank else -1], dtype=np.int64) for place in range(axis.size)]
    requests = [axis.Irecv(rows[place], place, tag) for place in axis.others]
    requests += [axis.Isend(rows[axis.rank], place, tag) for place in axis.others]
    axis.Waitall(requests)
    return [int(row[0]) for row in rows]


@pytest.mark.parametrize(("weights", "tokens"), MESHES)
def test_ranks_are_numbered_along_the_weights_first(weights: int, tokens: int) -> None:
    numbers = np.arange(weights * tokens).reshape(tokens, weights)
    for comm in VirtualWorld(weights * tokens).communicators:
        mesh = make_mesh(comm, weights, tokens)
        column, row = comm.rank // weights, comm.rank % weights
        assert list(mesh.weights.members) == numbers[column].tolist()
        assert list(mesh.tokens.members) == numbers[:, row].tolist()
        assert (mesh.weights.rank, mesh.weights.size) == (row, weights)
        assert (mesh.tokens.rank, mesh.tokens.size) == (column, tokens)


@pytest.mark.parametrize(("weights", "tokens"), MESHES)
def test_two_ranks_meet_on_one_axis_at_most_and_every_place_is_taken_once(weights: int, tokens: int) -> None:
    meshes = [make_mesh(comm, weights, tokens) for comm in VirtualWorld(weights * tokens).communicators]
    assert sorted((mesh.weights.rank, mesh.tokens.rank) for mesh in meshes) == list(
        itertools.product(range(weights), range(tokens)))
    for mesh in meshes:
        assert set(mesh.weights.members) & set(mesh.tokens.members) == {mesh.whole.rank}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("weights", "tokens"), MESHES)
def test_an_exchange_along_an_axis_reaches_its_ranks_in_order(weights: int, tokens: int, seed: int | None) -> None:
    def main(mesh: Mesh) -> None:
        assert swap(mesh.weights, mesh.whole.rank) == list(mesh.weights.members)
        assert swap(mesh.tokens, mesh.whole.rank) == list(mesh.tokens.members)

    on_a_mesh(weights, tokens, main, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_messages_of_two_axes_in_flight_at_once_do_not_mix(seed: int | None) -> None:
    """Of one tag, too: two ranks share one axis at most, so a pair of ranks tells the axis."""

    def main(mesh: Mesh) -> None:
        sent = {axis: np.array([1000 * number + mesh.whole.rank], dtype=np.int64)
                for number, axis in enumerate((mesh.weights, mesh.tokens), 1)}
        came = {(axis, place): np.zeros(1, dtype=np.int64) for axis in sent for place in axis.others}
        requests = [axis.Irecv(array, place, 7) for (axis, place), array in came.items()]
        requests += [axis.Isend(sent[axis], place, 7) for axis, place in came]
        mesh.whole.Waitall(requests)
        for (axis, place), array in came.items():
            assert array[0] == 1000 * (1 + (axis is mesh.tokens)) + axis.members[place]

    on_a_mesh(2, 4, main, seed)


def test_messages_are_counted_once_in_the_ledger_of_the_whole_under_the_whole_s_ranks() -> None:
    def main(mesh: Mesh) -> None:
        assert mesh.weights.ledger is mesh.tokens.ledger is mesh.whole.ledger
        mesh.phase = ("mlp", "forward")
        assert mesh.phase == mesh.whole.phase == mesh.weights.phase == mesh.tokens.phase == ("mlp", "forward")
        swap(mesh.weights, 1, tag=5)
        mesh.phase = ("loss", "forward")
        swap(mesh.tokens, 1, tag=6)
        sent = [Entry("send", (part, "forward"), tag, peer)
                for axis, part, tag in ((mesh.weights, "mlp", "5"), (mesh.tokens, "loss", "6"))
                for peer in axis.members if peer != mesh.whole.rank]
        entries = mesh.whole.ledger.entries
        assert {entry: sums for entry, sums in entries.items() if entry.verb == "send"} == dict.fromkeys(sent, (1, 8))

    on_a_mesh(2, 3, main)


@pytest.mark.parametrize("place", [-1, 2])
@pytest.mark.parametrize("verb", ["send", "receive"])
def test_a_place_that_is_not_on_the_axis_is_refused_and_not_counted(verb: str, place: int) -> None:
    """Although Python would take -1 for the last."""
    mesh = make_mesh(VirtualWorld(6).communicators[3], 2, 3)
    post = mesh.weights.Isend if verb == "send" else mesh.weights.Irecv
    with pytest.raises(MessageError, match=f"{verb} on rank 3: place {place} is not on the axis of the ranks 2, 3"):
        post(np.zeros(1), place, 0)
    assert mesh.whole.ledger.entries == {}


def test_a_message_to_one_s_own_place_is_refused_by_the_whole() -> None:
    mesh = make_mesh(VirtualWorld(6).communicators[3], 2, 3)
    with pytest.raises(MessageError, match=r"send on rank 3 to rank 3, tag 0, .*the peer must be another rank"):
        mesh.tokens.Isend(np.zeros(1), mesh.tokens.rank, 0)


def test_a_wrong_message_along_an_axis_is_named_by_the_whole_s_ranks() -> None:
    def main(mesh: Mesh) -> None:
        if mesh.whole.rank == 1:
            mesh.tokens.Wait(mesh.tokens.Isend(np.zeros(3), 1, 9))
        elif mesh.whole.rank == 3:
            mesh.tokens.Wait(mesh.tokens.Irecv(np.zeros(4), 0, 9))

    with pytest.raises(MessageError, match=r"receive on rank 3 from rank 1, tag 9, .*the message has 24 bytes"):
        on_a_mesh(2, 2, main)


@pytest.mark.parametrize("seed", SEEDS)
def test_waiting_and_testing_along_an_axis_are_the_whole_s(seed: int | None) -> None:
    def main(mesh: Mesh) -> list[int]:
        axis = mesh.tokens
        rows = {place: np.zeros(1, dtype=np.int64) for place in axis.others}
        pending = [(place, axis.Irecv(rows[place], place, 0)) for place in axis.others]
        mine = np.array([mesh.whole.rank], dtype=np.int64)
        sends = [axis.Isend(mine, place, 0) for place in axis.others]
        arrived = []
        while pending:
            place, request = pending.pop(axis.Waitany([request for _, request in pending]))
            assert axis.Test(request)
            arrived.append(int(rows[place][0]))
        while not all([axis.Test(send) for send in sends]):
            pass
        return sorted(arrived)

    for rank, arrived in enumerate(on_a_mesh(2, 3, main, seed)):
        assert arrived == [other for other in range(rank % 2, 6, 2) if other != rank]


@pytest.mark.parametrize("finisher", ["whole", "tokens"])
def test_a_message_left_in_flight_on_an_axis_is_noticed_by_the_whole_and_by_the_axis(finisher: str) -> None:
    mesh = make_mesh(VirtualWorld(4).communicators[0], 2, 2)
    mesh.tokens.Irecv(np.zeros(1), 1, 4)
    with pytest.raises(MessageError, match="never completed: receive on rank 0 from rank 2, tag 4"):
        getattr(mesh, finisher).finish()


@pytest.mark.parametrize(("weights", "tokens"), [(2, 2), (3, 2), (1, 4), (9, 1), (3, 3)])
def test_a_mesh_of_another_number_of_ranks_is_refused(weights: int, tokens: int) -> None:
    with pytest.raises(ValueError, match=f"a mesh of {weights} x {tokens} is not one of 8 ranks"):
        make_mesh(VirtualWorld(8).communicators[0], weights, tokens)


def test_ending_on_an_axis_ends_all() -> None:
    mesh = make_mesh(VirtualWorld(4).communicators[0], 2, 2)
    with pytest.raises(SystemExit) as ended:
        mesh.weights.abort(3)
    assert ended.value.code == 3


def test_an_axis_of_some_ranks_numbers_them_in_the_order_given() -> None:
    def main(comm: Communicator) -> list[int]:
        return swap(Axis(comm, [2, 0, 1]), comm.rank)

    assert VirtualWorld(3, seed=1).run(main) == [[2, 0, 1]] * 3
