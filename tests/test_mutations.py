"""The tests can fail: each way of breaking the code turns a named test red.

A mutation is laid over the code, and the test that guards against it is called as it stands.
"""

from __future__ import annotations

import pytest
import test_equivalence
import test_gradients
import test_naive_and_single

from tsp_ref import tilewise
from tsp_ref.comm.virtual import VirtualCommunicator
from tsp_ref.errors import MessageError
from tsp_ref.ops import attention as attention_ops
from tsp_ref.ops import norm as norm_ops
from tsp_ref.reference import single
from tsp_ref.schedules import collectives, tsp
from tsp_ref.schedules.tags import Tag
from tsp_ref.tree import Tree


def naive_test():
    test_naive_and_single.test_logits_loss_and_every_gradient_of_naive_and_single_agree("plain", "float64")


def differences_test():
    test_gradients.test_gradients_of_the_single_process_are_central_differences("plain", "loss")


def bits_test():
    test_equivalence.test_five_steps_on_virtual_ranks_have_the_digest_of_the_single_process("plain", 4, "float32")


def verdicts_test():
    test_equivalence.test_every_tensor_of_three_virtual_ranks_is_the_single_process_s()


def orders_test():
    test_equivalence.test_a_hundred_random_orders_of_arrival_change_no_bit()


def drop_residual(monkeypatch):
    def without(model, x, part):
        return {slot: part[slot].total for slot in model.grid.slots}

    monkeypatch.setattr(single, "add_residual", without)
    monkeypatch.setattr(tsp, "add_residual", without)


def drop_residual_of_the_backward(monkeypatch):
    honest = single.mlp_backward

    def without(model, dy, *rest):
        dx = honest(model, dy, *rest)
        return {slot: dx[slot] - dy[slot] for slot in dx}

    monkeypatch.setattr(single, "mlp_backward", without)


def drop_mask(monkeypatch):
    honest = attention_ops.attention_scores
    monkeypatch.setattr(attention_ops, "attention_scores", lambda xp, q, k, mask: honest(xp, q, k, 0 * (mask == 0)))


def drop_eps(monkeypatch):
    honest = norm_ops.rmsnorm_forward
    monkeypatch.setattr(tilewise, "rmsnorm_forward", lambda xp, x, gain, eps: honest(xp, x, gain, 0.0))


def drop_scale(monkeypatch):
    honest = attention_ops.attention_scores

    def unscaled(xp, q, k, mask):
        return honest(xp, q * q.shape[-1] ** 0.5, k, mask)

    monkeypatch.setattr(attention_ops, "attention_scores", unscaled)


def drop_loss_scale(monkeypatch):
    honest = single.logits_backward
    monkeypatch.setattr(single, "logits_backward", lambda xp, scale, *rest, **named: honest(xp, 1.0, *rest, **named))


def drop_a_key_value_gradient(monkeypatch):
    honest = attention_ops.attend_backward

    def forgetful(*arguments):
        dq, dkv = honest(*arguments)
        dkv[0] = 0.0
        return dq, dkv

    monkeypatch.setattr(single, "attend_backward", forgetful)


def let_one_rank_s_gains_drift(monkeypatch):
    honest = tsp.gains_backward

    def drifting(comm, model, dgain, gradients):
        honest(comm, model, dgain, gradients)
        gradients.gains[0, 0] += comm.rank == 2

    monkeypatch.setattr(tsp, "gains_backward", drifting)


def sum_in_order_of_arrival(monkeypatch):
    def add(self, index, partial, level=0):
        waiting = self._waiting.pop(self._root, None)
        self._waiting[self._root] = partial if waiting is None else self.merge(waiting, partial)

    monkeypatch.setattr(collectives, "cover", lambda leaves, part: [Tree(leaves)._root] if part else [])
    monkeypatch.setattr(Tree, "add", add)


def send_a_message_from_another_array(monkeypatch):
    honest = VirtualCommunicator.Isend

    def stale(self, array, dest, tag):
        return honest(self, array * 0 if tag == Tag.KEYS_VALUES_GRADIENTS else array, dest, tag)

    monkeypatch.setattr(VirtualCommunicator, "Isend", stale)


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
    (drop_a_key_value_gradient, bits_test),
    (let_one_rank_s_gains_drift, bits_test),
    (let_one_rank_s_gains_drift, verdicts_test),
    (sum_in_order_of_arrival, bits_test),
    (sum_in_order_of_arrival, orders_test),
    (send_a_message_from_another_array, bits_test),
], ids=lambda part: part.__name__)
def test_a_mutation_turns_a_test_red(mutate, test, monkeypatch):
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        test()


@pytest.mark.parametrize("tag", list(Tag), ids=lambda tag: tag.name)
def test_a_message_that_is_not_sent_is_named_not_waited_for(tag, monkeypatch):
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
        bits_test()
    assert dropped


def test_unbroken_code_passes_the_tests_that_judge_the_mutations():
    for test in (naive_test, differences_test, bits_test, verdicts_test, orders_test):
        test()
