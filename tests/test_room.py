"""What does not fit memory is refused before anything of it is made, and what is counted for that is really held."""

from unittest import mock

import numpy as np
import pytest
from cases import random_text

from tsp_ref.cli import main
from tsp_ref.comm.virtual import VirtualWorld
from tsp_ref.model.config import make_config
from tsp_ref.process import room
from tsp_ref.training.loop import Training
from tsp_ref.training.strategy import Plan

TEXT = ["--text", __file__]
KEPT = make_config("tiny", steps=1, warmup_steps=0)
PLANS = [Plan("single"), Plan("tp"), Plan("sp"), Plan("tp+sp"), Plan("tp+sp", "3x1"), Plan("fsdp+sp"),
         Plan("tsp"), Plan("tsp", recompute="full", layout="contiguous")]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_what_is_counted_beforehand_is_what_a_rank_holds(plan):
    size = 1 if plan.schedule == "single" else 3

    def held(comm):
        training = Training(KEPT, comm, plan, random_text(), np)
        training.step()
        return training.model.memory.model_state_peak + training.kept_bytes

    counted = [room.need_of(KEPT, grid, plan).total for grid in room.grids(KEPT, plan, size)]
    assert counted == VirtualWorld(size).run(held)


@pytest.mark.parametrize("setting", ["hidden_size=1000000", "vocab_size=80000000000", "batch_size=1000000000",
                                     "num_layers=100000000", "ffn_size=80000000000"])
@pytest.mark.parametrize("command", [
    ["train"], ["train", "--schedule", "single"], ["train", "--ranks", "4", "--schedule", "sp"],
    ["train", "--ranks", "4", "--schedule", "tp+sp"], ["verify", "--ranks", "2", "--schedule", "tp"],
    ["compare", "--ranks", "2"], ["messages", "--ranks", "2"], ["overlap", "--ranks", "2"]], ids=" ".join)
def test_a_size_that_no_machine_has_room_for_is_one_line_and_exit_code_2_at_once(command, setting, capsys):
    with mock.patch.object(Training, "__init__", side_effect=AssertionError("something was made")):
        assert main([*command, "--preset", "tiny", "--set", setting, *TEXT]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert setting in captured.err and "takes at least" in captured.err and "of memory are available" in captured.err


def refusal(capsys, available, *words):
    """What is said where so many bytes are available; nothing where they suffice."""
    with mock.patch.object(room, "available_bytes", lambda: available):
        assert main([*words, "--preset", "tiny", "--steps", "1", *TEXT]) in (0, 2)
    return capsys.readouterr().err


def test_it_is_counted_for_all_ranks_of_a_machine_and_verify_s_single_process_on_top(capsys):
    state = room.need_of(KEPT, next(room.grids(KEPT, Plan("single"), 1)), Plan("single")).total
    words = ("--ranks", "4", "--schedule", "sp")
    all_ranks = sum(room.need_of(KEPT, grid, Plan("sp")).total for grid in room.grids(KEPT, Plan("sp"), 4))
    assert refusal(capsys, all_ranks, "train", *words) == ""
    said = refusal(capsys, all_ranks - 1, "train", *words)
    assert f"for each rank, {room.amount(all_ranks)} for the 4 of a machine" in said
    said = refusal(capsys, all_ranks + state - 1, "verify", *words)
    assert f"{room.amount(all_ranks + state)} for the 4 of a machine (with the single process on rank 0:" in said
    assert refusal(capsys, None, "train", *words) == ""


def system(folder, **files):
    """A machine's files, `__` for the slashes in their names."""
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


MACHINE = "MemTotal:  3000 kB\nMemFree: 1 kB\nMemAvailable:   2000 kB\nSwapFree:   100 kB\nHugePages_Free:  0\n"


def test_what_is_available_is_the_machine_s_or_less_by_a_control_group(tmp_path):
    assert room.available_bytes(tmp_path) is None
    machine = system(tmp_path, proc__meminfo=MACHINE)
    assert room.available_bytes(machine) == 2100 * 1024
    system(tmp_path, proc__self__cgroup="0::/jobs/mine\n")
    groups = tmp_path / "sys" / "fs" / "cgroup"
    for group, limit, used in (("jobs/mine", "max", "5000"), ("jobs", "1000000", "400000"), ("", "2000000", "1")):
        (groups / group).mkdir(parents=True, exist_ok=True)
        (groups / group / "memory.max").write_text(limit + "\n")
        (groups / group / "memory.current").write_text(used + "\n")
        (groups / group / "memory.stat").write_text("anon 1\ninactive_file 1000\n")
    assert room.available_bytes(machine) == 1000000 - 400000 + 1000 + 100 * 1024


def test_so_it_is_by_a_control_group_of_version_1_whose_path_a_container_does_not_have(tmp_path):
    machine = system(tmp_path, proc__meminfo=MACHINE, proc__self__cgroup="5:cpu:/x\n4:memory:/docker/abc\n")
    group = tmp_path / "sys" / "fs" / "cgroup" / "memory"
    group.mkdir(parents=True)
    for name, text in (("limit_in_bytes", "900000"), ("usage_in_bytes", "100000"), ("stat", "cache 5\n")):
        (group / f"memory.{name}").write_text(text)
    assert room.available_bytes(machine) == 800000 + 100 * 1024


def test_memory_that_runs_out_nevertheless_is_one_line(capsys):
    with mock.patch.object(Training, "step", side_effect=MemoryError("Unable to allocate 3.00 TiB")):
        assert main(["train", "--ranks", "2", "--preset", "tiny", *TEXT]) == 2
    assert capsys.readouterr().err == (
        "error: memory does not suffice (Unable to allocate 3.00 TiB): use smaller sizes, or more ranks\n")
