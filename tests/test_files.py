"""Files that commands write: nothing that lies at a path is replaced but a file, and nothing is lost to a failure."""

import errno
import itertools
import json
import os
import stat
import subprocess
import sys
import threading

import pytest

from tsp_ref.cli import main
from tsp_ref.commands.files import LineFile, WholeFile, require_different
from tsp_ref.errors import UserError
from tsp_ref.process import arithmetic
from tsp_ref.training.data import Text

TRAIN = ["train", "--preset", "tiny", "--steps", "1", "--text", __file__, "--set", "num_layers=1", "hidden_size=32",
         "ffn_size=48"]
PICTURES = ("--svg", "--trace")


def refusal(action):
    with pytest.raises(UserError) as caught:
        action()
    return str(caught.value)


def refused(capsys, *arguments):
    """The one line with which the command line ends."""
    assert main([*TRAIN, *map(str, arguments)]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and errors.count("\n") == 1, errors
    return errors


def mode(path):
    return stat.S_IMODE(path.lstat().st_mode)


def read_in_background(path, into):
    """Read a pipe or a terminal to its end, as another program would."""

    def read():
        with open(path, "rb", buffering=0) as file:
            while part := file.read(65536):
                into.append(part)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    return reader


@pytest.mark.parametrize("option", PICTURES)
def test_a_pipe_is_written_to_and_stays_a_pipe(option, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    parts = []
    reader = read_in_background(pipe, parts)
    assert main([*TRAIN, option, str(pipe)]) == 0
    reader.join(20)
    assert stat.S_ISFIFO(pipe.lstat().st_mode) and list(tmp_path.iterdir()) == [pipe]
    assert b"".join(parts).strip().startswith(b"<svg" if option == "--svg" else b"{")


def test_a_log_goes_to_a_pipe_line_by_line(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    parts = []
    reader = read_in_background(pipe, parts)
    assert main([*TRAIN, "--log", str(pipe)]) == 0
    reader.join(20)
    records = [json.loads(line) for line in b"".join(parts).splitlines()]
    assert len(records) == 3 and records[1]["step"] == 1


@pytest.mark.parametrize("option", [*PICTURES, "--log"])
def test_a_pipe_that_nobody_reads_is_refused_and_not_waited_for(option, capsys, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert f"{option} {pipe} cannot be written: nobody reads this pipe" in refused(capsys, option, pipe)


@pytest.mark.parametrize("option", PICTURES)
def test_a_terminal_is_written_to_as_it_is(option):
    ours, terminal = os.openpty()
    path, parts = os.ttyname(terminal), []

    def read():
        while b"</svg>" not in b"".join(parts) and b"]}" not in b"".join(parts)[-4:]:
            parts.append(os.read(ours, 65536))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    file = WholeFile(option, path)
    file.write("<svg></svg>" if option == "--svg" else '{"traceEvents": []}')
    reader.join(20)
    assert not reader.is_alive() and stat.S_ISCHR(os.stat(path).st_mode)
    os.close(terminal)
    os.close(ours)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root makes a device of its own")
@pytest.mark.parametrize("option", [*PICTURES, "--log"])
def test_a_device_is_written_to_and_stays_a_device(option, tmp_path):
    device = tmp_path / "null"
    try:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        device.write_bytes(b"")
    except OSError as error:
        pytest.skip(f"no devices in this folder: {error}")
    assert main([*TRAIN, option, str(device)]) == 0
    assert stat.S_ISCHR(device.lstat().st_mode) and list(tmp_path.iterdir()) == [device]


@pytest.mark.parametrize("there", [True, False])
def test_a_link_goes_on_pointing_and_its_target_gets_the_content(there, tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    if there:
        real.write_text("earlier")
    link.symlink_to("real")
    WholeFile("--svg", str(link)).write("new")
    assert link.is_symlink() and not real.is_symlink() and real.read_text() == "new"


def test_links_that_go_round_in_a_circle_are_refused(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.symlink_to(other)
    other.symlink_to(one)
    for make in (WholeFile, LineFile):
        assert "cannot be written: Too many levels of symbolic links" in refusal(lambda make=make: make("-x", str(one)))


def test_a_file_that_is_there_keeps_its_mode_and_a_new_one_has_the_user_s(tmp_path):
    real, new = tmp_path / "real", tmp_path / "new"
    real.touch(mode=0o600)
    before = os.umask(0o027)
    try:
        for path in (real, new):
            WholeFile("--svg", str(path)).write("x")
    finally:
        os.umask(before)
    assert (mode(real), mode(new)) == (0o600, 0o640)


def test_a_file_that_may_not_be_written_is_not_replaced(tmp_path, monkeypatch):
    path = tmp_path / "mine"
    path.write_text("mine")
    path.chmod(0o400)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as root is never told
    assert refusal(lambda: WholeFile("--svg", str(path))).endswith("cannot be written: Permission denied")
    assert path.read_text() == "mine" and list(tmp_path.iterdir()) == [path]


def test_no_neighbour_of_a_file_is_touched(tmp_path):
    names = ("x.svg.part", "x.svg.tmp", ".x.svg.part", "x.svg~")
    for name in names:
        (tmp_path / name).write_text("mine")
    WholeFile("--svg", str(tmp_path / "x.svg")).write("new")
    assert {path.name for path in tmp_path.iterdir()} == {*names, "x.svg"}
    assert {(tmp_path / name).read_text() for name in names} == {"mine"}


def disk_is_full(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("ranks", ["1", "3"])
@pytest.mark.parametrize("option", PICTURES)
def test_a_picture_on_a_full_disk_is_one_line_and_what_was_there_stays(option, ranks, capsys, tmp_path, monkeypatch):
    path = tmp_path / "picture"
    path.write_text("earlier")
    whole = WholeFile.write

    def write(file, text):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", disk_is_full)
            whole(file, text)

    monkeypatch.setattr(WholeFile, "write", write)
    assert f"{option} {path} cannot be written: No space left" in refused(capsys, "--ranks", ranks, option, path)
    assert path.read_text() == "earlier" and list(tmp_path.iterdir()) == [path]


def test_a_comparison_on_a_full_disk_is_one_line_and_what_was_there_stays(capsys, tmp_path, monkeypatch):
    path = tmp_path / "rows"
    path.write_text("earlier")
    monkeypatch.setattr(WholeFile, "__init__", lambda file, option, path: file.__dict__.update(
        option=option, path=path, _stream=None))
    monkeypatch.setattr(os, "fsync", disk_is_full)
    assert main(["compare", *TRAIN[1:], "--ranks", "2", "--json", str(path)]) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and f"--json {path} cannot be written: No space left" in errors
    assert path.read_text() == "earlier" and list(tmp_path.iterdir()) == [path]


FULL_DISK = """
import os, sys, subprocess
from tsp_ref.cli import main
path = sys.argv[1]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", path], check=True)
try:
    with open(os.path.join(path, "file"), "w") as file:
        file.write('{"mine": 1}\\n')
    with open(os.path.join(path, "filler"), "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    code = main(sys.argv[2:])
    assert code == 2, code
    with open(os.path.join(path, "file")) as file:
        kept = file.read()
    assert kept.startswith('{"mine": 1}\\n') and kept.endswith("\\n"), kept
    assert sorted(os.listdir(path)) == ["file", "filler"]
finally:
    subprocess.run(["umount", path])
"""


@pytest.mark.parametrize("option", [*PICTURES, "--log"])
def test_a_small_disk_that_is_full_is_one_line_and_what_was_there_stays(option, tmp_path):
    words = [sys.executable, "-c", FULL_DISK, str(tmp_path), *TRAIN, "--steps", "40", option, str(tmp_path / "file")]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=120)
    if "'mount'" in ended.stderr:
        pytest.skip("no disk can be mounted here")
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("\n") == 1 and f"{option} {tmp_path / 'file'} cannot be written: No space" in ended.stderr


@pytest.mark.parametrize("ranks", ["1", "3"])
def test_a_log_that_fills_its_disk_is_one_line_and_keeps_its_whole_lines(ranks, capsys, tmp_path, monkeypatch):
    log = tmp_path / "log"
    log.write_text('{"mine": 1}\n')
    whole = LineFile._write_whole

    class Filling:
        """A file on a disk that has room for the half of a line."""

        def __init__(self, file):
            self.file = file
            self.room = True

        def fileno(self):
            return self.file.fileno()

        def write(self, line):
            if not self.room:
                disk_is_full()
            self.room = False
            return self.file.write(line[: len(line) // 2])

    def write(file, line):
        whole(Filling(file) if b'"loss"' in line else file, line)

    monkeypatch.setattr(LineFile, "_write_whole", staticmethod(write))
    assert f"--log {log} cannot be written: No space left" in refused(capsys, "--ranks", ranks, "--log", log)
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert records[0] == {"mine": 1} and len(records) == 2 and "start" in records[1]


def test_a_log_says_on_how_many_ranks_and_under_which_schedule_it_was(tmp_path):
    log = tmp_path / "log"
    assert main([*TRAIN, "--ranks", "2", "--schedule", "sp", "--log", str(log)]) == 0
    start = json.loads(log.read_text().splitlines()[0])
    assert (start["ranks"], start["plan"]["schedule"]) == (2, "sp")


def test_a_request_that_is_refused_leaves_no_log_behind(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Text, "fingerprint", property(lambda text: str(next(numbers))))
    numbers = itertools.count()
    assert "rank 1 read another text" in refused(capsys, "--ranks", "2", "--log", tmp_path / "log")
    assert "cannot be written" in refused(capsys, "--log", tmp_path / "log", "--svg", tmp_path / "no" / "picture")
    monkeypatch.setattr(arithmetic, "differences", lambda comm: "BLAS: one on rank 0, another on rank 1")
    assert "not all ranks compute alike" in refused(capsys, "--log", tmp_path / "log", "--digest")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [("--trace", "--svg"), ("--log", "--svg"), ("--log", "--trace")])
@pytest.mark.parametrize("other", ["x", "./x", "inner/../x", "link", "hard"])
def test_two_options_are_not_given_one_file_by_whatever_name(options, other, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inner").mkdir()
    (tmp_path / "link").symlink_to("x")
    if other == "hard":
        (tmp_path / "x").write_text("mine")
        os.link("x", "hard")
    first, second = options
    said = refused(capsys, first, "x", second, other)
    assert f"{first} x and {second} {other} are one file: name two" in said
    assert (tmp_path / "x").exists() is (other == "hard")


def test_overlap_s_figures_and_picture_are_not_given_one_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["overlap", "--preset", "tiny", "--ranks", "2", "--json", "x", "--svg", "./x"]) == 2
    assert "--json x and --svg ./x are one file: name two" in capsys.readouterr().err


def test_a_device_may_be_named_twice():
    require_different({"--svg": os.devnull, "--trace": os.devnull, "--log": None}, [])


@pytest.mark.parametrize("command, option", [("train", "--svg"), ("train", "--trace"), ("train", "--log"),
                                             ("compare", "--json"), ("overlap", "--json"), ("overlap", "--svg")])
def test_a_text_that_is_read_is_not_written(command, option, tmp_path, capsys):
    book, link = tmp_path / "book", tmp_path / "link"
    book.write_bytes(b"word " * 200)
    link.symlink_to(book)
    assert main([command, "--preset", "tiny", "--ranks", "2", "--text", __file__, str(book), option, str(link)]) == 2
    assert capsys.readouterr().err == f"error: {option} {link} and --text {book} are one file: name two\n"
    assert book.read_bytes() == b"word " * 200


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="the system has no other name for an open file")
def test_the_file_that_output_goes_to_is_not_replaced(tmp_path):
    """By its name, or by the system's for it, where nothing could be made beside it."""
    out = tmp_path / "out"
    for name in (str(out), "/proc/self/fd/1"):
        with open(out, "w") as file:
            ended = subprocess.run([sys.executable, "-m", "tsp_ref", *TRAIN, "--svg", name], stdout=file,
                                   stderr=subprocess.PIPE, text=True, timeout=60)
        assert ended.returncode == 2 and out.read_text() == ""
        assert ended.stderr == f"error: --svg {name} cannot be written: it is the file that the program's output " \
                               "goes to\n"
