"""Every lesson runs, at several N, on real and on virtual ranks, and its checks hold; a wrong answer to one fails."""

import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import within
from answers import GPU, OVERLAP, RIGHT, RING, TRACE, WRONG
from lanes import read_trace
from strict import StrictCupy

from tsp_ref.process.jobs import ROOT, Ended, environment, mpirun

LESSONS = sorted(path.name for path in (ROOT / "lessons").glob("[0-9][0-9]_*.py"))
ABOUT_TIME = [OVERLAP, RING, TRACE]


def path_of(lesson):
    return str(Path("lessons") / lesson)


def check_held(ended):
    """A lesson ran to its end, and all of its checks hold."""
    assert ended.code == 0, ended.output + ended.errors
    assert ended.output.rstrip().endswith("This lesson's checks all hold.")
    assert "holds  " in ended.output and "FAILS" not in ended.output


def check_failed(ended, fails):
    """A lesson ran to its end, and of its checks those fail that begin so."""
    assert ended.code == 1, ended.output + ended.errors
    assert "This lesson fails: " in ended.output.splitlines()[-1], ended.output + ended.errors
    for begin in fails:
        assert f"FAILS  {begin}" in ended.output, ended.output
        assert f"holds  {begin}" not in ended.output


HEAVY = ["07_one_bit_pattern.py", "11_four_schedules.py", "12_where_the_memory_goes.py", "13_where_the_bytes_go.py"]


@pytest.mark.parametrize("lesson", [lesson for lesson in LESSONS if lesson not in ABOUT_TIME])
@pytest.mark.ranks(4)
def test_a_lesson_s_checks_hold(comm, lesson):
    """As `mpirun -n 4 python lessons/...`, but one job starts the processes for all lessons."""
    require_lesson_held(comm, lesson)


@pytest.mark.parametrize("lesson", [lesson for lesson in LESSONS if lesson not in [*ABOUT_TIME, *HEAVY]])
@pytest.mark.ranks(1, 2)
def test_a_lesson_s_checks_hold_without_neighbours_and_where_the_left_one_is_the_right_one(comm, lesson):
    """Where it matters: the heavy ones leave their messages to the schedules, which have their own tests there."""
    require_lesson_held(comm, lesson)


def require_lesson_held(comm, lesson):
    """A lesson called on every rank speaks on rank 0, and its checks hold."""
    ended = within.script(path_of(lesson))
    if comm.rank == 0:
        check_held(ended)
    else:
        assert (ended.code, ended.output) == (0, "")


@pytest.mark.parametrize("lesson", ABOUT_TIME)
@pytest.mark.ranks(1, 2, 4)
def test_the_checks_of_a_lesson_about_time_hold(n, lesson):
    """A process for each rank, which nothing else has slowed down or warmed up."""
    check_held(mpirun(n, path_of(lesson)))


@pytest.mark.ranks(8)
def test_so_they_do_where_ranks_share_cores(n):
    """As eight do on most machines. The others are as crowded by four on two cores."""
    check_held(mpirun(n, path_of(RING)))


@pytest.mark.beside
@pytest.mark.parametrize("lesson", LESSONS)
def test_a_lesson_s_checks_hold_on_virtual_ranks(lesson):
    check_held(within.script(path_of(lesson), "--ranks", "4", "--shuffle", "7"))


def test_a_lesson_runs_without_mpirun():
    ended = subprocess.run([sys.executable, path_of(LESSONS[0])], cwd=ROOT, env=environment(), capture_output=True,
                           text=True, timeout=120)
    check_held(Ended(ended.returncode, ended.stdout, ended.stderr, 0.0))


@pytest.mark.beside
def test_lesson_18_runs_on_a_strict_stand_in_for_a_gpu():
    """Stricter than CuPy, and not a GPU: what it computes is NumPy's."""
    with mock.patch.dict(sys.modules, cupy=StrictCupy()):
        ended = within.script(path_of(GPU), "--ranks", "2")
    check_held(ended)
    assert "On a GPU: CuPy 0 (a stand-in)" in ended.output and "No GPU" not in ended.output


def test_there_are_eighteen_lessons_numbered_without_a_gap():
    assert [name[:2] for name in LESSONS] == [f"{number:02}" for number in range(1, 19)]


FAILING = """
import sys
sys.path.insert(0, "lessons")
import stage
stage.run("A lesson.", lambda lesson: lesson.check("two is three on the last rank", lesson.rank < lesson.size - 1))
"""


@pytest.mark.ranks(1, 2, 4)
def test_a_lesson_whose_check_fails_on_one_rank_exits_with_1(n):
    ended = mpirun(n, "-c", FAILING)
    assert ended.code == 1
    assert f"FAILS  two is three on the last rank (on rank {n - 1})" in ended.output


def written(answer, folder):
    """Writes a reader's file, and returns the command line that has it judged."""
    file = Path(folder) / "answer.py"
    file.write_text(answer.text)
    return path_of(answer.lesson), "--answer", str(file)


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.ranks(2)
def test_a_right_answer_passes(n, name, tmp_path):
    check_held(mpirun(n, *written(RIGHT[name], tmp_path)))


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.ranks(2)
def test_a_wrong_answer_fails_the_checks_that_are_about_it(comm, name):
    """As `mpirun -n 2 python lessons/... --answer FILE`, but one job starts the two processes for all answers."""
    with tempfile.TemporaryDirectory() as folder:
        ended = within.script(*written(WRONG[name], folder))
    if comm.rank == 0:
        check_failed(ended, WRONG[name].fails)
    else:
        assert (ended.code, ended.output) == (1, "")


@pytest.mark.ranks(2)
def test_so_it_does_as_it_is_typed(n, tmp_path):
    check_failed(mpirun(n, *written(WRONG["15: one buffer"], tmp_path)), WRONG["15: one buffer"].fails)


@pytest.mark.beside
@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("name", ["14: means", "15: one buffer", "15: nobody looks", "16: a time counts twice",
                                  "17: nothing written", "18: sent at once", "18: nothing written"])
def test_so_it_does_on_virtual_ranks(name, ranks):
    with tempfile.TemporaryDirectory() as folder:
        ended = within.script(*written(WRONG[name], folder), "--ranks", str(ranks))
    check_failed(ended, WRONG[name].fails)


@pytest.mark.parametrize(("text", "error"), [
    (None, "cannot be read: No such file or directory"),
    ("def overlaped(): ...", "has no function overlapped: write one there"),
    ("def overlapped(:", "cannot be run: SyntaxError: invalid syntax"),
    ("1 / 0", "cannot be run: ZeroDivisionError: division by zero"),
])
@pytest.mark.ranks(2)
def test_a_file_without_an_answer_is_refused_once(n, text, error, tmp_path):
    file = tmp_path / "answer.py"
    if text is not None:
        file.write_text(text)
    ended = mpirun(n, path_of(RING), "--answer", str(file))
    assert ended.code == 2 and ended.output == ""
    assert ended.errors.count(f"error: --answer {file} {error}") == 1


@pytest.mark.ranks(1, 2)
def test_lesson_16_writes_a_trace_where_it_is_asked_to(n, tmp_path):
    file = tmp_path / "step.json"
    check_held(mpirun(n, path_of(TRACE), "--trace", str(file)))
    events = read_trace(file.read_text())
    assert len({event["pid"] for event in events["X"]}) == (4 if n == 1 else n) and events["s"] and events["f"]
    refused = mpirun(n, path_of(TRACE), "--trace", str(tmp_path))
    assert refused.code == 2
    refusals = [line for line in refused.errors.splitlines() if line.startswith("error:")]  # a launcher may add its own
    assert len(refusals) == 1 and refusals[0].endswith(f"--trace {tmp_path} cannot be written: it is a folder")
