"""A step in the terminal: for each rank a line of what it computes and a line of its messages and waits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from rich.text import Text

from ..comm.timeline import Lane, pairs
from .axis import LOOKS, OTHER, end_of, letter_of, looks_in, ticks

STYLES = {letter: f"black on {look.terminal}" for look in [*LOOKS.values(), OTHER]
          for letter in (look.letter, look.letter.lower())}
STYLES |= {"W": "bold white on red", "w": "red", "~": "cyan"}
EVERY = 12  # columns between two marks of the axis, or a few more


def chart(lanes: list[Lane], width: int) -> Text:
    """The ranks' lanes under one another, `width` columns wide."""
    label = len(f"rank {len(lanes) - 1} ")
    columns = max(width - label - len(" 100%"), 2 * EVERY)
    end = end_of(lanes)
    found = pairs(lanes)
    lines = []
    for lane in lanes:
        work = _shares(((span.begin, span.end, letter_of(span) if span.what == "compute" else " ")
                        for span in lane.spans), end, columns)
        waits = _shares(((span.begin, span.end, "w") for span in lane.spans if span.what == "wait"), end, columns)
        messages = _shares(((pair.both_posted, pair.received.end, "~")
                            for pair in found if pair.dest == lane.rank), end, columns)
        upper = [max(share, key=lambda key: share[key]) if share else " " for share in work]
        lower = ["W" if wait["w"] >= 0.5 else "w" if wait["w"] >= 0.1 else "~" if message["~"] >= 0.5 else " "
                 for wait, message in zip(waits, messages)]
        lines += [_line(f"rank {lane.rank}".ljust(label), upper, lane.share("compute")),
                  _line(" " * label, lower, lane.share("wait"))]
    return Text("\n").join([*lines, _axis(1e3 * end, label, columns), *_legend(lanes)])


def _shares(spans: Iterable[tuple[float, float, str]], end: float, columns: int) -> list[Counter[str]]:
    """How much of each column's time each letter has."""
    found: list[Counter[str]] = [Counter() for _ in range(columns)]
    for begin, until, letter in spans:
        first, last = begin / end * columns, until / end * columns
        for column in range(int(first), min(int(last) + 1, columns)):
            found[column][letter] += min(last, column + 1) - max(first, column)  # type: ignore[assignment]
    return found


def _line(label: str, letters: list[str], share: float) -> Text:
    line = Text(label)
    for letter in letters:
        line.append(letter, STYLES.get(letter, ""))
    return line.append(f" {share:>4.0%}")


def _axis(milliseconds: float, label: int, columns: int) -> Text:
    line = [" "] * (label + columns + 5)
    for tick in ticks(milliseconds, columns // EVERY):
        place = label + round(tick / milliseconds * columns)
        text = f"{tick:g}" + (" ms" if tick == 0 else "")
        line[place : place + 1 + len(text)] = f"|{text}"
    return Text("".join(line[: label + columns + 5]).rstrip())


def _legend(lanes: list[Lane]) -> list[Text]:
    above = [*((look.letter, look.name) for look in looks_in(lanes)), ("", "small: backward")]
    below = [("W", "waits"), ("w", "waits for a tenth of the time"), ("~", "messages in flight to this rank")]
    lines = []
    for name, entries in (("computes", above), ("waits", below)):
        line = Text(f"{name}: ")
        for letter, meaning in entries:
            line.append(letter, STYLES.get(letter, "")).append(f" {meaning}  ")
        lines.append(line)
    return lines
