"""Messages share a link, one after the other: what is needed sooner is posted sooner, and what is needed late is waited
for late. Read from the script of a step: what a rank posted, and waited for, in order."""

import numpy as np
import pytest
from cases import case_config, random_text

from tsp_ref.comm.virtual import VirtualWorld
from tsp_ref.schedules.tags import Tag
from tsp_ref.training.loop import Training
from tsp_ref.training.strategy import Plan

CONFIG = case_config("plain", "float32", num_layers=2)


def scripts(schedule, ranks, backward):
    """What each rank did in a forward, or in the backward after it."""
    def rank(comm):
        training = Training(CONFIG, comm, Plan(schedule), random_text(), np)
        comm.script = forward = []
        _, saved = training.forward()
        comm.script = after = []
        training.strategy.backward(saved, training.weights, training.gradients)
        comm.script = None
        return after if backward else forward

    return VirtualWorld(ranks, seed=ranks).run(rank)


def places(script, what, tag, verb=None):
    """Where in a script messages of a tag, and of a verb if one is named, were posted, or waited for."""
    found, of = [], {}  # of: what a request's number stands for, until another message has it
    for place, event in enumerate(script):
        if event.what == "post":
            of[event.request] = event.verb, event.tag
        if event.what == what and of[event.request][1] == tag and verb in (None, of[event.request][0]):
            found.append(place)
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_mlp_s_weights_set_off_when_the_layer_s_last_keys_and_values_have(ranks):
    for script in scripts("tsp", ranks, backward=False):
        keys, weights = places(script, "post", Tag.KEYS_VALUES), places(script, "post", Tag.MLP_WEIGHTS)
        layer_keys, layer_weights = len(keys) // 2, len(weights) // 2
        assert keys[layer_keys - 1] < weights[0] and keys[-1] < weights[layer_weights]
        # And they do set off before the attention is over: keys and values are still waited for.
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
        assert places(script, "post", Tag.KEYS_VALUES)[0] < places(script, "wait", Tag.MLP_WEIGHTS, "receive")[-1]
        assert places(script, "post", Tag.KEYS_VALUES)[0] < places(script, "post", Tag.MLP_GRADIENTS, "send")[-1]


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
