"""Every lesson runs, at several N, on real and on virtual ranks, and its checks hold; a wrong answer to one fails."""

import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import within
from answers import GPU, OVERLAP, RIGHT, RING, TRACE, WRONG, Answer
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


def test_there_are_nineteen_lessons_numbered_without_a_gap():
    assert [name[:2] for name in LESSONS] == [f"{number:02}" for number in range(1, 20)]


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
])
@pytest.mark.ranks(2)
def test_a_file_without_an_answer_is_refused_once(n, text, error, tmp_path):
    file = tmp_path / "answer.py"
    if text is not None:
        file.write_text(text)
    ended = mpirun(n, path_of(RING), "--answer", str(file))
    assert ended.code == 2 and ended.output == ""
    assert ended.errors.count(f"error: --answer {file} {error}") == 1


FAULTY = {
    "raises": (TRACE, "def waited_share(lane):\n    return 1 / 0", "line 2, in waited_share: ZeroDivisionError: "),
    "raises deep inside": (
        TRACE, "def f():\n    return {}[3]\ndef bandwidth(pair):\n    return f()", "line 2, in f: KeyError: 3"),
    "leaves": (TRACE, "import sys\ndef waited_share(lane):\n    sys.exit(0)", "line 3, in waited_share: SystemExit"),
    "asks": (TRACE, "def waited_share(lane):\n    return float(input())", "line 2, in waited_share: EOFError"),
    "of a wrong length": (OVERLAP, "\ndef by_turns(runs, repeats, seconds_of):\n    return [1.0]",
                          "line 2, by_turns, which returned a value of type list and length 1: after it the lesson "
                          "cannot go on: ValueError: not enough values"),
    "of a wrong type": (OVERLAP, "def by_turns(runs, repeats, seconds_of):\n    return 3",
                        "line 1, by_turns, which returned a value of type int: after it the lesson cannot go on: "),
    "fails when loaded": (RING, "x = 1\ny = 1 / 0", "line 2: ZeroDivisionError: division by zero"),
    "leaves when loaded": (RING, "import sys\nsys.exit(0)", "line 2: SystemExit: 0"),
    "asks when loaded": (RING, "input()", "line 1: EOFError"),
}


@pytest.mark.beside
@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("name", FAULTY)
def test_an_answer_that_goes_wrong_is_one_line_with_its_file_and_line(name, ranks):
    lesson, text, said = FAULTY[name]
    with tempfile.TemporaryDirectory() as folder:
        ended = within.script(*written(Answer(lesson, text), folder), "--ranks", str(ranks))
        assert ended.code == 1 and ended.errors.startswith(f"error: --answer {folder}/answer.py, {said}"), ended.errors
    assert ended.errors.count("\n") == 1


@pytest.mark.parametrize("name", ["raises", "leaves", "leaves when loaded"])
@pytest.mark.ranks(2)
def test_on_real_ranks_it_is_one_line_of_all_of_them(n, name, tmp_path):
    lesson, text, said = FAULTY[name]
    ended = mpirun(n, *written(Answer(lesson, text), tmp_path))
    assert ended.code == 1 and "Traceback" not in ended.errors
    assert ended.errors.count("error: ") == ended.errors.count(f"--answer {tmp_path}/answer.py, {said}") == 1


ENDLESS = {
    "in the lesson": ("def overlapped(comm, own, spare, multiply):\n    while True: own + 1",
                      "line 2, in overlapped: no end"),
    "when loaded": ("while True: pass", "line 1: no end"),
}


@pytest.mark.parametrize("name", ENDLESS)
@pytest.mark.ranks(2)
def test_an_answer_that_never_ends_is_ended_when_its_time_is_over(n, name, tmp_path):
    text, said = ENDLESS[name]
    ended = mpirun(n, *written(Answer(RING, text), tmp_path), "--limit", "2")
    assert ended.code == 1 and "Traceback" not in ended.errors
    assert ended.errors.count("error: ") == ended.errors.count(f"{said} after 2 s (--limit sets how many seconds") == 1


def test_so_it_is_on_virtual_ranks_of_which_the_one_is_named_that_has_its_turn(tmp_path):
    text = ("def send(comm, staged, pinned, dest):\n    pass\n"
            "def stage_in(comm, stream, message, pinned, array):\n    import time\n    time.sleep(1e9)")
    ended = subprocess.run([sys.executable, *written(Answer(GPU, text), tmp_path), "--ranks", "2", "--limit", "2"],
                           cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert f"error: --answer {tmp_path}/answer.py, line 5, in stage_in: no end after 2 s" in ended.stderr


@pytest.mark.ranks(4)
def test_a_lesson_s_wrong_option_is_refused_once(n):
    ended = mpirun(n, path_of(LESSONS[0]), "--bogus")
    lines = [line for line in ended.errors.splitlines() if "usage" in line or "error: " in line]
    assert ended.code == 2 and lines == ["error: unrecognized arguments: --bogus; see 01_ranks_and_messages.py --help"]


@pytest.mark.beside
@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("hole", ["waited_share(lane)", "longest_wait(lane)", "bandwidth(pair)",
                                  "hidden_seconds(lane, some)"])
@pytest.mark.parametrize("value", ["0", "'a'"])
def test_lesson_16_says_that_an_answer_which_returns_something_else_fails_and_goes_on(hole, value, ranks):
    with tempfile.TemporaryDirectory() as folder:
        answer = Answer(TRACE, f"def {hole}: return {value}")
        check_failed(within.script(*written(answer, folder), "--ranks", str(ranks)), (hole.partition("(")[0],))


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
