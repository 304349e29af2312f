"""The phase of a step: in the accounts of messages, memory and work while a part runs, and not a moment longer."""

import numpy as np
import pytest
from cases import case_config, random_text

from tsp_ref.accounting.phase import OUTSIDE, phase
from tsp_ref.comm.communicator import Communicator
from tsp_ref.comm.mesh import Mesh, make_mesh
from tsp_ref.comm.virtual import VirtualWorld
from tsp_ref.model.model import Model
from tsp_ref.training.loop import Training
from tsp_ref.training.strategy import Plan

CONFIG = case_config("plain", "float32", num_layers=1, tiles=4, blocks=4)


def accounts(model, *ranks):
    """The phase in every book."""
    found = {model.phase, model.memory.phase, model.work.phase}
    for one in ranks:
        found |= {one.phase, *(part.ledger.phase for part in vars(one).values() if isinstance(part, Communicator))}
    (same,) = found
    return same


@phase("mlp", "forward")
def alone(model: Model, action):
    """A part of the single process."""
    return action(accounts(model))


@phase("mlp", "forward")
def on_ranks(comm: Communicator, model: Model, action):
    """A part of a schedule on one axis."""
    return action(accounts(model, comm))


@phase("mlp", "forward")
def on_a_mesh(mesh: Mesh, model: Model, action):
    """A part of a schedule on a mesh."""
    return action(accounts(model, mesh))


@phase("head", "backward")
def backward(comm: Communicator, model: Model, action):
    """A part of a backward."""
    return action(accounts(model, comm))


def test_a_part_is_in_its_phase_in_every_book_and_its_caller_is_not():
    comm, model = VirtualWorld(4).communicators[1], Model(CONFIG, np)
    mesh = make_mesh(comm, 2, 2)
    for part, ranks in ((alone, ()), (on_ranks, (comm,)), (on_a_mesh, (mesh,))):
        assert part(*ranks, model, lambda found: found) == ("mlp", "forward")
        assert accounts(model, comm, mesh) == OUTSIDE


def test_the_phase_before_is_restored_when_a_part_raises():
    comm, model = VirtualWorld(2).communicators[0], Model(CONFIG, np)

    def fail(found):
        raise ZeroDivisionError(found)

    def fail_within(found):
        with pytest.raises(ZeroDivisionError, match="head"):
            backward(comm, model, fail)
        assert accounts(model, comm) == found == ("mlp", "forward")
        fail(found)

    with pytest.raises(ZeroDivisionError, match="mlp"):
        on_ranks(comm, model, fail_within)
    assert accounts(model, comm) == OUTSIDE


def test_a_forward_within_a_backward_is_work_of_the_backward():
    comm, model = VirtualWorld(2).communicators[0], Model(CONFIG, np)
    inner = backward(comm, model, lambda _: on_ranks(comm, model, lambda found: found))
    assert inner == ("mlp", "backward")
    assert on_ranks(comm, model, lambda _: backward(comm, model, lambda found: found)) == ("head", "backward")
    assert on_ranks(comm, model, lambda found: found) == ("mlp", "forward"), "after the backward it is a forward again"


def test_a_decorated_function_is_still_itself():
    assert (alone.__name__, alone.__doc__) == ("alone", "A part of the single process.")
    with pytest.raises(ValueError, match="'model' is not in list"):
        phase("mlp", "forward")(lambda comm, x: x)


@pytest.mark.parametrize("plan, ranks", [
    (Plan("tp"), 2), (Plan("sp"), 2), (Plan("tp+sp", "2x2"), 4), (Plan("fsdp+sp"), 2), (Plan("tsp"), 2),
    (Plan("tsp", recompute="full"), 2)],
    ids=str)
def test_what_a_step_sends_holds_and_computes_is_entered_under_its_parts(plan, ranks):
    def main(comm):
        training = Training(CONFIG, comm, Plan(plan.schedule, plan.mesh, recompute=plan.recompute, counted=True),
                            random_text(), np)
        sent_before = comm.ledger.sums("send")
        training.step()
        return training.model, comm.ledger, sent_before

    parts = {(part, direction) for part in ("embedding", "attention", "mlp", "head")
             for direction in ("forward", "backward")}
    for model, ledger, sent_before in VirtualWorld(ranks).run(main):
        assert sent_before == (0, 0)
        assert model.phase == ledger.phase == OUTSIDE
        # The embedding's forward looks rows up, and multiplies nothing.
        assert set(model.work.flops) == parts - {("embedding", "forward")}
        assert parts <= set(model.memory.peaks)
        sent = {entry.phase for entry in ledger.entries}
        assert sent <= parts | {("loss", "forward"), ("gains", "backward"), ("optimizer", "backward")}
        assert {("attention", "forward"), ("attention", "backward"), ("mlp", "backward")} <= sent


def test_recomputing_is_paid_in_the_backward():
    def flops(recompute):
        comm = VirtualWorld(1).communicators[0]
        training = Training(CONFIG, comm, Plan("tsp", recompute=recompute, counted=True), random_text(), np)
        training.step()
        return training.model.work.flops

    found = {recompute: flops(recompute) for recompute in ("none", "attention", "full")}
    forward = {part: found["none"][part, "forward"] for part in ("attention", "mlp")}
    for recompute, parts in (("attention", ["attention"]), ("full", ["attention", "mlp"])):
        extra = {key: count - found["none"][key] for key, count in found[recompute].items()}
        wanted = {(part, "backward"): forward[part] for part in parts}
        assert {key: more for key, more in extra.items() if more} == wanted
