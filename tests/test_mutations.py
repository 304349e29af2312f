"""The tests can fail: each way of breaking the code turns a named test red.

A mutation is laid over the code, and the test that guards against it is called as it stands.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import test_equivalence
import test_gradients
import test_naive_and_single
import test_recompute
from cases import MODULES, case_config, random_text, single_digest

from tsp_ref.comm.communicator import Communicator
from tsp_ref.comm.virtual import VirtualCommunicator, VirtualWorld
from tsp_ref.errors import AgreedError, MessageError
from tsp_ref.grid.tree import Tree
from tsp_ref.model import tilewise
from tsp_ref.model.activations import AttentionSaved
from tsp_ref.ops import attention as attention_ops
from tsp_ref.ops import loss as loss_ops
from tsp_ref.ops import norm as norm_ops
from tsp_ref.reference import single
from tsp_ref.schedules import all_reduce, fsdp_sp, gradients, keys_values, tp_sp, tsp
from tsp_ref.schedules.all_gather import AllGather
from tsp_ref.schedules.gradients import AllReduceGradients, ReduceToOwner
from tsp_ref.schedules.ring import Broadcast
from tsp_ref.schedules.tags import Tag
from tsp_ref.training import strategy
from tsp_ref.training.collect import digest
from tsp_ref.training.loop import Training
from tsp_ref.training.strategy import Plan

CONFIG = case_config("grouped-query", "float32", num_layers=1, hidden_size=32, num_heads=8, num_kv_heads=4, blocks=4,
                     tiles=4)


@pytest.fixture(autouse=True)
def fresh_digests():
    """A digest that was remembered from code that is broken, or was whole, is of no use to the other."""
    single_digest.cache_clear()
    yield
    single_digest.cache_clear()


def naive_test():
    test_naive_and_single.test_logits_loss_and_every_gradient_of_naive_and_single_agree("plain", "float64")


def differences_test():
    test_gradients.test_gradients_of_the_single_process_are_central_differences("plain", "loss")


def differences_on_ranks_test(schedule):
    test_gradients.test_gradients_on_virtual_ranks_are_central_differences(Plan(schedule), 2, "loss")


def bits_test(schedule, mesh=None):
    plan, ranks = Plan(schedule, mesh), 8 if mesh == "2x4" else 4
    test_equivalence.test_two_steps_on_virtual_ranks_have_the_digest_of_the_single_process(plan, ranks, CONFIG)


def recompute_test(schedule, recompute):
    test_equivalence.test_recomputing_what_a_backward_needs_changes_no_bit(Plan(schedule, recompute=recompute), 2)


def kept_test():
    test_recompute.test_what_is_recomputed_is_not_kept_and_what_is_kept_is_used_up(Plan("sp"), 2, "attention")


def verdicts_test(schedule):
    test_equivalence.test_every_tensor_of_every_copy_is_the_single_process_s(Plan(schedule), 3)


def orders_test(schedule):
    test_equivalence.test_twenty_random_orders_of_arrival_change_no_bit(Plan(schedule))


def of(test, *arguments):
    """A test with its arguments, named by both."""
    called = partial(test, *arguments)
    called.__name__ = "-".join((test.__name__, *arguments))
    return called


def in_the_reference_only(monkeypatch, **functions):
    """The single process has these in place of what ranks share with it."""
    monkeypatch.setattr(single, "tilewise", SimpleNamespace(**{**vars(tilewise), **functions}))


def drop_residual(monkeypatch):
    monkeypatch.setattr(tilewise, "add_residual", lambda model, x, y: tilewise.joined(model, y))


def drop_residual_of_the_backward(monkeypatch):
    honest = single.mlp_backward

    def without(model, dy, *rest):
        return honest(model, dy, *rest) - dy

    monkeypatch.setattr(single, "mlp_backward", without)


def drop_mask(monkeypatch):
    honest = attention_ops.attention_scores
    monkeypatch.setattr(attention_ops, "attention_scores",
                        lambda xp, q, k, mask, out: honest(xp, q, k, 0 * (mask == 0), out))


def drop_eps(monkeypatch):
    honest = norm_ops.inverse_rms
    monkeypatch.setattr(norm_ops, "inverse_rms", lambda xp, x, eps: honest(xp, x, 0.0))


def drop_scale(monkeypatch):
    honest = attention_ops.attention_scores

    def unscaled(xp, q, k, mask, out):
        honest(xp, q * q.shape[-1] ** 0.5, k, mask, out)

    monkeypatch.setattr(attention_ops, "attention_scores", unscaled)


def drop_loss_scale(monkeypatch):
    honest = loss_ops.logits_backward
    monkeypatch.setattr(loss_ops, "logits_backward", lambda xp, scale, *rest, **named: honest(xp, 1.0, *rest, **named))


def drop_a_key_value_gradient(monkeypatch):
    honest = tilewise.attend_backward

    def forgetful(model, *arguments):
        dkeys_values = arguments[-1]
        partials = Tree(dkeys_values.leaves, attention_ops.add_keys)
        dq = honest(model, *arguments[:-1], partials)
        for (level, index), piece in partials.pieces():
            piece[0] = 0.0
            dkeys_values.add(index, piece, level)
        return dq

    in_the_reference_only(monkeypatch, attend_backward=forgetful)


def let_one_rank_s_gains_drift(monkeypatch):
    for module in MODULES.values():
        def drifting(ranks, model, dgain, gradients, honest=module.gains_backward):
            honest(ranks, model, dgain, gradients)
            gradients.gains[0, 0] += getattr(ranks, "whole", ranks).rank == 2

        monkeypatch.setattr(module, "gains_backward", drifting)


def let_one_copy_of_a_gradient_drift(monkeypatch):
    """By one bit in one number, on one rank, of what all have summed."""
    honest = AllReduceGradients.finish

    def drifting(self):
        honest(self)
        if self.comm.rank == self.comm.size - 1 and self.tag == Tag.MLP_GRADIENTS:
            row = self.rows_of[0][0]
            row[-1] = np.nextafter(row[-1], row.dtype.type(9))

    monkeypatch.setattr(AllReduceGradients, "finish", drifting)


def leave_one_copy_of_a_gradient_at_zero(monkeypatch):
    honest = AllReduceGradients.finish

    def forgetful(self):
        honest(self)
        for rows in self.rows_of:
            rows *= self.comm.rank == 0 or self.tag != Tag.MLP_GRADIENTS

    monkeypatch.setattr(AllReduceGradients, "finish", forgetful)


def sum_in_order_of_arrival(monkeypatch):
    def add(self, index, partial, level=0):
        waiting = self._waiting.pop(self._root, None)
        self._waiting[self._root] = partial if waiting is None else self.merge(waiting, partial)

    def reaching(model, slots, slot):
        return [Tree(range(model.config.tiles))._root] if {*slots} & {*model.grid.readers(slot)} else []

    for module in (all_reduce, gradients):
        monkeypatch.setattr(module, "cover", lambda leaves, part: [Tree(leaves)._root] if part else [])
    monkeypatch.setattr(keys_values, "reaching", reaching)
    monkeypatch.setattr(Tree, "add", add)


def count_a_piece_that_arrives_twice(monkeypatch):
    """In the number itself, so that no tree can notice."""
    honest = gradients.merge

    def twice(arrival):
        arrival.request.array[...] *= 2
        honest(arrival)

    monkeypatch.setattr(gradients, "merge", twice)


def send_a_message_from_another_array(monkeypatch):
    honest = VirtualCommunicator.Isend

    def stale(self, array, dest, tag, block=None):
        return honest(self, array * 0 if tag == Tag.KEYS_VALUES_GRADIENTS else array, dest, tag, block)

    monkeypatch.setattr(VirtualCommunicator, "Isend", stale)


def recompute_with_the_weights_of_another_layer(monkeypatch):
    for module in MODULES.values():
        def stale(ranks, model, x, weights, layer, *more, honest=module.attention_forward, **named):
            return honest(ranks, model, x, weights, 0 if model.phase[1] == "backward" else layer, *more, **named)

        monkeypatch.setattr(module, "attention_forward", stale)
    honest_messages = tsp.messages_of_layer

    def of_another(comm, model, weights, saved, layer):
        """TSP's messages bring the weights."""
        messages = honest_messages(comm, model, weights, saved, layer)
        stale = Broadcast(comm, model, weights.attention[0], Tag.ATTENTION_WEIGHTS)
        return messages._replace(attention_recomputed=stale)

    monkeypatch.setattr(tsp, "messages_of_layer", of_another)
    honest_gathers = fsdp_sp.gathers_of_layer

    def gathers_of_another(comm, model, weights, saved, layer):
        """And FSDP+SP's."""
        stale = AllGather(comm, model, weights.attention[0], Tag.ATTENTION_WEIGHTS)
        return honest_gathers(comm, model, weights, saved, layer)._replace(attention_recomputed=stale)

    monkeypatch.setattr(fsdp_sp, "gathers_of_layer", gathers_of_another)


def recompute_all_but_the_softmax_s_denominators(monkeypatch):
    for module in MODULES.values():
        def forgetful(ranks, model, *rest, honest=module.attention_forward, **named):
            x, saved = honest(ranks, model, *rest, **named)
            for logsumexp in saved.logsumexp.values():
                logsumexp *= model.phase[1] != "backward"
            return x, saved

        monkeypatch.setattr(module, "attention_forward", forgetful)


def keep_what_is_recomputed(monkeypatch):
    monkeypatch.setattr(AttentionSaved, "keep_input_only", lambda self: None)


def forget_one_tensor_less(monkeypatch):
    honest = AttentionSaved.keep_input_only

    def sparing(self):
        q = dict(self.q)
        honest(self)
        self.q.update(q)

    monkeypatch.setattr(AttentionSaved, "keep_input_only", sparing)


@pytest.mark.parametrize("mutate, test", [
    (drop_residual, naive_test),
    (drop_residual_of_the_backward, naive_test),
    (drop_residual_of_the_backward, differences_test),
    (drop_mask, naive_test),
    (drop_eps, naive_test),
    (drop_scale, naive_test),
    (drop_loss_scale, naive_test),
    (drop_loss_scale, differences_test),
    (drop_a_key_value_gradient, naive_test),
    (drop_a_key_value_gradient, differences_test),
    *((drop_a_key_value_gradient, of(bits_test, schedule)) for schedule in MODULES),
    *((let_one_rank_s_gains_drift, of(bits_test, schedule)) for schedule in MODULES),
    *((let_one_rank_s_gains_drift, of(verdicts_test, schedule)) for schedule in MODULES),
    *((let_one_copy_of_a_gradient_drift, of(test, schedule))
      for test in (bits_test, verdicts_test) for schedule in ("sp", "tp+sp")),
    (leave_one_copy_of_a_gradient_at_zero, of(differences_on_ranks_test, "sp")),
    *((sum_in_order_of_arrival, of(test, schedule)) for test in (bits_test, orders_test) for schedule in MODULES),
    *((count_a_piece_that_arrives_twice, of(bits_test, schedule)) for schedule in MODULES),
    *((send_a_message_from_another_array, of(bits_test, schedule)) for schedule in ("sp", "tp+sp", "fsdp+sp", "tsp")),
    *((recompute_with_the_weights_of_another_layer, of(recompute_test, schedule, recompute))
      for schedule in MODULES for recompute in ("attention", "full")),
    *((recompute_all_but_the_softmax_s_denominators, of(recompute_test, schedule, recompute))
      for schedule in MODULES for recompute in ("attention", "full")),
    (keep_what_is_recomputed, kept_test),
    (forget_one_tensor_less, kept_test),
], ids=lambda part: part.__name__)
def test_a_mutation_turns_a_test_red(mutate, test, monkeypatch):
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        test()


PARTS = ("EMBEDDING", "ATTENTION", "MLP", "HEAD")
WEIGHTS, SUMS, GRADIENTS = ([Tag[f"{part}_{what}"] for part in PARTS] for what in ("WEIGHTS", "SUMS", "GRADIENTS"))
ALONG_WEIGHTS = {*SUMS, Tag.GRADIENT_NORM}
ALONG_TOKENS = {*GRADIENTS, Tag.KEYS_VALUES, Tag.KEYS_VALUES_GRADIENTS, Tag.GAIN_GRADIENTS, Tag.LOSS}
TAGS = {
    "tp": {*ALONG_WEIGHTS, Tag.COLLECT},
    "sp": ALONG_TOKENS,  # rank 0 holds all that a digest is made of
    "tp+sp": {*ALONG_WEIGHTS, *ALONG_TOKENS, Tag.COLLECT},
    "fsdp+sp": {*WEIGHTS, *ALONG_TOKENS, Tag.GRADIENT_NORM, Tag.COLLECT},
    "tsp": {*WEIGHTS, *ALONG_TOKENS, Tag.GRADIENT_NORM, Tag.COLLECT},
}
MESSAGES = [(schedule, tag) for schedule, tags in TAGS.items() for tag in sorted(tags)]


def one_step(schedule):
    """A step and a digest on four virtual ranks, checked at the end for messages that are left."""
    config = case_config("plain", "float32", num_layers=1, tiles=4, blocks=4)
    test_equivalence.virtual_digest(config, Plan(schedule), 4, steps=1)


@pytest.mark.parametrize("schedule", MODULES)
def test_a_schedule_sends_messages_of_these_purposes_and_no_others(schedule):
    def main(comm):
        training = Training(case_config("plain", "float32", num_layers=1), comm, Plan(schedule), random_text(), np)
        training.step()
        digest(training)
        return {entry.tag for entry in comm.ledger.entries} - {"CONTROL"}

    assert set().union(*VirtualWorld(4).run(main)) == {tag.name for tag in TAGS[schedule]}
    assert set().union(*TAGS.values()) == set(Tag)


@pytest.mark.parametrize("schedule, tag", MESSAGES, ids=lambda part: getattr(part, "name", part))
def test_a_message_that_is_not_sent_is_named_not_waited_for(schedule, tag, monkeypatch):
    honest = VirtualCommunicator._start
    dropped = []

    def lossy(self, request):
        if request.verb == "send" and request.tag == tag and not dropped:
            dropped.append(request)
            request.handle = True
        else:
            honest(self, request)

    monkeypatch.setattr(VirtualCommunicator, "_start", lossy)
    with pytest.raises(MessageError, match=tag.name):
        one_step(schedule)
    assert dropped


@pytest.mark.parametrize("schedule, tag", MESSAGES, ids=lambda part: getattr(part, "name", part))
def test_a_message_that_is_sent_twice_is_named(schedule, tag, monkeypatch):
    honest = Communicator.Isend
    doubled = []

    def twice(self, array, dest, given, block=None):
        if given == tag and not doubled:
            doubled.append(honest(self, array.copy(), dest, given, block))
        return honest(self, array, dest, given, block)

    monkeypatch.setattr(Communicator, "Isend", twice)
    with pytest.raises(MessageError, match=tag.name):
        one_step(schedule)
    assert doubled


@pytest.mark.parametrize("schedule", MODULES)
def test_a_piece_that_is_merged_twice_is_refused(schedule, monkeypatch):
    honest = gradients.merge

    def twice(arrival):
        level, index = arrival.node
        arrival.tree.add(index, arrival.request.array.copy(), level)
        honest(arrival)

    monkeypatch.setattr(gradients, "merge", twice)
    with pytest.raises(ValueError, match=r"was added to the tree twice|holds only the nodes"):
        one_step(schedule)


def other_axes(monkeypatch):
    """Of every mesh that is made from here on, each axis's other one."""
    honest, other = strategy.make_mesh, {}

    def noted(*arguments):
        mesh = honest(*arguments)
        other[mesh.weights], other[mesh.tokens] = mesh.tokens, mesh.weights
        return mesh

    monkeypatch.setattr(strategy, "make_mesh", noted)
    return other


def give_the_other_axis_to(collective):
    """One collective of tp_sp works along the tokens' axis in place of the weights', or the other way round."""

    def mutate(monkeypatch):
        honest, other = getattr(tp_sp, collective), other_axes(monkeypatch)
        monkeypatch.setattr(
            tp_sp, collective, lambda axis, *rest, **named: honest(other[axis], *rest, **named))

    mutate.__name__ = collective
    return mutate


def reduce_along_one_axis_and_gather_along_the_other(monkeypatch):
    """Of AllReduceGradients, the gather alone has the wrong axis."""
    honest, other = AllReduceGradients.gather, other_axes(monkeypatch)

    def elsewhere(self):
        ReduceToOwner.finish(self)
        self.comm = other[self.comm]
        honest(self)

    monkeypatch.setattr(AllReduceGradients, "gather", elsewhere)


def gather_along_one_axis_and_reduce_along_the_other(monkeypatch):
    """Of AllReduceGradients, the reduce alone has the wrong axis."""
    other = other_axes(monkeypatch)

    def elsewhere(axis, *rest, **named):
        summed = AllReduceGradients(other[axis], *rest, **named)

        def gather():
            ReduceToOwner.finish(summed)
            summed.comm = axis
            AllReduceGradients.gather(summed)

        summed.gather = gather
        return summed

    monkeypatch.setattr(tp_sp, "AllReduceGradients", elsewhere)


def take_one_axis_for_the_other(monkeypatch):
    honest = tp_sp.place
    monkeypatch.setattr(tp_sp, "place", lambda mesh: honest(mesh)[::-1])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of what was never received
@pytest.mark.parametrize("mesh", ["2x2", "2x4"])
@pytest.mark.parametrize("mutate", [
    take_one_axis_for_the_other, reduce_along_one_axis_and_gather_along_the_other,
    gather_along_one_axis_and_reduce_along_the_other, *map(give_the_other_axis_to, (
        "AllReduceTiles", "GatherKeysValues", "ScatterKeysValues", "AllReduceGradients", "all_reduce"))],
    ids=lambda part: part.__name__)
def test_a_wrong_axis_turns_the_digest_red(mutate, mesh, monkeypatch):
    mutate(monkeypatch)
    # Other bits, another shape, a piece that comes twice, a rank that is not there, or a loss that is not a number.
    with pytest.raises((AssertionError, MessageError, ValueError, IndexError, AgreedError)):
        bits_test("tp+sp", mesh)


def test_unbroken_code_passes_the_tests_that_judge_the_mutations():
    """Those that no other file runs as they are called here; the others are green, or that file is red."""
    verdicts_test("tp+sp")
    for schedule in MODULES:
        one_step(schedule)
        bits_test(schedule)
    bits_test("tp+sp", "2x4")
