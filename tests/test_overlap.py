"""The command `overlap`, and the halves of a step that it times: messages alone, computation alone."""

import json
from collections import Counter

import numpy as np
import pytest
from cases import case_config, random_text

from tsp_ref.cli import main
from tsp_ref.comm.rehearsal import LocalCopies, replay
from tsp_ref.comm.virtual import VirtualWorld
from tsp_ref.commands.overlap import Overlap
from tsp_ref.training.loop import Training
from tsp_ref.training.strategy import Plan

SCHEDULES = ["tp", "sp", "tp+sp", "tsp"]
FIELDS = {"schedule", "part", "comm_seconds", "compute_seconds", "both_seconds", "hidden_fraction"}


@pytest.mark.parametrize(("comm", "compute", "both", "hidden"), [
    (1.0, 2.0, 3.0, 0.0), (1.0, 2.0, 2.0, 1.0), (2.0, 1.0, 2.5, 0.5), (0.0, 1.0, 1.0, 1.0)])
def test_what_is_hidden_is_what_the_shorter_of_the_two_did_not_cost(comm, compute, both, hidden):
    assert Overlap("tsp", "forward", comm, compute, both).hidden_fraction == pytest.approx(hidden)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_replay_sends_every_message_of_the_step_again_in_the_same_order_and_nothing_else(schedule):
    def rank(comm):
        training = Training(case_config("plain", "float32", num_layers=1), comm, Plan(schedule), random_text(), np)
        comm.script = script = []
        training.step()
        comm.script = None
        once = comm.ledger.sums("send"), comm.ledger.sums("receive")
        comm.script = again = []
        replay(comm, script)
        comm.script = None
        comm.finish()
        twice = comm.ledger.sums("send"), comm.ledger.sums("receive")
        assert twice == tuple((2 * messages, 2 * size) for messages, size in once)
        assert posts(again) == posts(script) and posts(script)
        assert Counter(event.what for event in script)["wait"] >= 0.5 * len(posts(script))

    VirtualWorld(4, seed=3).run(rank)


def posts(script):
    """The messages of a script, in order."""
    return [(event.verb, event.peer, event.tag, event.size) for event in script if event.what == "post"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_step_on_local_copies_computes_without_any_other_rank(schedule):
    comm = LocalCopies(rank=1, size=4)
    training = Training(case_config("plain", "float32", num_layers=1), comm, Plan(schedule), random_text(), np)
    with np.errstate(all="ignore"):
        _, saved = training.forward()
        training.strategy.backward(saved, training.weights, training.gradients)
    assert comm.ledger.sums("send")[0] > 0
    comm.finish()


@pytest.mark.parametrize("schedule", ["tsp", "tp+sp"])
def test_the_command_writes_both_parts(schedule, tmp_path, capsys):
    path = tmp_path / "overlap.json"
    arguments = ["--preset", "tiny", "--set", "num_layers=1", "--repeats", "1", "--json", str(path)]
    assert main(["overlap", "--ranks", "2", "--schedule", schedule, *arguments]) == 0
    rows = json.loads(path.read_text())
    assert [row["part"] for row in rows] == ["forward", "forward+backward"]
    assert all(set(row) == FIELDS and min(row["comm_seconds"], row["compute_seconds"]) > 0 for row in rows)
    assert "forward+backward" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "message"), [
    (["--schedule", "single"], "--schedule single sends no messages: use one of tp, sp, tp+sp, tsp"),
    (["--link", "fast"], "--link fast is not a link"),
    (["--progress", "magic"], "--progress magic is unknown: use one of wait, poll, thread"),
    (["--repeats", "0"], "--repeats 0 is not valid: use 1 or more"),
    (["--json", "/no/such/folder/file"], "--json /no/such/folder/file cannot be written"),
])
def test_what_cannot_be_timed_is_refused(arguments, message, capsys):
    assert main(["overlap", "--ranks", "2", "--preset", "tiny", *arguments]) == 2
    assert message in capsys.readouterr().err
