"""The timeline of a step: what is recorded, the ranks' clocks, and the pictures drawn from it."""

import json
import re
import threading
import time
from itertools import pairwise
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
from cases import case_config
from lanes import Recorded, check_all, check_own, read_trace, recorded_step, tiles

from tsp_ref.cli import main
from tsp_ref.comm import clocks, timeline
from tsp_ref.comm.clocks import recording
from tsp_ref.comm.link import Link
from tsp_ref.comm.timeline import Lane, Message, Span, Timeline, pairs
from tsp_ref.comm.virtual import VirtualWorld
from tsp_ref.pictures.axis import ticks
from tsp_ref.pictures.chart import chart
from tsp_ref.pictures.svg import svg
from tsp_ref.pictures.trace import trace
from tsp_ref.training.loop import Training
from tsp_ref.training.strategy import Plan

TINY = ["train", "--preset", "tiny", "--steps", "2", "--set", "num_layers=1", "hidden_size=32", "ffn_size=48"]
CONFIG = case_config("plain", "float32", num_layers=1)


def record(size: int, plan: Plan, seed: int | None = None, link: Link | None = None) -> list[Recorded]:
    """A step on virtual ranks."""

    def step(comm):
        comm.travel_by("poll", link)
        recorded = recorded_step(CONFIG, comm, plan)
        assert comm.timeline is None and comm.link is link
        return recorded

    return VirtualWorld(size, seed).run(step)


@pytest.fixture(scope="module")
def lanes() -> list[Lane]:
    """Of TSP on four virtual ranks."""
    return record(4, Plan("tsp"))[0].lanes


@pytest.mark.parametrize("plan", [Plan("tp"), Plan("sp"), Plan("tp+sp", "2x2"), Plan("fsdp+sp"), Plan("tsp"),
                                  Plan(recompute="full")],
                         ids=str)
@pytest.mark.parametrize("seed", [None, 1])
def test_spans_cover_the_step_and_messages_are_the_ledger_s(plan, seed):
    recorded = record(4, plan, seed)
    for each in recorded:
        check_own(each)
        assert any(span.message != timeline.NONE for span in each.own.spans)
    check_all(recorded[0].lanes)
    assert all(each.lanes == [] for each in recorded[1:])


def test_a_single_rank_computes_all_the_time():
    (recorded,) = record(1, Plan("tsp"))
    check_own(recorded)
    assert recorded.own.messages == [] and recorded.own.share("compute") == pytest.approx(1)


@pytest.mark.parametrize("stack", [None, 1, 3])
def test_every_tile_is_there_with_its_block_and_its_slot(stack):
    for each in record(2, Plan("tsp", stack=stack)):
        whole = {(block, slot) for block in range(CONFIG.blocks) for slot in each.grid.slots}
        for part in ("embedding", "attention", "mlp", "head"):
            for direction in ("forward", "backward"):
                assert tiles(each.own, part, direction) == whole, (part, direction)
        assert {span.sublayer for span in each.own.spans} >= {"optimizer", "loss", "gains"}


def test_only_one_virtual_rank_computes_at_a_time():
    """By the process's clock, which all of them have."""
    recorded = record(4, Plan("tsp"), seed=3)
    spans = sorted(span[:2] for each in recorded for span in each.own.spans if span.what == "compute")
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))


def test_a_message_takes_as_long_as_its_link_needs():
    bandwidth = 5e6
    lanes = record(2, Plan("tsp"), link=Link(bandwidth))[0].lanes
    check_all(lanes)
    for pair in pairs(lanes):
        assert pair.received.end - pair.received.begin >= pair.received.size / bandwidth


def test_clocks_that_differ_are_brought_to_one(monkeypatch):
    """Each virtual rank is a thread, and is given a clock of its own."""
    here = threading.local()
    clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() + getattr(here, "ahead", 0.0))
    monkeypatch.setattr(timeline, "time", clock)
    monkeypatch.setattr(clocks, "time", clock)

    def step(comm):
        here.ahead = 1000.0 * comm.rank
        return recorded_step(CONFIG, comm, Plan("tsp"))

    recorded = VirtualWorld(3).run(step)
    lanes = recorded[0].lanes
    check_all(lanes)
    assert recorded[2].begin - recorded[0].begin > 1000
    assert max(lane.spans[-1].end for lane in lanes) < 100
    assert lanes[0].clock_error == 0 < lanes[2].clock_error < 1


def test_a_message_noticed_twice_was_complete_the_first_time():
    """As when a second thread notices it, and then the one that waits; and an id may be given to a later message."""
    marks = Timeline(("mlp", "forward"))
    request = SimpleNamespace(verb="send", peer=1, tag=7, array=SimpleNamespace(nbytes=8))
    marks.post(request, ("mlp", "forward"))
    marks.complete(request)
    first = marks.marks[-1][1]
    marks.complete(request)
    marks.post(request, ("mlp", "backward"))
    marks.wait(time.perf_counter())
    marks.complete(request)
    marks.resume(request)
    marks.end()
    lane = marks.lane(0)
    assert [message.end for message in lane.messages] == [first, marks.marks[-3][1]]
    assert [(span.what, span.message) for span in lane.spans] == [("compute", -1), ("wait", 1), ("compute", -1)]


def test_nothing_is_recorded_where_nothing_is_asked_for(monkeypatch):
    def refuse(*_):
        raise AssertionError("a timeline, though none was asked for")

    monkeypatch.setattr(Timeline, "__init__", refuse)
    assert main([*TINY, "--ranks", "2"]) == 0
    with pytest.raises(AssertionError, match="a timeline"), recording(VirtualWorld(1).communicators[0]):
        pass


def test_it_is_the_last_step_that_is_recorded(monkeypatch):
    seen = []
    step = Training.step
    monkeypatch.setattr(Training, "step", lambda self: seen.append(self.comm.timeline is not None) or step(self))
    assert main([*TINY, "--steps", "3", "--timeline"]) == 0
    assert seen == [False, False, True]


def hand_made() -> list[Lane]:
    """Two ranks for 12 ms: rank 0 computes and sends, rank 1 waits for it, then computes."""
    sent = Message(0.003, 0.009, "send", 1, "MLP_WEIGHTS", 64, "mlp", "forward")
    received = Message(0.001, 0.009, "receive", 0, "MLP_WEIGHTS", 64, "mlp", "forward")
    return [
        Lane(0, [Span(0.0, 0.006, "compute", "mlp", "forward", 0, 0),
                 Span(0.006, 0.012, "compute", "attention", "backward")], [sent]),
        Lane(1, [Span(0.0, 0.003, "compute", "", ""), Span(0.003, 0.009, "wait", "mlp", "forward", message=0),
                 Span(0.009, 0.012, "compute", "mlp", "forward", 1, 2)], [received]),
    ]


def test_the_chart_is_to_scale():
    assert chart(hand_made(), 36).plain.splitlines()[:5] == [
        "rank 0 MMMMMMMMMMMMaaaaaaaaaaaa 100%",
        "                                  0%",
        "rank 1 ------            MMMMMM  50%",
        "             WWWWWWWWWWWW        50%",
        "       |0 ms               |10",
    ]
    overlapped = hand_made()
    overlapped[1].spans[1:2] = [Span(0.003, 0.009, "compute", "mlp", "forward")]
    assert chart(overlapped, 36).plain.splitlines()[3] == "             ~~~~~~~~~~~~         0%"


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_chart_fits_the_console_and_says_what_its_letters_mean(lanes, width):
    *rows, computes, waits = chart(lanes, width).plain.splitlines()
    assert len(rows) == 2 * len(lanes) + 1 and max(map(len, rows)) <= width
    assert [row[:7] for row in rows[:-1:2]] == [f"rank {lane.rank} " for lane in lanes]
    letters = set("".join(row[7:-5] for row in rows[:-1:2])) - {" "}
    assert all(f"{letter.upper()} " in computes for letter in letters) and "W waits" in waits


def test_marks_of_an_axis_are_round():
    assert ticks(12.0, 2) == [0, 10]
    assert ticks(0.5, 5) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert ticks(730.0, 10) == [0, 100, 200, 300, 400, 500, 600, 700]


def test_the_trace_is_of_the_documented_format_and_has_everything(lanes):
    events = read_trace(trace(lanes, "a step"))
    messages = sum(len(lane.messages) for lane in lanes)
    assert len(events["X"]) == sum(len(lane.spans) for lane in lanes)
    assert len(events["b"]) == messages == 2 * len(events["s"])
    assert sum(event["args"]["bytes"] for event in events["b"]) == sum(
        message.size for lane in lanes for message in lane.messages)
    assert {event["args"]["name"] for event in events["M"]} >= {"rank 0", "rank 3"}
    for one, following in pairwise(events["X"]):
        if one["tid"] == following["tid"]:  # without a gap, by whole nanoseconds too
            assert int(1000 * one["ts"]) + int(1000 * one["dur"]) == int(1000 * following["ts"])
    tile = next(event for event in events["X"] if event["name"].startswith("mlp backward, block"))
    assert tile["cat"] == "compute" and {"sublayer", "direction", "block", "slot", "tiles"} == set(tile["args"])


def test_a_stack_of_tiles_is_one_span_that_names_all_its_slots():
    marks = Timeline(("mlp", "forward"))
    for slot, tiles_ in ((4, 3), (7, 1)):
        marks.compute(("mlp", "forward"), 2, slot, tiles_)
    marks.end()
    lane = marks.lane(0)
    assert [(span.block, span.slot, span.tiles) for span in lane.spans[-2:]] == [(2, 4, 3), (2, 7, 1)]
    assert tiles(lane, "mlp", "forward") == {(2, slot) for slot in (4, 5, 6, 7)}
    names = [event["name"] for event in read_trace(trace([lane], "by hand"))["X"]]
    assert names[-2:] == ["mlp forward, block 2, slots 4-6", "mlp forward, block 2, slot 7"]


def test_an_arrow_leads_from_the_post_to_the_arrival():
    events = read_trace(trace(hand_made(), "by hand"))
    (start,), (end,) = events["s"], events["f"]
    assert (start["ts"], start["pid"], end["ts"], end["pid"], end["bp"]) == (3000, 1, 9000, 2, "e")
    assert [event["name"] for event in events["X"]][3] == "wait: receive MLP_WEIGHTS from rank 0"


def without(event, *keys):
    return {key: value for key, value in event.items() if key not in keys}


@pytest.mark.parametrize("kind, spoil", [
    ("X", lambda event: without(event, "dur")),
    ("X", lambda event: event | {"ts": -1}),
    ("X", lambda event: event | {"dur": "3"}),
    ("X", lambda event: event | {"dur": event["dur"] + 4000}),
    ("b", lambda event: event | {"id": "0xffff"}),
    ("s", lambda event: event | {"id": "0xffff"}),
    ("f", lambda event: event | {"ts": 99999}),
    ("f", lambda event: event | {"bp": "n"}),
    ("M", lambda event: event | {"args": {"name": ""}}),
    ("M", lambda event: event | {"tid": 9}),
])
def test_the_reader_of_traces_refuses_what_is_not_of_the_format(kind, spoil):
    whole = json.loads(trace(hand_made(), "by hand"))
    place = next(index for index, event in enumerate(whole["traceEvents"]) if event["ph"] == kind)
    whole["traceEvents"][place] = spoil(whole["traceEvents"][place])
    with pytest.raises((AssertionError, KeyError)):
        read_trace(json.dumps(whole))


def test_the_svg_is_whole_and_needs_nothing_else(lanes):
    text = svg(lanes, "a step of <tsp>")
    root = ElementTree.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{space}svg" and root.findtext(f"{space}title") == "a step of <tsp>"
    groups = {group.get("id"): group for group in root.iter(f"{space}g")}
    assert list(groups) == [f"rank{lane.rank}" for lane in lanes]
    for lane in lanes:
        titles = {title.text for title in groups[f"rank{lane.rank}"].iter(f"{space}title")}
        assert {"attention forward", "mlp backward", "waits", "messages in flight to this rank"} <= titles
    assert not re.search(r"href|url\(|script|<image|font-face|@import", text)


def test_the_svg_is_to_scale():
    text = svg(hand_made(), "by hand")
    numbers = {title: [float(number) for number in re.findall(r"[Mhv-]?([\d.]+)", path)]
               for path, title in re.findall(r'<path d="([^"]*)"[^>]*><title>([^<]*)</title>', text)}
    assert numbers["waits"][0] == 70 + 820 / 4 and numbers["waits"][2] == 820 / 2  # begins at 3 of 12 ms, takes 6
    assert "rank 1" in text and "waits 50%" in text and ">10</text>" in text and ">ms</text>" in text


def test_all_pictures_together_change_no_bit(capsys, tmp_path):
    assert main([*TINY, "--digest", "--schedule", "single"]) == 0
    wanted = capsys.readouterr().out.splitlines()[-1]
    files = {"--trace": tmp_path / "step.json", "--svg": tmp_path / "step.svg"}
    files["--svg"].write_text("earlier")
    pictures = ["--timeline", *(str(word) for option in files.items() for word in option)]
    assert main([*TINY, "--digest", "--ranks", "3", *pictures]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == wanted
    title = re.compile(r"step 2 of tsp on 3 ranks: [\d.]+ ms; the ranks' clocks are compared to within \d+ µs")
    assert sum(title.fullmatch(line) is not None for line in lines) == 1
    assert sum(re.match(r"rank \d .* +\d+%$", line) is not None for line in lines) == 3
    read_trace(files["--trace"].read_text())
    assert ElementTree.fromstring(files["--svg"].read_text()) is not None
    assert sorted(tmp_path.iterdir()) == sorted(files.values())


def test_a_forward_and_backward_is_drawn_by_overlap(capsys, tmp_path):
    path = tmp_path / "both.json"
    assert main(["overlap", "--ranks", "2", "--repeats", "1", *TINY[1:3], *TINY[5:], "--timeline", "--trace",
                 str(path)]) == 0
    assert "forward and backward of tsp on 2 ranks" in capsys.readouterr().out
    events = read_trace(path.read_text())
    assert not any(event["args"]["sublayer"] == "optimizer" for event in events["X"])


@pytest.mark.parametrize("arguments, message", [
    (["--trace", "no/such/a.json"], "--trace no/such/a.json cannot be written: No such file or directory"),
    (["--svg", "."], "--svg . cannot be written: it is a folder"),
    (["--svg", ""], "argument --svg: an empty path names no file: give one, or leave the option out"),
    (["--svg", "same", "--trace", "same"], "--trace same and --svg same are one file: name two"),
    (["--trace", "fine.json", "--svg", "no/a.svg"], "--svg no/a.svg cannot be written: No such file or directory"),
    (["--timeline", "--schedule", "single"], "--timeline shows ranks and their messages, and --schedule single has"),
])
def test_a_picture_that_cannot_be_drawn_is_one_line_and_exit_code_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*TINY, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert message in captured.err and captured.out == "" and list(tmp_path.iterdir()) == []
