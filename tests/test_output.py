"""What is printed reaches its reader in whatever encoding, or ends the program with one line and no traceback."""

import ast
import contextlib
import io
import os
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from tsp_ref.cli import main
from tsp_ref.errors import UserError
from tsp_ref.process.jobs import ROOT
from tsp_ref.process.output import Output, careful_output

TINY = ["--preset", "tiny", "--steps", "1", "--ranks", "2", "--set", "num_layers=1", "hidden_size=32", "ffn_size=48"]
TEXT = ["--text", __file__]
FULL = "/dev/full"  # a device that any file option leaves as it is, and any write to fails


class Encoded(io.TextIOWrapper):
    """Standard output in some encoding, which raises where a character has none."""

    def __init__(self, encoding):
        super().__init__(io.BytesIO(), encoding=encoding, write_through=True)

    @property
    def text(self):
        return self.buffer.getvalue().decode(self.encoding)


def printed(encoding, run):
    """What a run prints that ends well."""
    with contextlib.redirect_stdout(Encoded(encoding)) as output:
        assert run() == 0
    return output.text


@pytest.mark.parametrize("command, encoding", [("train", "ascii"), ("train", "latin-1"), ("verify", "ascii"),
                                               ("compare", "ascii")])
def test_a_command_prints_plain_characters_where_the_terminal_has_no_others(command, encoding):
    more = ["--timeline"] if command == "train" else []
    text = printed(encoding, lambda: main([command, *TINY, *TEXT, *more]))
    assert text.isascii() or encoding == "latin-1"
    assert "\\u" not in text and "\\x" not in text and "?" not in text
    if command == "train":
        assert "clocks are compared to within" in text and "---" in text
        assert (" us\n" if encoding == "ascii" else " µs\n") in text


def test_a_terminal_that_has_them_gets_the_characters_themselves():
    text = printed("utf-8", lambda: main(["train", *TINY, *TEXT, "--timeline"]))
    assert "µs" in text and "───" in text


def lesson(number, *words):
    """A lesson as it is typed; its exit code."""
    (path,) = (ROOT / "lessons").glob(f"{number}_*.py")
    with (mock.patch.object(sys, "argv", [str(path), *words]),
          mock.patch.object(sys, "path", [str(path.parent), *sys.path]), pytest.raises(SystemExit) as ended):
        runpy.run_path(str(path), run_name="__main__")
    return ended.value.code


@pytest.mark.parametrize("words", [["--ranks", "1"], ["--help"]])
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_lesson_prints_plain_characters_where_the_terminal_has_no_others(encoding, words):
    text = printed(encoding, lambda: lesson("10", *words))
    assert "T x Sigma" in text and "Σ" not in text and "\\u" not in text


@pytest.mark.parametrize("words", [["--ranks", "2"], ["--help"]])
def test_an_output_that_nobody_reads_any_more_ends_a_lesson_with_one_line(words, capsys):
    with contextlib.redirect_stdout(Broken(0)):
        assert lesson("01", *words) == 2
    assert capsys.readouterr().err == "error: standard output cannot be written: Broken pipe\n"


@careful_output()
def say(text):
    """Print through what commands print through."""
    print(text)
    return 0


def test_every_character_of_the_program_s_own_has_a_plain_form():
    texts = [node.value for folder in ("tsp_ref", "lessons") for file in (ROOT / folder).rglob("*.py")
             for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant)
             and isinstance(node.value, str) and file.name != "output.py"]
    used = sorted({character for text in texts for character in text if not character.isascii()})
    assert {"Σ", "µ", "·"} <= set(used)
    assert "\\" not in printed("ascii", lambda: say("".join(used)))


def test_other_characters_and_bytes_are_spelled():
    assert printed("ascii", lambda: say("é … 漢")) == "\\xe9 ... \\u6f22\n"
    assert printed("utf-8", lambda: say("é caf\udce9")) == "é caf\\xe9\n"


def test_a_text_whose_path_is_not_utf_8_is_read_and_named(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")
    try:
        Path(path).write_bytes(b"word " * 200)
    except OSError as error:
        pytest.skip(f"no such names in this file system: {error}")
    text = printed("utf-8", lambda: main(["train", *TINY, "--text", path]))
    assert "caf\\xe9.txt" in text.replace("\n", "")


@pytest.mark.parametrize("option", ["--text", "--log", "--svg", "--trace"])
@pytest.mark.parametrize("ranks", ["1", "2"])
def test_a_path_that_is_not_utf_8_is_refused_in_one_line(option, ranks, capsys):
    path = "no/such/caf\udce9.txt"
    assert main(["train", *TINY, *(TEXT if option != "--text" else ()), "--ranks", ranks, option, path]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1 and f"{option} no/such/caf\\xe9.txt" in errors


def test_a_path_of_several_lines_is_refused_in_one(capsys):
    assert main(["train", *TINY, "--text", "a\nb\x1b[2J"]) == 2
    assert capsys.readouterr().err.startswith("error: --text a\\nb\\x1b[2J is neither a file nor a folder")


class Broken(io.StringIO):
    """A stream that takes some writes, and no more."""

    def __init__(self, takes):
        super().__init__()
        self.takes = takes

    def write(self, text):
        if self.takes == 0:
            raise BrokenPipeError(32, "Broken pipe")
        self.takes -= 1
        return super().write(text)


@pytest.mark.parametrize("command, takes", [("train", 0), ("train", 1), ("train", 5), ("verify", 1), ("compare", 5),
                                            ("messages", 0)])
def test_an_output_that_nobody_reads_any_more_ends_a_command_with_one_line(command, takes, capsys):
    steps = ["--preset", "tiny"] if command == "messages" else TINY
    with contextlib.redirect_stdout(Broken(takes)):
        assert main([command, *steps, *TEXT]) == 2
    assert capsys.readouterr().err == "error: standard output cannot be written: Broken pipe\n"


@pytest.mark.skipif(not os.path.exists(FULL), reason=f"there is no {FULL}")
@pytest.mark.parametrize("words", [["train", *TINY, *TEXT], ["--help"], ["train", "--help"]])
def test_an_output_that_is_full_ends_a_command_with_one_line(words, capsys):
    with open(FULL, "w") as full, contextlib.redirect_stdout(full):
        assert main(words) == 2
        print("and Python, when it ends, writes what is left without an error", flush=True)
    assert capsys.readouterr().err == "error: standard output cannot be written: No space left on device\n"


def test_errors_that_cannot_be_written_are_no_errors():
    with contextlib.redirect_stderr(Broken(0)):
        assert main(["train", "--bogus"]) == 2
    with contextlib.redirect_stderr(None):
        assert main(["train", "--bogus"]) == 2


@pytest.mark.parametrize("closing, code, said", [
    (">&-", 2, "error: standard output cannot be written: it is closed\n"), ("2>&-", 0, ""), (">&- 2>&-", 2, "")])
def test_a_program_started_with_closed_outputs_ends_without_a_traceback(closing, code, said, tmp_path):
    """And the log does not take their place."""
    log = tmp_path / "log"
    words = [sys.executable, "-m", "tsp_ref", "train", *TINY, *TEXT, "--log", str(log)]
    ended = subprocess.run(["sh", "-c", f'exec "$@" {closing}', "sh", *words], capture_output=True, text=True,
                           timeout=60)
    assert (ended.returncode, ended.stderr) == (code, said)
    assert all(line.startswith("{") for line in log.read_text().splitlines())


def test_a_stream_that_has_failed_is_not_tried_again():
    output = Output(Broken(1), "standard output")
    output.write("first")
    with pytest.raises(UserError, match="standard output cannot be written: Broken pipe"):
        output.write("second")
    output.write("third")
    output.flush()
    assert output.getvalue() == "first"
