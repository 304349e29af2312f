"""What a rank holds: counted where arrays are made, and no more than its share between layers."""

import gc
import sys
import tracemalloc
import weakref
from collections import deque

import numpy as np
import pytest
from cases import MODULES, case_config, cut, random_text, single_training

from tsp_ref.accounting.memory import KINDS, Memory
from tsp_ref.comm.virtual import VirtualWorld
from tsp_ref.commands.holdings import activation_bytes, gain_bytes, model_state_bytes
from tsp_ref.grid.grid import folded
from tsp_ref.grid.tree import Tree
from tsp_ref.model import tilewise
from tsp_ref.model.model import Model
from tsp_ref.model.parameters import initial_parameters
from tsp_ref.schedules import keys_values, tsp
from tsp_ref.schedules.all_gather import AllGather
from tsp_ref.schedules.all_reduce import AllReduceTiles
from tsp_ref.schedules.gradients import IN_FLIGHT, ReduceToOwner
from tsp_ref.schedules.keys_values import AHEAD, GatherKeysValues, ScatterKeysValues
from tsp_ref.schedules.order import broadcast_orders, owned_blocks, ring_orders
from tsp_ref.schedules.ring import PREFETCHED, Broadcast, Ring
from tsp_ref.schedules.tags import Tag
from tsp_ref.training.loop import Training
from tsp_ref.training.strategy import Plan


def test_an_array_counts_from_its_birth_to_its_death():
    memory = Memory()
    first = memory.track("weights", np.zeros(100, dtype=np.float32))
    second = memory.track("gradients", np.zeros(50, dtype=np.float32))
    del first
    third = memory.track("weights", np.zeros(10, dtype=np.float32))
    nothing = dict.fromkeys(KINDS, 0)
    assert memory.held == {**nothing, "weights": 40, "gradients": 200}
    assert memory.peak == {**nothing, "weights": 400, "gradients": 200}
    assert memory.model_state_peak == memory.total_peak == 600
    del second, third
    assert sum(memory.held.values()) == memory.total == 0


def test_no_function_of_python_s_runs_when_an_array_is_freed_where_a_ctrl_c_would_be_lost():
    memory, ran = Memory(), []
    array = memory.track("working", np.zeros(10))
    before = sys.getprofile()
    sys.setprofile(lambda frame, event, _: ran.append(frame.f_code.co_name) if event == "call" else None)
    try:
        del array
    finally:
        sys.setprofile(before)
    assert ran == [] and memory.total == 0


def test_a_freed_array_whose_place_a_new_one_takes_is_not_confused_with_it():
    memory = Memory()
    for size in range(1, 200):
        array = memory.track("working", np.zeros(size, dtype=np.uint8))
        assert memory.held["working"] == array.nbytes
        del array  # the next one may have its id
    assert memory.total == 0 and memory.total_peak == 199


def test_what_is_counted_is_the_memory_once_however_many_views_there_are():
    memory = Memory()
    whole = np.zeros((10, 10), dtype=np.float32)
    rows = [memory.track("activations", whole[row]) for row in range(10)]
    assert memory.total == 400
    del whole, rows[1:]
    assert memory.total == 400, "one row keeps all of it alive"
    rows.clear()
    assert memory.total == 0


def test_an_array_may_become_of_another_kind():
    memory = Memory()
    array = memory.track("working", np.zeros(10, dtype=np.float32))
    memory.track("activations", array)
    assert (memory.held["working"], memory.held["activations"], memory.total_peak) == (0, 40, 40)


def test_each_phase_has_its_own_peak_and_what_it_was_made_of():
    memory = Memory()
    state = memory.track("weights", np.zeros(25, dtype=np.float32))
    memory.phase = ("mlp", "forward")
    scratch = memory.track("working", np.zeros(50, dtype=np.float32))
    del scratch
    memory.phase = ("mlp", "backward")
    buffer = memory.track("buffers", np.zeros(10, dtype=np.float32))
    nothing = dict.fromkeys(KINDS, 0)
    assert memory.peaks["mlp", "forward"] == {**nothing, "weights": 100, "working": 200}
    assert memory.peaks["mlp", "backward"] == {**nothing, "weights": 100, "buffers": 40}
    assert memory.total_peak == 300
    del state, buffer


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="memory kind weight is unknown"):
        Memory().track("weight", np.zeros(1))


@pytest.mark.parametrize("case", ["plain", "grouped-query", "tied head"])
def test_eight_ranks_hold_an_eighth_of_the_single_process_each(case):
    config = case_config(case, "float32")
    alone = single_training(config, random_text())
    alone.step()
    assert alone.model.memory.model_state_peak == model_state_bytes(config)
    assert alone.model.memory.peak["activations"] == activation_bytes(config)

    def main(comm):
        training = Training(config, comm, Plan("tsp"), random_text(), np)
        training.step()
        return training.model.memory

    gains = gain_bytes(config)
    for memory in VirtualWorld(8).run(main):
        assert memory.model_state_peak - gains == (model_state_bytes(config) - gains) / 8
        assert memory.peak["activations"] == activation_bytes(config) / 8


def test_nothing_but_the_model_state_is_held_between_steps():
    def main(comm):
        training = Training(case_config("plain", "float32"), comm, Plan("tsp"), random_text(), np)
        training.step()
        return dict(training.model.memory.held)

    for held in VirtualWorld(4, seed=1).run(main):
        assert held["activations"] == held["buffers"] == 0


def round_the_ring(comm, model, shard, use):
    """Use every block as the MLP does: one at a time."""
    ring = Ring(comm, model, shard, Tag.MLP_WEIGHTS)
    ring.post()
    for step, (owner, block) in enumerate(ring.order):
        held = ring.wait(step)
        ring.post()
        use(owner, block, held)
    del held
    ring.finish()
    assert model.memory.held["buffers"] == 0, "a ring that is over, but still known to somebody, holds nothing"


def broadcast(comm, model, shard, use):
    """Use every block as attention does: each until two more are."""
    blocks, in_use = Broadcast(comm, model, shard, Tag.ATTENTION_WEIGHTS), deque(maxlen=AHEAD)
    blocks.post()
    for step, (owner, block) in enumerate(blocks.order):
        blocks.post(step + 1 + AHEAD)
        held = blocks.wait(step)
        use(owner, block, held)
        in_use.append(held)
    blocks.finish()


@pytest.mark.parametrize("case", ["plain", "nine blocks, eleven tiles"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_an_all_gather_holds_all_blocks_of_the_others_until_they_are_dropped_and_its_owner_s_are_no_copies(ranks, case):
    config = case_config(case, "float32")

    def main(comm):
        model = Model(config, np, *folded(comm.rank, comm.size))
        shard = np.zeros((len(model.grid.blocks), 100), dtype=np.float32)
        shard += np.array(model.grid.blocks, dtype=np.float32)[:, None]
        gather = AllGather(comm, model, shard, Tag.MLP_WEIGHTS)
        gather.post()
        gather.post()  # as a sub-layer does whose weights were prefetched
        blocks = gather.wait()
        assert [float(block[0]) for block in blocks] == list(range(config.blocks))
        assert all(np.shares_memory(blocks[block], shard) for block in model.grid.blocks)
        held = model.memory.held["buffers"]
        del blocks
        comm.finish()
        return held, 400 * (config.blocks - len(model.grid.blocks)), model.memory.held["buffers"]

    for held, wanted, left in VirtualWorld(ranks, seed=ranks).run(main):
        assert held == wanted and left == 0


def others_within(order, rank, steps):
    """The most blocks of other ranks among so many that follow one another."""
    return max(sum(owner != rank for owner, _ in order[first : first + steps]) for first in range(len(order)))


@pytest.mark.parametrize("case", ["plain", "nine blocks, eleven tiles"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("travel", [round_the_ring, broadcast])
def test_a_few_blocks_of_weights_at_most_are_held_beside_a_rank_s_own(travel, ranks, case):
    """Round a ring the one in use, the next, and the one before until it is sent on, which no block is between two
    ranks. Of a broadcast three in use and the next two, less those of these five that are the rank's own."""
    config = case_config(case, "float32")

    def main(comm):
        model = Model(config, np, *folded(comm.rank, comm.size))
        shard = np.zeros((len(model.grid.blocks), 100), dtype=np.float32)
        order = []
        travel(comm, model, shard, lambda owner, block, _: order.append((owner, block)))
        assert sorted(block for _, block in order) == list(range(config.blocks))
        if travel is broadcast:
            most = others_within(order, comm.rank, 3 + AHEAD)
        else:
            most = min(2 + (ranks > 2), config.blocks - len(model.grid.blocks))
        return model.memory.peak["buffers"], 400 * most

    for seed in range(3):
        for peak, wanted in VirtualWorld(ranks, seed).run(main):
            assert peak == wanted


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("travel", [round_the_ring, broadcast])
def test_the_next_blocks_are_asked_for_before_the_work_on_the_one_at_hand(travel, ranks):
    """Round a ring one more; in a broadcast two, and at its start three; and no more than that."""
    config = case_config("plain", "float32")

    def main(comm):
        model = Model(config, np, *folded(comm.rank, comm.size))
        shard = np.zeros((len(model.grid.blocks), 5), dtype=np.float32)
        order = broadcast_orders(owned_blocks(model.grid))[0]
        used = []

        def use(owner, block, _):
            used.append(owner)
            if travel is broadcast:
                asked_for = sum(owner != comm.rank for owner, _ in order[: max(PREFETCHED, len(used) + AHEAD)])
            else:
                asked_for = min(sum(owner != comm.rank for owner in used) + 1, config.blocks - len(model.grid.blocks))
            assert comm.ledger.sums("receive")[0] == asked_for

        travel(comm, model, shard, use)
        return len(used) == config.blocks

    assert all(VirtualWorld(ranks, seed=2).run(main))


def test_what_a_ring_passes_on_has_the_bytes_of_its_owner():
    config = case_config("nine blocks, eleven tiles", "float32")

    def drawn(block):
        return np.random.default_rng(block).standard_normal(7, dtype=np.float32)

    def main(comm):
        model = Model(config, np, *folded(comm.rank, comm.size))
        own, used = np.stack([drawn(block) for block in model.grid.blocks]), []

        def use(owner, block, held):
            assert held.tobytes() == drawn(block).tobytes()
            used.append(block)

        for travel in (round_the_ring, broadcast):
            travel(comm, model, own, use)
        comm.finish()
        return sorted(used) == sorted([*range(config.blocks)] * 2)

    for ranks in range(1, 10):
        assert all(VirtualWorld(ranks, seed=ranks).run(main))


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_attention_s_buffers_are_a_few_blocks_and_the_keys_and_values_of_one_block_and_the_next_two(ranks):
    config = case_config("plain", "float32")

    def main(comm):
        model = Model(config, np, *folded(comm.rank, comm.size))
        weights = initial_parameters(model)
        x = cut(model, np.ones((config.batch_size, config.seq_len, config.hidden_size), dtype=np.float32))
        tsp.attention_forward(comm, model, x, weights, 0)
        block = weights.attention[0][0].nbytes
        whole = 2 * config.batch_size * config.seq_len * config.hidden_size * 4 // config.blocks
        order = broadcast_orders(owned_blocks(model.grid))[0]
        # One rank receives nothing, and what it puts in the order of the text is working set.
        wanted = others_within(order, comm.rank, 3 + AHEAD) * block + whole + 3 * whole * (ranks - 1) // ranks
        return model.memory.peak["buffers"], wanted if ranks > 1 else 0

    for peak, wanted in VirtualWorld(ranks, seed=1).run(main):
        assert peak == wanted


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_backward_s_keys_and_values_are_those_of_one_block_and_of_the_next_two_as_they_arrive(ranks):
    config = case_config("plain", "float32", seq_len=32)

    def main(comm):
        model = Model(config, np, *folded(comm.rank, comm.size))
        shape = (len(model.grid.slots), 2, config.batch_size, 1, config.tile_len, config.head_dim)
        kept = {block: np.zeros(shape, dtype=np.float32) for block in range(config.blocks)}
        gather = GatherKeysValues(comm, model, kept, list(kept))
        gather.post()
        for step in range(config.blocks):
            whole = gather.wait()
            gather.post(step + 1 + AHEAD)
            nbytes = whole.nbytes
            del whole
        return model.memory.peak["buffers"], nbytes + 2 * nbytes * (ranks - 1) // ranks

    for peak, wanted in VirtualWorld(ranks, seed=1).run(main):
        assert peak == wanted


def test_gradients_of_keys_and_values_in_flight_are_one_message_from_and_one_to_each_other_rank():
    config = case_config("plain", "float32", tiles=8)

    def main(comm):
        model = Model(config, np, *folded(comm.rank, comm.size))
        partials, (slot,) = tilewise.keys_values_tree(model), model.grid.slots
        shape = 2, config.batch_size, config.kv_heads_per_block
        gradient = model.empty("working", *shape, model.grid.visible(slot), config.head_dim)
        gradient[...] = 1.0
        partials.add(slot, gradient)
        scatter = ScatterKeysValues(comm, model)
        scatter.post(0, partials)
        del partials, gradient
        assert model.memory.held["working"] == 0, "of the keys of all others nothing is kept but the messages"
        tile = 4 * int(np.prod(shape)) * config.tile_len * config.head_dim
        seen = model.grid.tile(slot)  # by this rank's queries, of other ranks' tiles; its own are seen by the others
        seeing = len(model.grid.readers(slot)) - 1
        assert model.memory.held["buffers"] == tile * (seen + seeing) == tile * 7
        total = scatter.wait()
        return np.all(total == seeing + 1), total.shape == (1, *shape, config.tile_len, config.head_dim)

    assert all(map(all, VirtualWorld(8, seed=1).run(main)))


def test_gradients_in_flight_to_their_owners_are_those_of_a_few_blocks_at_a_time():
    config = case_config("plain", "float32", tiles=8)

    def main(comm):
        model = Model(config, np, *folded(comm.rank, comm.size))
        orders = ring_orders(owned_blocks(model.grid))
        out = np.zeros((1, 100), dtype=np.float32)
        reduce = ReduceToOwner(comm, model, out, orders, Tag.MLP_GRADIENTS)
        for step in range(config.blocks):
            partial = Tree(range(config.tiles))
            leaf = model.empty("working", 100)
            leaf[...] = 1.0
            partial.add(comm.rank, leaf)
            reduce.wait(step)
            reduce.receive(step)
            reduce.send(step, partial)
            del partial, leaf
            assert len(reduce.sends) <= IN_FLIGHT and len(reduce.arriving) <= IN_FLIGHT
        reduce.finish()
        assert out.tolist() == [[8.0] * 100]
        return model.memory.peak["working"] // 400, model.memory.peak["buffers"] // 400

    for seed in range(10):
        for leaving, arriving in VirtualWorld(8, seed).run(main):
            # Beside what is sent, one is made before the oldest is waited for, and the rank's own leaf of its own block
            # is kept; of the others' seven leaves of that block log2(8) pieces wait for one another.
            assert leaving <= IN_FLIGHT + 2 and arriving <= IN_FLIGHT + 3


def test_what_is_counted_is_what_the_process_holds_between_steps():
    config = case_config("grouped-query", "float32", hidden_size=256, ffn_size=512)
    text = random_text()
    single_training(config, text).step()  # whatever is made once is made now
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    training = single_training(config, text)
    training.step()
    gc.collect()
    held = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    counted = sum(training.model.memory.held.values())
    assert counted == model_state_bytes(config)
    assert counted <= held < 1.02 * counted


def one_step_of(schedule, ranks, **changes):
    """A training step of the plain case under a schedule."""
    config = case_config("plain", "float32", **changes)
    VirtualWorld(ranks).run(lambda comm: Training(config, comm, Plan(schedule), random_text(), np).step())


@pytest.mark.parametrize("schedule", [name for name in MODULES if name != "tp"])
def test_when_a_block_s_keys_and_values_are_put_together_the_gradients_of_those_before_are_sent_and_gone(
    schedule, monkeypatch
):
    honest_tree, honest_order, trees = tilewise.keys_values_tree, keys_values.in_order_of_text, []

    def tree(model):
        trees.append(weakref.ref(made := honest_tree(model)))
        return made

    def in_order(model, tiles_of):
        assert [each() for each in trees] == [None] * len(trees)
        return honest_order(model, tiles_of)

    monkeypatch.setattr(tilewise, "keys_values_tree", tree)
    monkeypatch.setattr(keys_values, "in_order_of_text", in_order)
    one_step_of(schedule, 2)
    assert len(trees) >= 8


@pytest.mark.parametrize("schedule", ["tp", "tp+sp"])
def test_a_stack_s_sums_are_no_longer_kept_when_they_are_exchanged(schedule, monkeypatch):
    honest, seen = AllReduceTiles.totals, []

    def totals(self):
        seen.append(len(self.trees))
        return honest(self)

    monkeypatch.setattr(AllReduceTiles, "totals", totals)
    one_step_of(schedule, 4)
    assert set(seen) == {0}


@pytest.mark.parametrize("schedule", MODULES)
def test_what_the_head_has_saved_is_gone_when_its_backward_is_over(schedule, monkeypatch):
    module, saved = MODULES[schedule], []
    honest_head, honest_mlp = module.head_backward, module.mlp_backward

    def head(ranks, model, kept, *rest):
        saved.append(weakref.ref(kept))
        return honest_head(ranks, model, kept, *rest)

    def mlp(*given):
        assert saved.pop()() is None
        return honest_mlp(*given)

    monkeypatch.setattr(module, "head_backward", head)
    monkeypatch.setattr(module, "mlp_backward", mlp)
    one_step_of(schedule, 1, num_layers=1)
    assert saved == []
