"""The timeline on real ranks: everything recorded once, on one clock, whoever helps messages on."""

import re
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import within
from cases import case_config
from lanes import check_all, check_own, read_trace, recorded_step

from tsp_ref.comm.clocks import recording
from tsp_ref.comm.control import from_root
from tsp_ref.comm.link import Link
from tsp_ref.process.jobs import TEXT, mpirun
from tsp_ref.schedules.tags import Tag
from tsp_ref.training.strategy import Plan


@pytest.mark.parametrize("progress", ["wait", "poll", "thread"])
@pytest.mark.parametrize("schedule", ["tp", "sp", "tp+sp", "fsdp+sp", "tsp"])
@pytest.mark.ranks(2, 4)
def test_spans_cover_the_step_and_messages_are_the_ledger_s(comm, schedule, progress):
    comm.travel_by(progress, None)
    recorded = recorded_step(case_config("plain", "float32", num_layers=1), comm, Plan(schedule))
    comm.travel_by("wait", None)
    check_own(recorded)
    if comm.rank == 0:
        check_all(recorded.lanes)


@pytest.mark.ranks(2, 4)
def test_waits_and_completions_are_those_of_the_messages(comm):
    """Rank 0 sends when a fifth of a second is over; the others have waited for it that long."""
    comm.travel_by("poll", Link(1e9))
    from_root(comm, 0)
    array = np.zeros(1000)
    with recording(comm) as timeline:
        if comm.rank == 0:
            time.sleep(0.2)
            comm.Waitall([comm.Isend(array, peer, Tag.MLP_WEIGHTS) for peer in comm.others])
        else:
            comm.Wait(comm.Irecv(array, 0, Tag.MLP_WEIGHTS))
    lane = timeline.lane(comm.rank)
    assert [message.tag for message in lane.messages] == ["MLP_WEIGHTS"] * (comm.size - 1 if comm.rank == 0 else 1)
    if comm.rank:
        (wait,) = [span for span in lane.spans if span.what == "wait"]
        assert wait.end - wait.begin > 0.1 and wait.message == 0
        assert lane.share("wait") > 0.9
    else:
        assert lane.spans[0].what == "compute" and lane.spans[0].end - lane.spans[0].begin > 0.19


@pytest.mark.parametrize("progress", ["wait", "thread"])
@pytest.mark.ranks(2, 4)
def test_a_message_is_complete_when_somebody_notices(comm, progress):
    """While this thread sleeps, nobody does, or the second thread."""
    left, right = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
    comm.travel_by(progress, None)
    from_root(comm, 0)
    with recording(comm) as timeline:
        requests = [comm.Irecv(np.zeros(4), left, Tag.LOSS), comm.Isend(np.zeros(4), right, Tag.LOSS)]
        time.sleep(0.4)
        woken = time.perf_counter()
        comm.Waitall(requests)
    comm.travel_by("wait", None)
    received, sent = timeline.lane(comm.rank).messages
    assert (received.verb, sent.verb) == ("receive", "send")
    assert (received.end < woken) == (sent.end < woken) == (progress == "thread")


@pytest.mark.ranks(2, 4)
def test_train_draws_its_last_step_and_prints_the_same_digest(comm):
    command = ("train", "--preset", "tiny", "--steps", "2", "--digest", *TEXT)
    plain = within.command(*command)
    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / "step.json", Path(folder) / "step.svg"
        drawn = within.command(*command, "--timeline", "--trace", str(files[0]), "--svg", str(files[1]))
        assert plain.code == drawn.code == 0
        if comm.rank:
            return
        assert drawn.output.splitlines()[-1] == plain.output.splitlines()[-1]
        assert len(re.findall(r"^rank \d .* \d+%$", drawn.output, re.MULTILINE)) == comm.size
        assert len({event["pid"] for event in read_trace(files[0].read_text())["X"]}) == comm.size
        assert files[1].read_text().rstrip().endswith("</svg>")


@pytest.mark.ranks(2)
def test_a_file_that_cannot_be_written_is_refused_once(n):
    ended = mpirun(n, "-m", "tsp_ref", "train", "--preset", "tiny", *TEXT, "--trace", "/no/such/folder/a.json")
    assert ended.code == 2
    refusals = [line for line in ended.errors.splitlines() if line.startswith("error:")]  # a launcher may add its own
    assert refusals == ["error: on rank 0: --trace /no/such/folder/a.json cannot be written: No such file or directory"]
    assert ended.output == ""
