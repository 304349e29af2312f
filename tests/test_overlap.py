"""The command `overlap`, and the halves of a step that it times: messages alone, computation alone."""

import io
import json
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from cases import case_config, random_text
from rich.console import Console

from tsp_ref.backends.host import HOST
from tsp_ref.cli import main
from tsp_ref.comm.communicator import Event
from tsp_ref.comm.link import Link, parse_link
from tsp_ref.comm.rehearsal import LocalCopies, busiest, replay
from tsp_ref.comm.timeline import Lane, Span
from tsp_ref.comm.virtual import VirtualWorld
from tsp_ref.commands.overlap import OverlapOptions, _measured, _table, obstacle
from tsp_ref.commands.rehearsed import NEAR, TIMES, Rehearsed
from tsp_ref.commands.rounds import FEW, NOISY, NOTHING, Overlap, Round, hidden_fraction, spread, told
from tsp_ref.process.terminal import console_for
from tsp_ref.training.loop import Training
from tsp_ref.training.strategy import Plan

SCHEDULES = ["tp", "sp", "tp+sp", "fsdp+sp", "tsp"]
FIELDS = {"schedule", "part", "rounds", "link", "link_shared", "comm_seconds", "compute_seconds", "both_seconds",
          "exposed_seconds", "hidden_fraction", "hidden_by_waits", "verdict", "verdict_by_waits", "quartiles"}
SECONDS = {"comm_seconds", "compute_seconds", "both_seconds", "exposed_seconds"}


def steady(hidden, comm=1.0, compute=2.0):
    """A round in which so much is hidden, by the timings and by the waits."""
    return Round(comm, compute, comm + compute - hidden * min(comm, compute), comm - hidden * min(comm, compute))


@pytest.mark.parametrize(("comm", "compute", "both", "hidden"), [
    (1.0, 2.0, 3.0, 0.0), (1.0, 2.0, 2.0, 1.0), (2.0, 1.0, 2.5, 0.5), (0.0, 1.0, 1.0, 1.0)])
def test_what_is_hidden_is_what_the_shorter_of_the_two_did_not_cost(comm, compute, both, hidden):
    assert hidden_fraction(comm, compute, both) == pytest.approx(hidden)


@pytest.mark.parametrize(("comm", "compute", "exposed", "hidden"), [
    (1.0, 2.0, 0.25, 0.75), (1.0, 2.0, 0.0, 1.0), (2.0, 1.0, 1.0, 1.0), (2.0, 1.0, 1.5, 0.5)])
def test_by_the_waits_hidden_is_what_was_not_waited_for_whatever_both_took(comm, compute, exposed, hidden):
    assert Round(comm, compute, 17.0, exposed).hidden_by_waits == pytest.approx(hidden)


def test_quartiles_lie_between_two_values_in_proportion():
    assert spread([4.0, 1.0, 3.0, 2.0, 5.0]) == (2.0, 3.0, 4.0)
    assert spread([1.0, 2.0]) == (1.25, 1.5, 1.75)
    assert spread([7.0]) == (7.0, 7.0, 7.0)


@pytest.mark.parametrize(("fractions", "fraction", "text"), [
    ([0.90, 0.95, 0.93], 0.93, "93%"),
    ([0.5, 0.9, 0.9, 0.9, 0.1], None, NOISY),
    ([0.9, 0.9, 0.9, 0.9, -2.0], 0.9, "90%"),  # one disturbed round is what quartiles are for
    ([1.02, 1.04, 1.03], 1.0, "100%"), ([-0.02, -0.04, 0.0], 0.0, "0%"),
    ([1.72, 1.70, 1.71], None, NOISY), ([-0.55, -0.56, -0.57], None, NOISY),
    ([0.97, 0.98, 1.07, 1.08], None, NOISY), ([-0.08, -0.07, 0.02, 0.03], None, NOISY),
    ([0.9, 0.9], None, FEW), ([0.9], None, FEW),
])
def test_a_figure_is_told_where_the_rounds_agree_on_one_that_is_possible(fractions, fraction, text):
    assert told(fractions) == (pytest.approx(fraction) if fraction else fraction, text)


def test_where_the_timings_contradict_each_other_the_waits_may_still_tell():
    rounds = [Round(1.0, 2.0, both, 0.2) for both in (2.1, 2.6, 3.0, 2.0, 2.9)]
    found = Overlap("tsp", "forward", rounds)
    assert found.by_timings == (None, NOISY) and not found.settled
    assert found.by_waits == (pytest.approx(0.8), "80%")


def test_messages_that_take_next_to_nothing_have_no_figure():
    """Or it would be a few microseconds' noise over next to nothing: 141532 %."""
    for messages in (0.0, 1e-6, 0.04):
        found = Overlap("tsp", "forward", [Round(messages, 1.0, both, 0.0) for both in (1.0, 1.01, 0.99)])
        assert found.by_timings == found.by_waits == (None, NOTHING) and found.settled


def test_an_obstacle_is_told_in_place_of_any_figure():
    found = Overlap("tsp", "forward", [steady(0.9)] * 5, "ranks share cores")
    assert found.by_timings == found.by_waits == (None, "ranks share cores") and found.settled


def test_a_row_has_medians_quartiles_and_verdicts():
    found = Overlap("tsp", "forward", [steady(hidden) for hidden in (0.80, 0.84, 0.88)]).row()
    assert found["rounds"] == 3 and found["verdict"] == "84%"
    assert found["hidden_fraction"] == pytest.approx(0.84)
    assert (found["comm_seconds"], found["compute_seconds"]) == (1.0, 2.0)
    assert found["both_seconds"] == pytest.approx(2.16) and found["exposed_seconds"] == pytest.approx(0.16)
    assert found["quartiles"]["hidden_fraction"] == pytest.approx([0.82, 0.86])
    assert set(found["quartiles"]) == SECONDS | {"hidden_fraction", "hidden_by_waits"}


def test_on_a_gpu_nothing_is_said_of_waits_which_are_for_its_computation_too():
    found = Overlap("tsp", "forward", [steady(0.9)] * 3, waits=False)
    assert found.by_timings.text == "90%" and found.by_waits.fraction is None
    assert found.row()["exposed_seconds"] is None and found.row()["hidden_by_waits"] is None
    assert "exposed_seconds" not in found.row()["quartiles"]


def rounds_taken(hidden, repeats):
    """How many rounds of these are timed before it is enough."""
    step = SimpleNamespace(round=map(steady, hidden).__next__, backend=HOST)
    options = OverlapOptions(case_config("plain", "float32"), Plan("tsp"), repeats=repeats)
    return len(_measured(console_for(1), "forward", step, options, None).rounds)


def test_rounds_that_agree_are_enough_and_those_that_contradict_each_other_are_followed_by_more():
    assert rounds_taken([0.9] * 20, repeats=9) == 5
    assert rounds_taken([0.9, 0.1] * 10, repeats=9) == 9
    assert rounds_taken([0.1, 0.5, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9], repeats=9) == 7
    assert rounds_taken([0.9] * 20, repeats=2) == 2


@pytest.mark.parametrize(("ranks", "short", "full"), [
    ((1, 1, 1, 2), "no messages", "One rank sends no messages: there is nothing to hide. Run mpirun -n 2 python"),
    ((2, 2, 1, 8), "virtual ranks take turns", "To see overlap, run mpirun -n 2 python -m tsp_ref overlap"),
    ((4, 1, 4, 2), "ranks share cores", "4 ranks share 2 cores: .* a core for each rank. Run mpirun -n 2 python"),
    ((2, 1, 2, 1), "ranks share cores", "2 ranks share 1 core: .* Run it on a machine with 2 cores or more"),
])
def test_ranks_that_cannot_show_overlap_are_told_so_and_what_to_run(ranks, short, full):
    found = obstacle(*ranks)
    assert found.short == short and re.search(full, found.full)


def test_ranks_with_a_core_each_can_show_overlap():
    assert obstacle(2, 1, 2, 2) is None
    assert obstacle(8, 1, 4, 4) is None, "four on each of two hosts"


def test_figures_of_five_digits_fit_eighty_columns():
    rows = [Overlap("tp+sp 2x2", part, [Round(10 + k, 20 + k, 29 + k, 7.0) for k in range(9)], obstacle)
            for part, obstacle in (("forward", ""), ("forward+backward", "virtual ranks take turns"))]
    console = Console(width=80, record=True, quiet=False, file=io.StringIO())
    console.print(_table(rows))
    lines = console.export_text().splitlines()
    assert max(map(len, map(str.rstrip, lines))) <= 80 and "…" not in "".join(lines)
    assert any("14000 (12000 to 16000)" in line for line in lines)


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


@pytest.mark.parametrize(("progress", "link"), [("poll", None), ("wait", None), ("poll", Link(1e9))])
def test_the_whole_step_s_waits_are_a_part_of_its_time_and_nothing_stays_recorded(progress, link):
    def rank(comm):
        comm.travel_by(progress, link)
        step = Rehearsed(comm, case_config("plain", "float32", num_layers=1), Plan("tsp"), random_text(), True)
        found = step.round()
        assert comm.timeline is None and comm.script is None and comm.link is link
        assert 0 < found.exposed < found.both and min(found.comm, found.compute) > 0
        comm.finish()
        return found

    first, second = VirtualWorld(2).run(rank)
    assert first == second, "every rank has the same numbers, and so decides alike whether to go on"


def test_a_rank_that_never_waited_gathers_a_float_like_the_others():
    """MPI carries no dtype: of a whole number from one rank another would make a float of its bits."""
    idle = Lane(0, [Span(1.0, 3.0, "compute", "mlp", "forward")], [])
    assert (idle.seconds("wait"), idle.seconds("compute")) == (0.0, 2.0) and type(idle.seconds("wait")) is float

    def rank(comm):
        return Rehearsal(comm, size=0, compute=1.0, rest=0.0)._of_all((0, 0.5)[comm.rank])

    assert VirtualWorld(2).run(rank) == [[0.0, 0.5]] * 2


def test_the_busiest_link_is_the_busier_direction_of_the_peer_with_most_bytes():
    script = [Event("post", number, verb, peer, 5, size) for number, (verb, peer, size) in enumerate([
        ("send", 1, 100), ("send", 1, 50), ("receive", 1, 120), ("send", 2, 60), ("receive", 2, 170)])]
    script.insert(2, Event("wait", 0))
    assert busiest(script) == 170
    assert busiest(script, shared=True) == 290
    assert busiest([]) == 0


class Rehearsal(Rehearsed):
    """A step whose halves take a made-up time: messages, `rest` seconds and what the link needs."""

    def __init__(self, comm, size, compute, rest):
        self.comm, self.size, self.compute, self.rest, self.tried = comm, size, compute, rest, 0
        # The last rank has most to send, and everyone waits for it.
        self.script = [Event("post", 0, "send", 1 - comm.rank, 5, size * (comm.rank + 1) // comm.size)]

    def slowest(self, run):
        if run == self.computed:
            return self.compute
        self.tried += 1
        return self.rest + self.size / self.comm.link.bandwidth

    def computed(self):
        """Never run."""


@pytest.mark.parametrize("rest", [0.0, 0.1, 0.3])
def test_a_link_is_chosen_on_which_messages_take_the_part_of_the_computation_that_is_asked_for(rest):
    def rank(comm):
        step = Rehearsal(comm, size=50_000_000, compute=1.0, rest=rest)
        text = step.choose_link(0.5, shared=True)
        assert step.slowest(step.messages) == pytest.approx(0.5, rel=NEAR)
        assert comm.link == parse_link(text, shared=True)
        return text, step.tried

    found = VirtualWorld(2).run(rank)
    assert found[0] == found[1], "the same on every rank"
    if rest == 0:
        assert found[0] == ("100MB/s,50us", TIMES + 1), "the first guess is right, and not tried again"


def test_a_link_is_chosen_even_where_messages_take_too_long_without_one():
    comm = VirtualWorld(1).communicators[0]
    assert Rehearsal(comm, size=1000, compute=1.0, rest=3.0).choose_link(0.5, shared=False) == "20kB/s,50us"


def test_without_messages_no_link_is_chosen():
    comm = VirtualWorld(1).communicators[0]
    assert Rehearsal(comm, size=0, compute=1.0, rest=0.0).choose_link(0.5, shared=False) is None
    assert comm.link is None


@pytest.mark.parametrize("schedule", ["tsp", "tp+sp"])
def test_the_command_writes_both_parts_and_on_virtual_ranks_says_why_there_is_no_figure(schedule, tmp_path, capsys):
    path = tmp_path / "overlap.json"
    arguments = ["--preset", "tiny", "--set", "num_layers=1", "--json", str(path)]
    assert main(["overlap", "--ranks", "2", "--schedule", schedule, *arguments]) == 0
    rows = json.loads(path.read_text())
    assert [row["part"] for row in rows] == ["forward", "forward+backward"]
    for row in rows:
        assert set(row) == FIELDS and min(row[name] for name in SECONDS) > 0
        assert row["hidden_fraction"] is None and row["verdict"] == "virtual ranks take turns"
        assert row["rounds"] == 1 and row["link"] == "none"
    said = " ".join(capsys.readouterr().out.split())
    assert "forward+backward" in said and "run mpirun -n 2 python -m tsp_ref overlap" in said


def test_one_rank_has_no_figure(capsys, tmp_path):
    path = tmp_path / "overlap.json"
    assert main(["overlap", "--preset", "tiny", "--set", "num_layers=1", "--json", str(path)]) == 0
    assert [row["verdict"] for row in json.loads(path.read_text())] == ["no messages"] * 2
    assert "One rank sends no messages" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "message"), [
    (["--schedule", "single"], "--schedule single sends no messages: use one of tp, sp, tp+sp, fsdp+sp, tsp"),
    (["--link", "fast"], "--link fast is not a link"),
    (["--ratio", "0"], "--ratio 0 is not valid: use a number from 0.01 to 100"),
    (["--ratio", "nan"], "--ratio nan is not valid: use a number from 0.01 to 100"),
    (["--ratio", "1", "--link", "1MB/s"], "--ratio 1 chooses a link, and --link 1MB/s names one: use one of the two"),
    (["--steps", "3"], "--steps 3 is not for overlap, which times one step in rounds: use --repeats"),
    (["--progress", "magic"], "--progress magic is unknown: use one of wait, poll, thread"),
    (["--repeats", "0"], "--repeats 0 is not valid: use 1 or more"),
    (["--json", "/no/such/folder/file"], "--json /no/such/folder/file cannot be written"),
])
def test_what_cannot_be_timed_is_refused(arguments, message, capsys):
    assert main(["overlap", "--ranks", "2", "--preset", "tiny", *arguments]) == 2
    assert message in capsys.readouterr().err
