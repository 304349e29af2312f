"""The stand-in for CuPy refuses what CuPy refuses, or does only by waiting unasked, or does in no certain order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from strict import Array, Race, StrictCupy

from tsp_ref.backends.gpu import CupyBackend

HOST = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture
def backend() -> CupyBackend:
    return CupyBackend(StrictCupy(seed=1))


@pytest.mark.parametrize("use", [
    lambda x: np.asarray(x), lambda x: np.sum(x), lambda x: np.exp(x), lambda x: np.stack([x, x]),
    lambda x: memoryview(x), lambda x: bytes(x), lambda x: x.tobytes(), lambda x: x.tolist(), lambda x: x.get(),
    lambda x: float(x[0, 0]), lambda x: int(x[0, 0]), lambda x: bool(x[0, 0] > 1), lambda x: x[0, 0].item(),
    lambda x: [float(number) for row in x for number in row], lambda x: HOST.copy().__setitem__(..., x),
    lambda x: range(10)[x[0, 0]], lambda x: np.frombuffer(x),
])
def test_an_array_does_not_come_to_the_host_by_itself(backend: CupyBackend, use: Callable[[Any], Any]) -> None:
    with pytest.raises((TypeError, BufferError)):
        use(backend.from_host(HOST))


@pytest.mark.parametrize("use", [
    lambda x: x + HOST, lambda x: HOST + x, lambda x: x.__iadd__(HOST), lambda x: HOST.copy().__iadd__(x),
    lambda x: x @ HOST.T, lambda x: x[np.array([0])], lambda x: x.__setitem__(..., HOST), lambda x: x == HOST,
    lambda x: x * np.ones(1, dtype=np.float32), lambda x: x.__setitem__(0, HOST[0]),
])
def test_an_array_does_not_meet_the_host_s(backend: CupyBackend, use: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError):
        use(backend.from_host(HOST))


@pytest.mark.parametrize("call", [
    lambda xp, x: xp.multiply(x, HOST), lambda xp, x: xp.exp(x, out=HOST.copy()), lambda xp, x: xp.stack([x, HOST]),
    lambda xp, x: xp.maximum(HOST, x), lambda xp, x: xp.asnumpy(HOST), lambda xp, x: xp.asarray(HOST),
    lambda xp, x: xp.exp(x, where=x), lambda xp, x: xp.sum(x, initial=0.0), lambda xp, x: xp.multiply(x, x, x),
])
def test_functions_take_their_own_arrays_and_the_arguments_of_cupy(
    backend: CupyBackend, call: Callable[..., Any]
) -> None:
    with pytest.raises(TypeError):
        call(backend.xp, backend.from_host(HOST))


def test_a_function_that_cupy_is_not_known_to_have_does_not_exist(backend: CupyBackend) -> None:
    with pytest.raises(AttributeError, match="nanmedian"):
        backend.xp.nanmedian  # noqa: B018


def test_arrays_of_two_gpus_do_not_meet(backend: CupyBackend) -> None:
    other = CupyBackend(StrictCupy())
    with pytest.raises(TypeError):
        backend.from_host(HOST) + other.from_host(HOST)


def test_numbers_are_operands_as_in_cupy(backend: CupyBackend) -> None:
    """A number of Python's takes the array's dtype; one of NumPy's keeps its own."""
    x = backend.from_host(HOST)
    assert (2.0 * x).dtype == (x + 1).dtype == (3.0**x).dtype == np.float32
    assert (np.float64(2.0) * x).dtype == np.float64
    assert backend.to_host(1.0 - x / 2).tobytes() == (1.0 - HOST / 2).tobytes()


def test_new_memory_holds_rubbish(backend: CupyBackend) -> None:
    assert set(backend.to_host(backend.xp.empty(4, dtype="float32")).tobytes()) == {0xA5}


def test_views_are_views_and_know_whose(backend: CupyBackend) -> None:
    x = backend.from_host(HOST)
    view = x.reshape(-1)[2:]
    view += 1.0
    assert view.base is x and x.base is None
    assert backend.to_host(x).tolist() == [[0, 1, 3], [4, 5, 6]]


def copied_out(backend: CupyBackend, array: Any) -> tuple[Any, Any]:
    pinned = backend.pinned(array.nbytes)
    return pinned, backend.copy_out(array, pinned, backend.mark())


def test_a_copy_happens_late_and_when_it_is_seen_to_be_done(backend: CupyBackend) -> None:
    pinned, mark = copied_out(backend, backend.from_host(HOST))
    assert set(pinned.tolist()) == {0xA5}
    looks = 1
    while not mark.done:
        looks += 1
    assert pinned.tobytes() == HOST.tobytes()


def test_an_event_may_not_be_done_when_it_is_first_asked() -> None:
    looks = set()
    for seed in range(8):
        backend = CupyBackend(StrictCupy(seed))
        _, mark = copied_out(backend, backend.from_host(HOST))
        looks.add(next(count for count in range(9) if mark.done))
    assert looks == {0, 1, 2}


def test_a_copy_that_does_not_wait_for_what_computes_is_a_race(backend: CupyBackend) -> None:
    early = backend.mark()
    x = backend.from_host(HOST)
    with pytest.raises(Race, match="stream 1 reads what stream 0 writes"):
        backend.copy_out(x, backend.pinned(x.nbytes), early)


def test_a_sent_array_that_is_changed_before_its_copy_is_seen_is_a_race(backend: CupyBackend) -> None:
    x = backend.from_host(HOST)
    _, mark = copied_out(backend, x)
    x + 1.0  # may be read
    with pytest.raises(Race, match="stream 0 writes what stream 1 reads"):
        x += 1.0
    while not mark.done:
        pass
    x += 1.0


def test_places_in_a_list_are_read_as_a_copy_and_written_in_place(backend: CupyBackend) -> None:
    x = backend.from_host(HOST)
    rows = x[[1, 0]]
    assert rows.base is None and backend.to_host(rows).tolist() == HOST[[1, 0]].tolist()
    x[:, [2, 0]] = x[:, [0, 2]]
    assert backend.to_host(x).tolist() == HOST[:, ::-1].tolist()
    assert backend.to_host(x.max(axis=-1, keepdims=True)).tolist() == HOST.max(axis=-1, keepdims=True).tolist()
    _, mark = copied_out(backend, x)
    with pytest.raises(Race, match="stream 0 writes what stream 1 reads"):
        x[[0]] = 1.0
    while not mark.done:
        pass


def test_a_copy_over_what_may_still_be_read_is_a_race(backend: CupyBackend) -> None:
    x = backend.from_host(HOST)
    early = backend.mark()
    x + 1.0
    with pytest.raises(Race, match="stream 1 writes what stream 0 reads"):
        backend.copy_in(backend.pinned(x.nbytes), x, early)


def test_a_result_that_is_read_before_its_copy_is_seen_is_a_race(backend: CupyBackend) -> None:
    x = backend.from_host(np.zeros_like(HOST))
    pinned = backend.pinned(x.nbytes)
    pinned[...] = np.frombuffer(HOST.tobytes(), dtype=np.uint8)
    mark = backend.copy_in(pinned, x[:1], backend.mark())
    x[1:] + 1.0  # another part of the same memory
    with pytest.raises(Race, match="stream 0 reads what stream 1 writes"):
        x + 1.0
    while not mark.done:
        pass
    assert backend.to_host(x)[0].tolist() == HOST[0].tolist()


def test_mpi_is_not_handed_what_the_host_has_not_seen_the_end_of(backend: CupyBackend) -> None:
    x = backend.from_host(HOST) + 1.0
    for use in (lambda: x.__cuda_array_interface__, lambda: x.gpu.handed(x, "send")):
        with pytest.raises(Race, match="MPI is handed"):
            use()
    backend.synchronise()
    assert x.__cuda_array_interface__["data"][0] == x.gpu.handed(x, "send").ctypes.data
    x * 2.0
    with pytest.raises(Race, match="not yet given back, a send"):
        x *= 2.0
    x.gpu.given_back(x, "send")
    with pytest.raises(Race, match="MPI is handed to receive"):  # the product may still be read
        x.gpu.handed(x, "receive")
    backend.synchronise()
    x.gpu.handed(x, "receive")
    with pytest.raises(Race, match="not yet given back, a receive"):
        x * 2.0


def test_pinned_memory_that_is_let_go_under_a_copy_is_noticed(backend: CupyBackend) -> None:
    x = backend.from_host(HOST)
    copied_out(backend, x)
    assert x.gpu.faults == ["the host gives away pinned memory that what stream 1 writes, in no order"]


def test_asynchronous_copies_need_pinned_memory(backend: CupyBackend) -> None:
    x: Array = backend.from_host(HOST)  # type: ignore[assignment]
    with pytest.raises(TypeError, match="pinned"):
        backend.copy_out(x, np.empty(x.nbytes, dtype=np.uint8), backend.mark())  # type: ignore[arg-type]
