"""The command line in one process: virtual ranks, logs, text, errors."""

import dataclasses
import itertools
import json
import platform
import re
from importlib import metadata

import numpy as np
import pytest

import tsp_ref
from tsp_ref.cli import main
from tsp_ref.comm import mpi
from tsp_ref.errors import UserError
from tsp_ref.model.config import make_config
from tsp_ref.training.data import Text

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


def test_a_second_text_is_read_as_well_as_a_second_setting_is_set(capsys, tmp_path):
    for name in "abc":
        (tmp_path / name).write_bytes(b"word " * 100)
    paths = [str(tmp_path / name) for name in "abc"]
    assert main(["train", "--preset", "tiny", "--steps", "1", "--text", paths[0], paths[1], "--text", paths[2],
                 "--set", "num_layers=1", "--set", "ffn_size=48"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert f"text: {', '.join(paths)}, 1,425 bytes to learn, 75 held out" in printed
    assert f"{make_config('tiny', num_layers=1, ffn_size=48).num_parameters:,} parameters" in printed


def test_without_a_command_the_help_is_printed(capsys):
    assert main([]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("usage: tsp-ref ") and "mpirun -n 4 python -m tsp_ref train" in captured.out
    assert captured.err == ""


def test_the_version_is_that_of_all_that_a_run_s_bits_depend_on(monkeypatch, capsys):
    monkeypatch.setattr(mpi, "version", lambda: "Some MPI 5")
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0
    assert lines[:3] == [f"tsp_ref {tsp_ref.__version__}", f"Python {platform.python_version()}",
                         f"NumPy {np.__version__}"]
    assert lines[3].startswith("BLAS: ") and lines[-1] == "MPI: Some MPI 5"


def test_the_version_says_where_there_is_no_mpi(monkeypatch, capsys):
    def missing():
        raise UserError("MPI cannot be loaded (No module named 'mpi4py')")

    monkeypatch.setattr(mpi, "version", missing)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert "MPI: none (MPI cannot be loaded (No module named 'mpi4py'))" in capsys.readouterr().out


@pytest.mark.parametrize("command, config", [
    ("train", make_config()), ("verify", make_config("tiny", steps=2)), ("compare", make_config("tiny", steps=2)),
    ("overlap", make_config("bench", ["blocks=4", "num_layers=2"])),
    ("messages", make_config("tiny", ["blocks=4", "tiles=8"]))])
def test_a_command_s_help_has_the_defaults_that_it_takes(command, config, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    fields = re.findall(r"^  (\w+) +(\S+) +\S", capsys.readouterr().out.partition("fields for --set")[2], re.MULTILINE)
    assert dict(fields) == {name: str(value) for name, value in dataclasses.asdict(config).items()}


@pytest.mark.parametrize("command", ["verify", "compare"])
def test_steps_that_are_set_as_a_field_are_done(command, capsys):
    assert main([command, "--ranks", "1", "--set", "steps=1", "--text", __file__]) == 0
    assert re.search(r"1 steps? of|, 1 step$", capsys.readouterr().out, re.MULTILINE)


def test_virtual_ranks_run_within_a_launcher_s_session_of_one_process(monkeypatch, capsys):
    monkeypatch.setenv("PMI_RANK", "0")
    monkeypatch.setenv("PMI_SIZE", "1")
    assert main(["verify", "--ranks", "2", "--steps", "1", "--text", __file__]) == 0
    assert "2 ranks against one process, 1 step" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["train", "verify", "compare", "overlap", "messages"])
def test_ranks_that_read_other_texts_are_told_so_by_every_command(command, capsys, monkeypatch):
    """As where each part of a job is given its own --text."""
    monkeypatch.setattr(Text, "fingerprint", property(lambda text: str(next(numbers))))
    numbers = itertools.count()
    assert main([command, "--preset", "tiny", "--ranks", "2", "--text", __file__]) == 2
    captured = capsys.readouterr()
    assert captured.err == (f"error: rank 1 read another text than rank 0 from {__file__}: give all machines the same "
                            "files with --text\n")


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
    tiny = TINY[: TINY.index("--text")]
    assert main([*tiny, "--text", str(folder), "--ranks", "2"]) == 0
    assert f"text: {folder}, 7,600 bytes to learn, 400 held out" in capsys.readouterr().out.replace("\n", " ")
    small = ["--set", "num_layers=1", "blocks=4", "tiles=4"]
    assert main([*tiny, *small, "--steps", "25", "--text", str(folder / "a.txt")]) == 0
    first, last = re.search(r"training loss ([\d.]+) -> ([\d.]+)", capsys.readouterr().out).groups()
    assert float(first) > 5 and float(last) < 1


@pytest.mark.parametrize("arguments, message", [
    (["train", "--text", __file__, ""], "argument --text: an empty path names no file"),
    *((["train", option, ""], f"argument {option}: an empty path names no file: give one, or leave the option out")
      for option in ("--log", "--svg", "--trace")),
    (["compare", "--json", ""], "argument --json: an empty path names no file"),
    (["overlap", "--json", ""], "argument --json: an empty path names no file"),
    *((["train", option, "a", option, "b"], f"argument {option}: it is given twice: give one file")
      for option in ("--log", "--svg", "--trace")),
    (["compare", "--json", "a", "--json", "b"], "argument --json: it is given twice: give one file"),
    (["messages", "--steps", "3"], "--steps 3 is not for messages, which prints one step: leave it out"),
    *((["train", "--ranks", ranks, "--shuffle", "-1"], "--shuffle -1 is not valid: use 0 or more") for ranks in "13"),
    (["train", "--ranks", "5", "--set", "blocks=4"],
     "ranks=5 is not possible: with blocks=4, not every rank would hold a weight block; use 1 to 4 ranks, or raise "
     "blocks with --set"),
    (["train", "--ranks", "9"],
     "ranks=9 is not possible: with blocks=8, not every rank would hold a weight block; use 1 to 8 ranks, or "
     "--schedule sp, which deals out no weights (blocks=8 is the most that num_kv_heads, "),
    (["train", "--ranks", "9", "--schedule", "fsdp+sp"],
     "use 1 to 8 ranks, or --schedule sp, which deals out no weights (blocks=8 is the most that num_kv_heads, "),
    (["train", "--ranks", "2", "--schedule", "tp", "--set", "num_heads=4", "num_kv_heads=1", "blocks=1"],
     "use 1 rank, or --schedule sp, which deals out no weights"),
    (["train", "--ranks", "8", "--schedule", "sp", "--set", "seq_len=4", "tiles=2"],
     "use 1 to 2 ranks, or --schedule tp, which deals out no tokens (tiles=4 is the most that seq_len can be"),
    (["verify", "--ranks", "2", "--set", "rope_theta=1e-300"],
     "rope_theta=1e-300 is not valid: the angles that positions are turned by would not be finite in float32"),
    (["messages", "--set", "rope_theta=1e300"], "rope_theta=1e+300 is not valid: the angles"),
    (["train", "--ranks", "3", "--schedule", "sp", "--set", "tiles=2"],
     "ranks=3 is not possible: with tiles=2, not every rank would hold a token tile; use 1 to 2 ranks, or raise tiles"),
    (["train", "--ranks", "0"], "--ranks 0 is not valid: use 1 to 64 virtual ranks; more are for mpirun"),
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
