"""Messages share a link, one after the other: what is needed sooner is posted sooner, and what is needed late is waited
for late. Read from the script of a step: what a rank posted, and waited for, in order."""

from collections import Counter

import numpy as np
import pytest
from cases import case_config, random_text

from tsp_ref.comm.virtual import VirtualWorld
from tsp_ref.schedules.tags import Tag
from tsp_ref.training.loop import Training
from tsp_ref.training.strategy import FOLDED, Plan

CONFIG = case_config("plain", "float32", num_layers=2)


def scripts(schedule, ranks, backward, recompute="none"):
    """What each rank did in a forward, or in the backward after it."""
    def rank(comm):
        training = Training(CONFIG, comm, Plan(schedule, recompute=recompute), random_text(), np)
        comm.script = forward = []
        _, saved = training.forward()
        comm.script = after = []
        training.strategy.backward(saved, training.weights, training.gradients)
        comm.script = None
        return after if backward else forward

    return VirtualWorld(ranks, seed=ranks).run(rank)


def places(script, what, tag, verb=None):
    """Where in a script messages of a tag, and of a verb if one is named, were posted, or first waited for."""
    found, of = [], {}  # of: what a request's number stands for, from its post until it is waited for
    for place, event in enumerate(script):
        if event.what == "post":
            of[event.request] = event.verb, event.tag
        about = of.get(event.request) if event.what == "post" else of.pop(event.request, None)
        if event.what == what and about is not None and about[1] == tag and verb in (None, about[0]):
            found.append(place)
    return found


def ends_of_exchanges(script, tag, count):
    """Where in a script the last message of a tag is waited for, each of the `count` times that they are exchanged: as
    many messages are posted each time."""
    ended, open_ = {}, {}  # where it was posted -> where it was first waited for; request -> where it was posted
    for place, event in enumerate(script):
        if event.what == "post" and event.tag == tag:
            open_[event.request] = place
        elif event.what == "post":
            open_.pop(event.request, None)  # another request of the same number
        elif event.what == "wait" and event.request in open_:
            ended[open_.pop(event.request)] = place
    assert len(ended) % count == 0
    waits, each = [ended[place] for place in sorted(ended)], len(ended) // count
    return [max(waits[first : first + each]) for first in range(0, len(waits), each)]


def sublayer_at(script, place):
    """The sub-layer that a rank is in at a place of its script."""
    return next(event.phase[0] for event in reversed(script[:place]) if event.what == "enter")


def posted_in(script, tag, count):
    """In which sub-layers the first message of a tag is posted, each of the `count` times that they are exchanged."""
    found = places(script, "post", tag)
    assert len(found) % count == 0
    return [sublayer_at(script, place) for place in found[:: len(found) // count]]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_sub_layer_s_first_messages_are_posted_under_the_one_before_it(ranks):
    for script in scripts("tsp", ranks, backward=False):
        assert posted_in(script, Tag.ATTENTION_WEIGHTS, 2) == ["embedding", "mlp"]
        assert posted_in(script, Tag.MLP_WEIGHTS, 2) == ["attention", "attention"]
        assert posted_in(script, Tag.HEAD_WEIGHTS, 1) == ["mlp"]
    for script in scripts("tsp", ranks, backward=True):
        assert posted_in(script, Tag.MLP_WEIGHTS, 2) == ["head", "attention"]
        assert posted_in(script, Tag.KEYS_VALUES, 2) == posted_in(script, Tag.ATTENTION_WEIGHTS, 2) == ["mlp", "mlp"]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_so_are_all_weights_that_fsdp_gathers(ranks):
    for script in scripts("fsdp+sp", ranks, backward=False):
        assert posted_in(script, Tag.ATTENTION_WEIGHTS, 2) == ["embedding", "mlp"]
        assert posted_in(script, Tag.MLP_WEIGHTS, 2) == ["attention", "attention"]
        assert posted_in(script, Tag.HEAD_WEIGHTS, 1) == ["mlp"]
    for script in scripts("fsdp+sp", ranks, backward=True):
        assert posted_in(script, Tag.MLP_WEIGHTS, 2) == ["head", "attention"]
        assert posted_in(script, Tag.KEYS_VALUES, 2) == posted_in(script, Tag.ATTENTION_WEIGHTS, 2) == ["mlp", "mlp"]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_so_are_those_of_what_is_recomputed(ranks):
    for script in scripts("tsp", ranks, backward=True, recompute="attention"):
        # Attention's weights come twice: for what is recomputed, before the MLP's backward, and for the backward.
        assert posted_in(script, Tag.ATTENTION_WEIGHTS, 4) == ["head", "mlp", "attention", "mlp"]
        assert posted_in(script, Tag.MLP_WEIGHTS, 2) == ["attention", "attention"]
    for script in scripts("tsp", ranks, backward=True, recompute="full"):
        assert posted_in(script, Tag.ATTENTION_WEIGHTS, 4) == ["head", "mlp", "attention", "mlp"]
        assert posted_in(script, Tag.MLP_WEIGHTS, 4) == ["attention", "mlp"] * 2


@pytest.mark.parametrize("schedule, mesh, ranks", [
    ("tp", None, 2), ("sp", None, 2), ("tp+sp", "2x2", 4), ("fsdp+sp", None, 2), ("tsp", None, 2)])
def test_messages_are_given_a_chance_before_the_work_on_every_stack_of_tiles(schedule, mesh, ranks):
    """Attention projects and attends with each stack and block, under TP with several blocks at a time; all else works
    with them once."""
    def rank(comm):
        training = Training(CONFIG, comm, Plan(schedule, mesh, stack=3), random_text(), np)
        comm.script = script = []
        training.step()
        comm.script = None
        return training.model, script

    for model, script in VirtualWorld(ranks, seed=1).run(rank):
        found = Counter((*event.phase, event.block, event.slot, event.tiles)
                        for event in script if event.what == "compute")
        blocks = range(CONFIG.blocks) if schedule in FOLDED else model.grid.blocks
        groups = [group.start for group in model.head_groups] if schedule == "tp" else blocks
        wanted = Counter((sublayer, direction, block, *stack.place)
                         for direction in ("forward", "backward") for stack in model.stacks
                         for sublayer, times in {"embedding": 1, "mlp": 2, "attention": 2, "head": 1}.items()
                         for block in [*blocks, *(groups if sublayer == "attention" else [])] for _ in range(times))
        assert found == wanted


def test_no_two_purposes_have_one_tag():
    assert list(Tag.__members__) == [tag.name for tag in Tag]
    assert len({int(tag) for tag in Tag}) == len(Tag)


BACKWARD = ["head", "mlp", "attention", "mlp", "attention", "embedding"]


def ends_of_work(script):
    """Where in a backward's script the work of each sub-layer of BACKWARD ends."""
    ends, before = [], None
    for place, event in enumerate(script):
        if event.what == "compute":
            if event.phase[0] != before:
                ends.append(place)
            before, ends[-1] = event.phase[0], place
    assert [script[place].phase[0] for place in ends] == BACKWARD
    return ends


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("schedule", ["tsp", "fsdp+sp", "sp"])
def test_gradients_of_weights_are_in_flight_until_the_next_sub_layer_is_over_and_totals_until_the_one_after(
    schedule, ranks
):
    for script in scripts(schedule, ranks, backward=True):
        ends = ends_of_work(script)
        later = 2 if schedule == "sp" else 1
        for tag in (Tag.HEAD_GRADIENTS, Tag.MLP_GRADIENTS, Tag.ATTENTION_GRADIENTS):
            own = [number for number, name in enumerate(BACKWARD) if name == tag.sublayer]
            for number, last in zip(own, ends_of_exchanges(script, tag, len(own))):
                assert last > ends[min(number + later, len(ends) - 1)], (tag, number)
                if number + later + 1 < len(ends):
                    assert last < ends[number + later + 1], "and no longer"


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_mlp_s_weights_are_posted_when_the_layer_s_last_keys_and_values_are(ranks):
    for script in scripts("tsp", ranks, backward=False):
        keys, weights = places(script, "post", Tag.KEYS_VALUES), places(script, "post", Tag.MLP_WEIGHTS)
        layer_keys, layer_weights = len(keys) // 2, len(weights) // 2
        assert keys[layer_keys - 1] < weights[0] and keys[-1] < weights[layer_weights]
        # And they are posted before the attention is over: keys and values are still waited for.
        assert weights[0] < places(script, "wait", Tag.KEYS_VALUES, "receive")[layer_keys // 2 - 1]


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_next_attention_s_weights_set_off_when_the_mlp_s_last_have(ranks):
    for script in scripts("tsp", ranks, backward=False):
        weights = places(script, "post", Tag.MLP_WEIGHTS, "receive")
        attention = places(script, "post", Tag.ATTENTION_WEIGHTS, "receive")
        second_layer = attention[len(attention) // 2]
        assert weights[len(weights) // 2 - 1] < second_layer
        assert second_layer < places(script, "wait", Tag.MLP_WEIGHTS, "receive")[len(weights) // 2 - 1]


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_backward_s_first_keys_and_values_travel_under_the_mlp_s_backward(ranks):
    for script in scripts("tsp", ranks, backward=True):
        keys, weights = places(script, "post", Tag.KEYS_VALUES), places(script, "wait", Tag.MLP_WEIGHTS, "receive")
        gradients = places(script, "post", Tag.MLP_GRADIENTS, "send")
        for layer in (1, 2):
            first = keys[(layer - 1) * len(keys) // 2]
            assert first < weights[layer * len(weights) // 2 - 1]
            assert first < gradients[layer * len(gradients) // 2 - 1]


def test_gradients_of_keys_and_values_are_waited_for_when_those_of_two_more_blocks_have_set_off():
    """So that a rank that is behind by less than a block holds up nobody."""
    for script in scripts("tsp", 2, backward=True):
        posted = places(script, "post", Tag.KEYS_VALUES_GRADIENTS, "send")
        waited = places(script, "wait", Tag.KEYS_VALUES_GRADIENTS, "receive")
        assert len(posted) == len(waited) == CONFIG.num_layers * CONFIG.blocks
        for layer in range(0, len(posted), CONFIG.blocks):
            of_layer = posted[layer : layer + CONFIG.blocks]
            for block, place in enumerate(waited[layer : layer + CONFIG.blocks]):
                assert of_layer[min(block + 2, CONFIG.blocks - 1)] < place


@pytest.mark.parametrize("schedule", ["sp", "tsp"])
def test_the_last_gradients_of_a_part_are_waited_for_under_the_next_part(schedule):
    for script in scripts(schedule, 2, backward=True):
        last_layer_s = places(script, "wait", Tag.MLP_GRADIENTS, "receive")
        waited = last_layer_s[len(last_layer_s) // 2 - 1]
        assert places(script, "post", Tag.KEYS_VALUES_GRADIENTS, "send")[0] < waited


def test_a_rank_sends_no_block_of_a_round_before_it_asks_for_one_of_that_round():
    for script in scripts("tsp", 2, backward=False):
        sent = asked_for = 0
        for event in script:
            if event.what == "post" and event.tag == Tag.MLP_WEIGHTS:
                sent, asked_for = sent + (event.verb == "send"), asked_for + (event.verb == "receive")
                assert sent <= asked_for
        assert sent == asked_for > 0
