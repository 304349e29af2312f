"""What a rank holds: counted where arrays are made, and no more than its share between layers."""

import gc
import tracemalloc

import numpy as np
import pytest
from cases import case_config, cut, random_text, single_training

from tsp_ref.accounting.memory import KINDS, Memory
from tsp_ref.comm.virtual import VirtualWorld
from tsp_ref.commands.holdings import activation_bytes, gain_bytes, model_state_bytes
from tsp_ref.grid.grid import folded
from tsp_ref.grid.tree import Tree
from tsp_ref.model.model import Model
from tsp_ref.model.parameters import initial_parameters
from tsp_ref.schedules import tsp
from tsp_ref.schedules.collectives import AHEAD, ReduceToOwner, in_turn, own_last, turn, when_own_is_last
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


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize(("travel", "in_use"), [(tsp.ring, 1), (tsp.broadcasts, 3)])
def test_a_few_blocks_of_weights_at_most_are_held_beside_a_rank_s_own(travel, in_use, ranks):
    config = case_config("plain", "float32")

    def main(comm):
        model = Model(config, np, *folded(comm.rank, comm.size))
        shard = np.zeros((len(model.grid.blocks), 100), dtype=np.float32)
        blocks = [block for _, block, _ in travel(comm, model, shard, Tag.MLP_WEIGHTS)]
        assert sorted(blocks) == list(range(config.blocks))
        others = config.blocks - len(model.grid.blocks)
        return model.memory.peak["buffers"] == 400 * min(in_use + AHEAD + (ranks > 2), others)

    assert all(VirtualWorld(ranks, seed=1).run(main))


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize(("travel", "in_use"), [(tsp.ring, 1), (tsp.broadcasts, 3)])
def test_two_blocks_more_are_asked_for_before_the_work_on_the_one_at_hand(travel, in_use, ranks):
    config = case_config("plain", "float32")

    def main(comm):
        model = Model(config, np, *folded(comm.rank, comm.size))
        shard = np.zeros((len(model.grid.blocks), 5), dtype=np.float32)
        used, others = 0, config.blocks - len(model.grid.blocks)
        for owner, _, _ in travel(comm, model, shard, Tag.MLP_WEIGHTS):
            used += owner != comm.rank
            assert comm.ledger.sums("receive")[0] >= min(used + AHEAD, others)
        return used == others

    assert all(VirtualWorld(ranks, seed=2).run(main))


def test_what_a_ring_passes_on_has_the_bytes_of_its_owner():
    config = case_config("nine blocks, eleven tiles", "float32")

    def main(comm):
        model = Model(config, np, *folded(comm.rank, comm.size))
        own = [np.random.default_rng(block).standard_normal(7, dtype=np.float32) for block in model.grid.blocks]
        for travel in (tsp.ring, tsp.broadcasts):
            for _, block, held in travel(comm, model, np.stack(own), Tag.MLP_WEIGHTS):
                assert held.tobytes() == np.random.default_rng(block).standard_normal(7, dtype=np.float32).tobytes()
        comm.finish()
        return True

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
        spare = min(3 + AHEAD + (ranks > 2), config.blocks - config.blocks // ranks)
        return model.memory.peak["buffers"], spare * block + whole + 3 * whole * (ranks - 1) // ranks

    for peak, wanted in VirtualWorld(ranks, seed=1).run(main):
        assert peak == wanted


def test_gradients_on_their_way_home_are_those_of_a_few_blocks_at_a_time():
    config = case_config("plain", "float32", tiles=8)

    def main(comm):
        model = Model(config, np, *folded(comm.rank, comm.size))
        blocks = [range(rank, rank + 1) for rank in range(comm.size)]
        expected = when_own_is_last(blocks, comm.rank)
        home = ReduceToOwner(comm, model, (100,), Tag.MLP_GRADIENTS, expected)
        for owner, block in in_turn(blocks, comm.rank, own_last(comm.size)):
            partial = Tree(range(config.tiles))
            leaf = model.empty("working", 100)
            leaf[...] = 1.0
            partial.add(comm.rank, leaf)
            home.receive(turn(blocks, comm.rank, owner, block))
            home.send(owner, block, partial)
            del partial, leaf
        assert [float(total[0]) for total in home.finish()] == [8.0]
        return model.memory.peak["working"] // 400, model.memory.peak["buffers"] // 400

    for seed in range(10):
        for leaving, arriving in VirtualWorld(8, seed).run(main):
            # One more than AHEAD are made before the oldest is waited for; of the eight leaves of a rank's own block
            # log2(8) pieces wait.
            assert leaving <= AHEAD + 2 and arriving <= AHEAD + 1 + 3


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
