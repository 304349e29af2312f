"""The command `messages`: the record of a rank's step, told by sub-layer and layer, and printed."""

import re
from collections import Counter
from dataclasses import replace
from enum import IntEnum

import numpy as np
import pytest
from cases import case_config, random_text

from tsp_ref.cli import main
from tsp_ref.comm.communicator import Communicator, Event
from tsp_ref.comm.virtual import VirtualWorld
from tsp_ref.commands.messages import PARTS
from tsp_ref.pictures.score import lines_of, ranges, score, totals, visits
from tsp_ref.training.loop import Training
from tsp_ref.training.strategy import Plan

CONFIG = case_config("plain", "float32", num_layers=2, blocks=4)
SCHEDULES = ["tp", "sp", "tp+sp", "fsdp+sp", "tsp"]
PHASES = [(part, direction) for part, directions in PARTS.items() for direction in directions]
PLANS = [Plan(schedule, recompute=recompute) for schedule in SCHEDULES for recompute in ("none", "attention", "full")]


def recorded(plan, ranks=4, config=CONFIG):
    """(lines, script, ledger, grid) of every rank, of one step."""
    def rank(comm):
        training = Training(config, comm, plan, random_text(), np)
        comm.script = script = []
        training.step()
        comm.script = None
        return lines_of(script, config.num_layers), script, comm.ledger, training.model.grid

    return VirtualWorld(ranks).run(rank)


def check_totals(plan, ranks=4):
    """What was posted for each sub-layer is what the ledger has for its phase, and every layer has as much."""
    for lines, _, ledger, _ in recorded(plan, ranks):
        for part, direction in PHASES:
            of_phase = [line for line in lines if line.of.phase == (part, direction)]
            assert totals(of_phase) == {verb: ledger.sums(verb, sublayer=part, direction=direction)
                                        for verb in ("send", "receive")}, (part, direction)
            layers = [totals([line for line in of_phase if line.of.layer == layer]) for layer in (0, 1)]
            assert part not in ("attention", "mlp") or layers[0] == layers[1], (part, direction)
        assert totals(lines) == {verb: ledger.sums(verb) for verb in ("send", "receive")}


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan} {plan.recompute}")
def test_what_is_posted_for_a_sub_layer_is_the_ledger_s_and_the_same_in_every_layer(plan):
    check_totals(plan)


def test_a_number_of_ranks_that_divides_nothing_is_told_right_too():
    check_totals(Plan("tsp"), 3)


def without(tag):
    """A communicator's way to post, which leaves a tag's first message out of the record."""
    whole = Communicator._post

    def post(comm, request):
        posted = whole(comm, request)
        if comm.script and getattr(request.tag, "name", "") == tag and not hasattr(comm, "left_out"):
            comm.left_out = comm.script.pop()
        return posted

    return post


@pytest.mark.parametrize("tag", ["MLP_WEIGHTS", "KEYS_VALUES_GRADIENTS", "LOSS", "GRADIENT_NORM"])
def test_a_post_that_is_missing_from_the_record_is_noticed(tag, monkeypatch):
    monkeypatch.setattr(Communicator, "_post", without(tag))
    with pytest.raises(AssertionError):
        check_totals(Plan("tsp"))


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan} {plan.recompute}")
def test_every_block_meets_every_slot_of_the_rank_in_each_layer_and_attention_s_twice(plan):
    for lines, _, _, grid in recorded(plan):
        met = Counter((line.here.phase, line.here.layer, line.here.recomputed, line.block, slot)
                      for line in lines if line.what == "compute" for slot in line.members)
        recomputed = {"none": (), "attention": ("attention",), "full": ("attention", "mlp")}[plan.recompute]
        sublayers = [(*phase, False) for phase in PHASES if phase[0] not in ("loss", "gains", "optimizer")]
        sublayers += [(part, "backward", True) for part in recomputed]
        assert met == Counter({
            ((part, direction), layer, again, block, slot): 2 if part == "attention" else 1
            for part, direction, again in sublayers for layer in ((0, 1) if part in ("attention", "mlp") else (None,))
            for block in blocks_at_hand(plan, grid) for slot in grid.slots})


def blocks_at_hand(plan, grid):
    """The blocks that a rank's tiles meet there: its own where weights are dealt and stay, else all."""
    return grid.blocks if plan.schedule in ("tp", "tp+sp") else range(CONFIG.blocks)


def test_a_forward_goes_up_the_layers_and_a_backward_down():
    for _, script, _, _ in recorded(Plan("tsp", recompute="attention"))[:1]:
        places = [str(visit) for visit in dict.fromkeys(visits(script, 2)) if visit.sublayer not in ("", "model")]
    assert places == [
        "embedding forward", "attention forward, layer 0", "mlp forward, layer 0", "attention forward, layer 1",
        "mlp forward, layer 1", "head forward", "loss forward", "head backward",
        "attention backward, layer 1, its forward recomputed", "mlp backward, layer 1", "attention backward, layer 1",
        "attention backward, layer 0, its forward recomputed", "mlp backward, layer 0", "attention backward, layer 0",
        "embedding backward",
        "gains backward", *["optimizer backward"] * 2]


def test_a_message_is_waited_for_once_and_after_its_post():
    for lines, script, _, _ in recorded(Plan("tsp")):
        posted, waited = Counter(), Counter()
        for line in lines:
            (waited if line.what == "wait" else posted)[line.verb, line.tag, line.of] += len(line.members)
            assert waited[line.verb, line.tag, line.of] <= posted[line.verb, line.tag, line.of]
        assert waited and script


def test_weights_of_the_ring_are_posted_and_here_before_they_are_computed_with():
    for rank, (lines, _, _, grid) in enumerate(recorded(Plan("tsp"))):
        received = 0
        for line in lines:
            if (line.of.phase, line.of.layer) != (("mlp", "forward"), 0):
                continue
            if line.what == "Irecv":
                assert line.members == [(rank - 1) % 4]
                received += 1
            if line.what == "compute" and line.block not in grid.blocks:
                assert received >= (rank - line.block) % 4  # in the order in which they come round
        assert received == 3


def test_what_is_posted_for_another_sub_layer_is_marked_with_its_name():
    (lines, _, _, _), *_ = recorded(Plan("tsp"))
    text = score(lines, lambda visit: visit.phase[0] == "attention" and visit.layer == 1, 120)
    assert any(re.fullmatch(r"  Irecv .* MLP_WEIGHTS  for mlp 1", line) for line in text)
    assert "mlp forward, layer 0: what is of the sub-layers asked for" in text
    after = text[text.index("mlp forward, layer 0: what is of the sub-layers asked for") + 1]
    assert after.endswith("ATTENTION_WEIGHTS  for attention 1")
    text = score(lines, lambda visit: visit.phase == ("mlp", "backward"), 120)
    assert any(re.fullmatch(r"  wait .* MLP_GRADIENTS  of mlp 1", line) for line in text)


def test_a_recomputed_forward_that_is_prefetched_under_a_backward_of_its_phase_is_told_from_it():
    weights = IntEnum("Tag", ["WEIGHTS"]).WEIGHTS
    attention, mlp = Event("enter", phase=("attention", "backward")), Event("enter", phase=("mlp", "backward"))
    between = Event("enter", phase=("model", "backward"))
    post = Event("post", 1, "send", 1, weights, 8, ("attention", "backward"), block=0)
    layer = [attention, post, between, mlp, between, attention, post]
    lines = lines_of([between, *layer, post, between, attention, between, mlp, between, attention, post], 2)
    assert [(line.here.layer, line.of.layer, line.of.recomputed) for line in lines] == [
        (1, 1, True), (1, 1, False), (1, 0, True), (0, 0, False)]


@pytest.mark.parametrize("width", [60, 80, 200])
@pytest.mark.parametrize("plan", [Plan("tsp"), Plan("sp"), Plan("tp+sp", recompute="full")], ids=str)
def test_a_narrow_score_says_all_that_a_wide_one_does(width, plan):
    (lines, _, _, _), *_ = recorded(plan, 8, case_config("plain", "float32", num_layers=1))
    wide = score(lines, lambda visit: True, 1000)
    narrow = score(lines, lambda visit: True, width)
    assert max(map(len, narrow)) <= width and " ".join(narrow).split() == " ".join(wide).split()


def by_hand(*events):
    """The score of some events in the forward of one layer's MLP."""
    script = [Event("enter", phase=("mlp", "forward")), *(replace(event, phase=("mlp", "forward")) for event in events)]
    return score(lines_of(script, 1), lambda visit: True, 80)[2:]


def test_a_block_is_named_where_the_message_says_it():
    assert by_hand(Event("post", 1, "receive", 0, 7, 12288, block=3), Event("post", 2, "send", 2, 7, 12288),
                   Event("wait", 1), Event("wait", 2), Event("wait", 2)) == [
        "  Irecv    block 3 from rank 0  12,288  7",
        "  Isend    to rank 2            12,288  7",
        "  wait     block 3 from rank 0          7",
        "  wait     to rank 2                    7"]


def test_a_message_keeps_its_block_from_the_call_to_the_record():
    def rank(comm):
        comm.script = script = []
        array = np.zeros(4)
        comm.Wait(comm.Isend(array, 1, 7, block=5) if comm.rank == 0 else comm.Irecv(array, 0, 7, block=5))
        comm.progress(2, 4, 3)
        return [(event.what, event.block, event.tiles) for event in script]

    assert VirtualWorld(2).run(rank) == [[("post", 5, 0), ("wait", None, 0), ("compute", 2, 3)]] * 2


def test_what_is_done_again_and_again_is_one_line():
    computed = [Event("compute", block=2, slot=slot, tiles=2) for slot in (4, 6)]
    posted = [Event("post", number, "send", number, 7, 100, block=1) for number in (3, 1, 2)]
    assert by_hand(*computed, computed[0], *posted, *(Event("wait", number) for number in (3, 1))) == [
        "  compute  block 2 with slots 4-7",
        "  compute  block 2 with slots 4-5",
        "  Isend    block 1 to ranks 1-3       3 x 100  7",
        "  wait     block 1 to ranks 1, 3   2 messages  7"]
    assert ranges([7, 0, 5, 6, 5]) == "0, 5-7"


SMALL = ["messages", "--text", __file__]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_command_ends_with_the_totals_of_the_ledger(schedule, capsys):
    _, _, ledger, _ = recorded(Plan(schedule), config=case_config(
        "plain", "float32", hidden_size=64, ffn_size=128, seq_len=64, blocks=4))[3]
    assert main([*SMALL, "--rank", "3", "--schedule", schedule, "--part", "mlp", "--direction", "backward"]) == 0
    printed = capsys.readouterr().out
    (sent, sent_bytes), (received, received_bytes) = (
        ledger.sums(verb, sublayer="mlp", direction="backward") for verb in ("send", "receive"))
    assert sent and printed.splitlines()[-1] == (
        f"posted for mlp, backward: {sent} Isend, {sent_bytes:,} bytes; {received} Irecv, {received_bytes:,} bytes")
    assert f"{schedule} on 4 ranks, 4 blocks, 8 tiles: what rank 3 posted" in printed
    assert "mlp backward, layer 1\n" in printed and "mlp backward, layer 0\n" in printed


def test_the_command_takes_a_model_s_sizes_and_a_mesh_as_the_others_do(capsys):
    assert main([*SMALL, "--ranks", "6", "--schedule", "tp+sp", "--mesh", "3x2", "--recompute", "full", "--layout",
                 "contiguous", "--set", "num_layers=1", "--layer", "0", "--shuffle", "1"]) == 0
    printed = capsys.readouterr().out
    assert "tp+sp 3x2 on 6 ranks, 8 blocks, 16 tiles: what rank 0" in printed
    assert "\nattention backward, layer 0, its forward recomputed\n" in printed and "\nhead" not in printed
    assert main([*SMALL, "--ranks", "1", "--part", "loss"]) == 0
    assert capsys.readouterr().out.endswith("posted for loss: 0 Isend, 0 bytes; 0 Irecv, 0 bytes\n")


@pytest.mark.parametrize(("arguments", "message"), [
    (["--rank", "4"], "--rank 4 is not one of this job's 4: use 0 to 3"),
    (["--rank", "-1"], "--rank -1 is not one of this job's 4: use 0 to 3"),
    (["--part", "attn"], "--part attn is unknown: use one of embedding, attention, mlp, head, loss, gains, optimizer"),
    (["--direction", "up"], "--direction up is unknown: use one of forward, backward"),
    (["--part", "loss", "--direction", "backward"], "--direction backward with --part loss is nothing: use forward"),
    (["--layer", "2"], "--layer 2 is not one of num_layers=2: use 0 to 1"),
    (["--layer", "0", "--part", "head"], "--layer 0 with --part head, which is in no layer: use one of attention, mlp"),
    (["--layer", "x"], "argument --layer: invalid int value: 'x'"),
    (["--schedule", "single"], "--schedule single sends no messages: use one of tp, sp, tp+sp, fsdp+sp, tsp"),
    (["--schedule", "ring"], "--schedule ring is unknown: use one of single, tp, sp, tp+sp, fsdp+sp, tsp"),
    (["--set", "blocks=3"], "num_kv_heads=8 is not a multiple of blocks=3"),
])
def test_what_no_step_has_is_refused_with_what_is_valid(arguments, message, capsys):
    assert main([*SMALL, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {message}") and captured.err.count("\n") == 1 and captured.out == ""
