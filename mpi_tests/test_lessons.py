"""Every lesson runs, at several N, on real and on virtual ranks, and its checks hold."""

from pathlib import Path

import pytest
from launcher import ROOT, mpirun

LESSONS = sorted(path.name for path in (ROOT / "lessons").glob("[0-9][0-9]_*.py"))


@pytest.mark.parametrize("lesson", LESSONS)
@pytest.mark.ranks(1, 2, 4)
def test_a_lesson_s_checks_hold(n, lesson):
    ended = mpirun(n, str(Path("lessons") / lesson))
    assert ended.code == 0, ended.output + ended.errors
    assert ended.output.rstrip().endswith("This lesson's checks all hold.")
    assert "holds  " in ended.output and "FAILS" not in ended.output


def test_there_are_thirteen_lessons_numbered_without_a_gap():
    assert [name[:2] for name in LESSONS] == [f"{number:02}" for number in range(1, 14)]


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
