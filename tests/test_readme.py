"""What the README and the pages of docs/ say can be checked: code they quote, files they name, commands, tables."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from test_structure import ROOMS

from tsp_ref import cli
from tsp_ref.errors import UserError
from tsp_ref.grid.grid import Grid, folded
from tsp_ref.model.config import make_config
from tsp_ref.process.jobs import ROOT

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

# Where a file may lie that is named in passing, as `schedules/tsp.py`.
FOLDERS = (ROOT, ROOT / "docs", ROOT / "tsp_ref", ROOT / "lessons", ROOT / "benchmarks")


def between(text: str, marker: str) -> str:
    """What stands between <!-- marker --> and <!-- /marker -->."""
    return text.split(f"<!-- {marker} -->")[1].split(f"<!-- /{marker} -->")[0]


def code_lines(text: str) -> list[str]:
    """Lines of code without white space around them; not those that are empty, a fence, or `...`."""
    lines = [line.strip() for line in text.splitlines()]
    return [line for line in lines if line not in ("", "...") and not line.startswith("```")]


def not_in_order(quoted: list[str], source: list[str]) -> list[str]:
    """The first quoted line that the source does not have after those before it, if there is one."""
    rest = iter(source)
    return [line for line in quoted if line not in rest][:1]


def prose(text: str) -> str:
    """All but the blocks of code."""
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def links(text: str) -> list[str]:
    """The targets of all links and pictures that are files here."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(text))
    return [target for target in targets if not target.startswith(("http://", "https://"))]


def headings(text: str) -> set[str]:
    """The names by which a page's headings can be linked to."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page: Path, text: str) -> list[str]:
    """Links to files that do not exist, or to headings that their page does not have."""
    broken = []
    for target in links(text):
        name, _, heading = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists() or (heading and heading not in headings(file.read_text())):
            broken.append(target)
    return broken


def unknown_files(text: str) -> list[str]:
    """Files of source, pages and pictures that are named, outside of links, and exist nowhere here."""
    rest = re.sub(r"\[[^\]]*\]\([^)\s]+\)|https?://\S+", "", text)
    named = re.findall(r"(?<![\w/.<-])((?:[\w-]+/)*[\w-]+\.(?:py|md|svg|sbatch))\b", rest)
    return [name for name in named if not any((folder / name).exists() for folder in FOLDERS)]


def commands(text: str) -> list[list[str]]:
    """The arguments of every `python -m tsp_ref ...`, in blocks of code and within lines."""
    quoted = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    quoted += re.findall(r"`([^`]+)`", prose(text))
    lines = [line for code in quoted for line in code.replace("\\\n", " ").splitlines()]
    found = [re.search(r"python -m tsp_ref(?: (.*))?$", line) for line in lines]
    return [shlex.split(match[1] or "", comments=True) for match in found if match]


def refusal(arguments: list[str]) -> str:
    """What the command line has against some arguments; nothing if they parse and make a configuration, or ask for
    help."""
    try:
        options = cli._parser().parse_args(arguments)
        # Without a preset a command chooses one for itself; the fields that may be set are the same.
        make_config(options.preset or "small", options.settings)
    except UserError as error:
        return str(error)
    except SystemExit as ended:
        return f"ended with {ended.code}" if ended.code else ""
    return ""


def test_the_readme_fits_a_screen() -> None:
    assert len(README.read_text().splitlines()) <= 80


def test_the_readme_has_the_two_commands_each_on_a_line() -> None:
    lines = README.read_text().splitlines()
    assert 'pip install -e ".[mpi]" && mpirun -n 4 python -m tsp_ref train' in lines
    assert 'pip install -e ".[test]" && pytest' in lines


def test_the_ring_in_the_readme_is_the_ring_of_tsp() -> None:
    quoted = code_lines(between(README.read_text(), "ring"))
    assert 8 <= len(quoted) <= 15
    assert not_in_order(quoted, code_lines((ROOT / "tsp_ref" / "schedules" / "tsp.py").read_text())) == []


def test_a_quoted_line_that_is_not_there_is_found_and_so_is_one_out_of_order() -> None:
    source = code_lines("a = 1\n\n    b = 2\n    c = 3\n")
    assert not_in_order(code_lines("```python\na = 1\n...\n  c = 3\n```"), source) == []
    assert not_in_order(["a = 1", "b = 3"], source) == ["b = 3"]
    assert not_in_order(["c = 3", "b = 2"], source) == ["b = 2"]


@EACH_PAGE
def test_every_link_leads_somewhere(page: Path) -> None:
    assert broken_links(page, page.read_text()) == []


@EACH_PAGE
def test_every_file_that_is_named_exists(page: Path) -> None:
    assert unknown_files(page.read_text()) == []


@EACH_PAGE
def test_every_command_that_is_quoted_is_understood(page: Path) -> None:
    refused = {" ".join(arguments): refusal(arguments) for arguments in commands(page.read_text())}
    assert {command: why for command, why in refused.items() if why} == {}


def test_what_is_wrong_in_a_page_is_found() -> None:
    text = ("[a](docs/none.md) [b](docs/gpu.md#none) ![c](docs/pictures/tsp.svg) [d](https://e.org/f.md)\n"
            "`schedules/none.py` and `schedules/tsp.py`, not https://e.org/g.py\n"
            "```sh\nmpirun -n 4 python -m tsp_ref none\nx && python -m tsp_ref train --set \\\n  none=1   # why\n```\n"
            "`python -m tsp_ref train --help`, `python -m tsp_ref.pictures.folding`")
    assert broken_links(README, text) == ["docs/none.md", "docs/gpu.md#none"]
    assert unknown_files(text) == ["schedules/none.py"]
    assert commands(text) == [["none"], ["train", "--set", "none=1"], ["train", "--help"]]
    assert [bool(refusal(arguments)) for arguments in commands(text)] == [True, True, False]


def test_every_page_can_be_reached_from_the_readme() -> None:
    assert {target for target in links(README.read_text()) if target.endswith(".md")} >= {
        f"docs/{page.name}" for page in PAGES[1:]}


def test_every_lesson_and_room_has_its_line() -> None:
    text = {page.name: page.read_text() for page in PAGES}
    lessons = [lesson.name for lesson in (ROOT / "lessons").glob("[0-9]*.py")]
    assert [name for name in lessons if f"[`{name}`](../lessons/{name})" not in text["lessons.md"]] == []
    rooms = re.findall(r"^\| \[`(\w+)`\]\(../tsp_ref/\1\)", text["tour.md"], re.MULTILINE)
    assert rooms == [room for room in ROOMS if (ROOT / "tsp_ref" / room).is_dir()]


def test_the_table_of_balance_is_the_grid_s() -> None:
    rows = re.findall(r"^\| (\d+) \|(.*)\|$", between((ROOT / "docs" / "how-it-works.md").read_text(), "balance"),
                      re.MULTILINE)
    assert [int(tiles) for tiles, _ in rows] == [8, 16, 32, 64]
    for tiles, values in rows:
        drawn = [f"{busiest_over_mean(int(tiles), ranks):.2f}" for ranks in range(2, 9)]
        assert [value.strip() for value in values.split("|")] == drawn, tiles


def busiest_over_mean(tiles: int, ranks: int) -> float:
    """Of causal attention: pairs of a query and a key."""
    grid = Grid(ranks, tiles, 64, *folded(0, ranks))
    pairs = [sum(map(grid.pairs, grid.slots_of(rank))) for rank in range(ranks)]
    return max(pairs) / sum(pairs) * ranks
