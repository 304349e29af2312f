"""The command line in one process: virtual ranks, logs, text, errors."""

import json
import re
from importlib import metadata

import pytest

from tsp_ref.cli import main

TINY = ["train", "--preset", "tiny", "--steps", "3", "--text", __file__]


def digest(capsys, *arguments):
    """What `train --digest` prints last."""
    assert main([*TINY, "--steps", "2", "--digest", *arguments]) == 0
    return re.fullmatch(r"digest sha256:([0-9a-f]{64})", capsys.readouterr().out.rstrip().splitlines()[-1]).group(1)


def test_the_script_tsp_ref_is_this_command_line(capsys):
    (script,) = metadata.entry_points(group="console_scripts", name="tsp-ref")
    assert script.load() is main
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0 and "mpirun -n 4 python -m tsp_ref train" in capsys.readouterr().out


def test_virtual_ranks_in_any_order_print_the_single_process_s_digest(capsys):
    wanted = digest(capsys, "--schedule", "single")
    assert digest(capsys) == wanted
    assert digest(capsys, "--ranks", "4") == wanted
    assert digest(capsys, "--ranks", "8", "--shuffle", "5") == wanted
    assert digest(capsys, "--ranks", "6", "--schedule", "tp+sp", "--mesh", "2x3", "--recompute", "full") == wanted
    assert digest(capsys, "--seed", "1") != wanted


def test_verify_prints_a_verdict_for_each_tensor(capsys):
    assert main(["verify", "--ranks", "3", "--steps", "1", "--text", __file__]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "EQUAL, every bit: 86 tensors, 3 ranks against one process, 1 step"
    assert sum(line.startswith("equal ") for line in lines) == 86


def test_a_log_is_appended_to_and_never_overwritten(capsys, tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"mine": 1}\n')
    assert main([*TINY, "--log", str(log), "--ranks", "2"]) == 0
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert records[0] == {"mine": 1}
    assert records[1]["plan"] == {
        "schedule": "tsp", "mesh": None, "layout": "zigzag", "recompute": "none", "counted": False,
        "stack": None}
    assert records[1]["start"]["hidden_size"] == 64
    assert [record["step"] for record in records[2:5]] == [1, 2, 3]
    assert records[4]["loss"] < records[2]["loss"]
    assert set(records[5]) == {"validation_loss"}


def test_a_run_on_text_of_one_s_own_learns_it(capsys, tmp_path):
    folder = tmp_path / "[" / "bold]"  # what a path may hold is not a matter of style
    folder.mkdir(parents=True)
    (folder / "a.txt").write_bytes(b"abcd" * 2000)
    assert main([*TINY, "--text", str(folder), "--ranks", "2"]) == 0
    assert f"text: {folder}, 7,600 bytes to learn, 400 held out" in capsys.readouterr().out.replace("\n", " ")
    small = ["--set", "num_layers=1", "blocks=4", "tiles=4"]
    assert main([*TINY, *small, "--steps", "25", "--text", str(folder / "a.txt")]) == 0
    first, last = re.search(r"training loss ([\d.]+) -> ([\d.]+)", capsys.readouterr().out).groups()
    assert float(first) > 5 and float(last) < 1


@pytest.mark.parametrize("arguments, message", [
    ([], "the following arguments are required: train | verify"),
    (["train", "--ranks", "9"], "ranks=9 is not possible: with blocks=8, not every rank would hold a weight block; use "
                                "1 to 8 ranks, or raise blocks with --set"),
    (["train", "--ranks", "3", "--schedule", "sp", "--set", "tiles=2"],
     "ranks=3 is not possible: with tiles=2, not every rank would hold a token tile; use 1 to 2 ranks, or raise tiles"),
    (["train", "--ranks", "0"], "--ranks 0 is not valid: use 1 to 1024"),
    (["train", "--set", "hidden_size"], "--set hidden_size is not of the form field=value"),
    (["train", "--shuffle", "1", "--ranks", "20"], "ranks=20 is not possible"),
    (["train", "--schedule", "single", "--ranks", "2"], "--schedule single is one process"),
    (["train", "--stack", "0", "--ranks", "2"],
     "--stack 0 is not valid: use 1 or more tiles at a time, or leave it out"),
    (["verify", "--stack", "-2"], "--stack -2 is not valid: use 1 or more tiles at a time, or leave it out"),
    (["verify", "--set", "tied_head=maybe"], "tied_head=maybe is not valid: use true or false"),
    (["verify", "--set", "dtype=float8"], "dtype=float8 is not valid: use float32 or float64"),
])
def test_a_request_that_cannot_be_met_is_one_line_and_exit_code_2(arguments, message, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert message in captured.err
    assert captured.out == ""
