"""NumPy under watch: the same bits, every array counted from its birth to its death, every product as it is done."""

import gc
import tracemalloc

import numpy as np
import pytest
from cases import case_config, plans, random_text, single_digest, virtual_digest

from tsp_ref.accounting.counted import Counted, CountedNumpy
from tsp_ref.accounting.memory import Memory
from tsp_ref.accounting.work import Work
from tsp_ref.comm.virtual import VirtualWorld
from tsp_ref.training.loop import Training
from tsp_ref.training.strategy import Plan


def watched():
    """A namespace with empty accounts."""
    return CountedNumpy(Memory(), Work())


@pytest.mark.parametrize("schedule, ranks", [
    ("single", 1), ("tp", 2), ("sp", 3), ("tp+sp", 4), ("fsdp+sp", 3), ("tsp", 3)])
def test_counting_changes_no_bit(schedule, ranks):
    config = case_config("nine blocks, eleven tiles", "float32")
    for plan in plans(schedule, ranks, counted=True, recompute="attention")[:2]:
        assert virtual_digest(config, plan, ranks, seed=1) == single_digest(config)


MADE = {
    "zeros": lambda xp, a: xp.zeros((3, 5)),
    "empty": lambda xp, a: xp.empty((3, 5), dtype=np.float32),
    "empty_like": lambda xp, a: xp.empty_like(a),
    "full": lambda xp, a: xp.full((3, 5), 1.0),
    "arange": lambda xp, a: xp.arange(0, 3, 2, dtype="float32"),
    "stack": lambda xp, a: xp.stack([a, a]),
    "where": lambda xp, a: xp.where(a > 1, a, 0.0),
    "clip": lambda xp, a: xp.clip(a, 0, 1),
    "triu": lambda xp, a: xp.triu(a),
    "copy": lambda xp, a: a.copy(),
    "a copy in order": lambda xp, a: xp.ascontiguousarray(a.T),
    "a reshape that must copy": lambda xp, a: a.T.reshape(-1),
    "a conversion": lambda xp, a: a.astype("float32"),
    "rows looked up": lambda xp, a: a[np.array([[0, 2], [1, 1]])],
    "rows by a list": lambda xp, a: a[[2, 0]],
    "entries by a mask": lambda xp, a: a[np.eye(4, 6, dtype=bool)],
    "a sum of two": lambda xp, a: a + a,
    "with a plain array on the left": lambda xp, a: np.ones((4, 6)) - a,
    "with a number on the left": lambda xp, a: 2.0 / a,
    "a function": lambda xp, a: xp.exp(a),
    "a comparison": lambda xp, a: a >= 1,
    "a negation": lambda xp, a: -a,
    "the sum along an axis": lambda xp, a: xp.sum(a, axis=-1, keepdims=True),
    "a sum that keeps its axes": lambda xp, a: xp.sum(a, keepdims=True),
    "the mean": lambda xp, a: xp.mean(a, axis=0),
    "the largest": lambda xp, a: xp.max(a, axis=-1),
    "a product": lambda xp, a: a @ a.T,
    "a batch of products": lambda xp, a: xp.matmul(a[None], a.T[None]),
    "a product with a plain array on the left": lambda xp, a: np.ones((2, 4)) @ a,
}
VIEWS = {
    "a slice": lambda xp, a: a[1:, ::2],
    "a row": lambda xp, a: a[0],
    "a new axis": lambda xp, a: a[None, ..., None],
    "a reshape": lambda xp, a: a.reshape(2, 12),
    "the transpose": lambda xp, a: a.T,
    "swapped axes": lambda xp, a: a.swapaxes(0, 1),
    "a view of a view": lambda xp, a: a[1:].T[2:],
    "the array itself": lambda xp, a: xp.asarray(a),
    "in order already": lambda xp, a: xp.ascontiguousarray(a),
    "an array added to": lambda xp, a: a.__iadd__(1.0),
    "an array divided by its own view": lambda xp, a: a.__itruediv__(a[:1]),
    "what is written into it": lambda xp, a: xp.exp(a, out=a),
    "a product written into it": lambda xp, a: xp.matmul(np.ones((4, 4)), np.ones((4, 6)), out=a),
}


@pytest.mark.parametrize("make", MADE)
def test_what_an_operation_makes_is_counted_once_and_released(make):
    xp = watched()
    array = xp.ones((4, 6))
    before = xp.memory.total
    made = MADE[make](xp, array)
    assert isinstance(made, Counted)
    assert xp.memory.total - before == made.nbytes > 0
    view = made[..., :1].T
    del made
    assert xp.memory.total > before, "a view keeps the memory that it lies in"
    del view
    assert xp.memory.total == before
    assert xp.memory.held == {**dict.fromkeys(xp.memory.held, 0), "working": array.nbytes}


@pytest.mark.parametrize("make", VIEWS)
def test_a_view_and_what_is_done_in_place_take_no_memory(make):
    xp = watched()
    array = xp.ones((4, 6))
    before, peak = xp.memory.total, xp.memory.total_peak
    made = VIEWS[make](xp, array)
    assert isinstance(made, Counted) and np.shares_memory(made, array)
    assert xp.memory.total == before and xp.memory.total_peak == peak
    del made
    assert xp.memory.total == before
    del array
    assert xp.memory.total == 0


def test_an_array_lives_as_long_as_a_view_of_it():
    xp = watched()
    view = xp.zeros((10, 10))[:1]
    assert xp.memory.total == 800
    del view
    assert xp.memory.total == 0


def test_temporaries_count_at_the_peak_and_not_after():
    xp = watched()
    a = xp.ones(100)
    b = (a + 1.0) * (a + 2.0)
    assert xp.memory.total == a.nbytes + b.nbytes == 1600
    assert xp.memory.total_peak == 3200, "both sums and their product, beside a"


def test_an_array_that_is_tracked_as_another_kind_is_counted_as_that_and_no_longer_as_working_set():
    xp = watched()
    kept = xp.memory.track("activations", (xp.ones((4, 6)) + 1.0)[1:])
    assert xp.memory.held["activations"] == 192, "all of the memory that it lies in"
    assert xp.memory.held["working"] == 0
    view, later = kept[:1], kept * 2.0
    assert xp.memory.held["activations"] == 192, "a view of it later does not change that"
    assert xp.memory.held["working"] == later.nbytes == 144 and view.base is not None


def test_an_array_that_is_changed_in_place_is_still_the_same_array():
    xp = watched()
    array = same = xp.ones(3)
    array += 1.0
    array *= array
    assert array is same and array.tolist() == [4.0, 4.0, 4.0]
    assert xp.sqrt(array, out=array) is same


def test_numbers_are_numbers_and_types_are_types():
    xp = watched()
    array = xp.ones((4, 6))
    before = xp.memory.total
    assert not isinstance(xp.sum(array), np.ndarray) and xp.sum(array) == 24
    assert not isinstance(array[0, 0], np.ndarray)
    assert xp.inf == np.inf and xp.float32 is np.float32 and xp.ndarray is np.ndarray
    assert xp.memory.total == before


@pytest.mark.parametrize("left, right, flops", [
    ((2, 3), (3, 5), 2 * 2 * 3 * 5),
    ((1, 7), (7, 1), 2 * 7),
    ((4, 2, 3), (4, 3, 5), 4 * 2 * 2 * 3 * 5),
    ((6, 4, 2, 3), (6, 4, 3, 5), 24 * 2 * 2 * 3 * 5),
])
def test_a_product_costs_twice_its_three_sizes_for_each_of_a_batch(left, right, flops):
    for multiply in (
        lambda xp, a, b: a @ b, lambda xp, a, b: xp.matmul(a, b), lambda xp, a, b: a.view(np.ndarray) @ b,
        lambda xp, a, b: a @ b.view(np.ndarray),
        lambda xp, a, b: xp.matmul(a, b, out=xp.empty((*left[:-1], right[-1]))),
        lambda xp, a, b: xp.matmul(a.view(np.ndarray), b.view(np.ndarray), out=xp.empty((*left[:-1], right[-1]))),
    ):
        xp = watched()
        xp.work.phase = ("mlp", "forward")
        multiply(xp, xp.ones(left), xp.ones(right))
        assert xp.work.flops == {("mlp", "forward"): flops}


def test_what_is_no_product_of_matrices_is_no_work():
    xp = watched()
    a = xp.ones((4, 4))
    xp.exp(a * a + xp.sum(a, axis=0))
    assert xp.work.flops == {} and xp.work.total == 0


def test_products_add_up_by_phase():
    xp = watched()
    a = xp.ones((4, 4))
    for part, times in (("mlp", 2), ("head", 1), ("mlp", 3)):
        xp.work.phase = (part, "forward")
        for _ in range(times):
            a = a @ a
    assert xp.work.flops == {("mlp", "forward"): 5 * 128, ("head", "forward"): 128}
    assert xp.work.total == 6 * 128


def test_n_ranks_multiply_as_much_as_one_process_does():
    """No schedule computes anything twice, but what it says: all but the norms and residuals, which are no products."""
    config = case_config("nine blocks, eleven tiles", "float32")

    def flops(plan, ranks):
        def main(comm):
            training = Training(config, comm, plan, random_text(), np)
            training.step()
            return training.model.work.total

        return sum(VirtualWorld(ranks).run(main))

    alone = flops(Plan("single", counted=True), 1)
    for schedule, ranks in (("tp", 3), ("sp", 3), ("tp+sp", 4), ("fsdp+sp", 3), ("tsp", 3)):
        assert flops(Plan(schedule, counted=True), ranks) == alone > 0


def test_what_is_counted_is_what_the_process_holds_at_its_peak():
    """Python's own count of NumPy's memory, of a step of a model whose arrays are large."""
    config = case_config("grouped-query", "float32", num_layers=1, hidden_size=256, ffn_size=512, seq_len=128, tiles=2,
                         blocks=2)
    comm = VirtualWorld(1).communicators[0]
    training = Training(config, comm, Plan("single", counted=True), random_text(), np)
    training.step()
    memory = training.model.memory
    gc.collect()
    tracemalloc.start()
    held = memory.total
    memory.total_peak = 0
    training.step()
    found = tracemalloc.get_traced_memory()[1] + held
    tracemalloc.stop()
    assert memory.total_peak <= found < 1.02 * memory.total_peak
