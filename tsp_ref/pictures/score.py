"""A step of one rank as a score: what it posted, computed and waited for, in order, sub-layer after sub-layer.

Read from the communicator's script, which knows phases but no layers: those follow from how often each sub-layer of the
model was entered. A message belongs to the sub-layer whose phase it is counted by. Where the rank is in another one, it
was prefetched for a sub-layer to come, or, if it carries gradients, deferred from one that is over.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from ..comm.communicator import Event

BETWEEN = ("", "model")  # what a phase names while the rank is in no sub-layer
IN_LAYERS = ("attention", "mlp")  # the sub-layers that every layer has
CALLS = {"send": "Isend", "receive": "Irecv"}


@dataclass(frozen=True)
class Visit:
    """A stretch of the step that a rank spends in one sub-layer, or between two; they are numbered in order.

    layer       of the attention and the MLP, from 0 on
    recomputed  a forward that a backward runs again, and which is counted as the backward's
    """

    number: int
    sublayer: str
    direction: str
    layer: int | None = None
    recomputed: bool = False

    @property
    def phase(self) -> tuple[str, str]:
        """What the messages of this sub-layer are counted by."""
        return self.sublayer, self.direction

    @property
    def place(self) -> str:
        """The sub-layer's name, with its layer."""
        return self.sublayer if self.layer is None else f"{self.sublayer} {self.layer}"

    def __str__(self) -> str:
        if self.sublayer in BETWEEN:
            return "between sub-layers"
        layer = "" if self.layer is None else f", layer {self.layer}"
        return f"{self.sublayer} {self.direction}{layer}{', its forward recomputed' if self.recomputed else ''}"


@dataclass
class Line:
    """Something that a rank did, once or several times on end: with several peers, or with slot after slot.

    what   "compute", "Isend", "Irecv" or "wait"
    here   where it was done
    of     the sub-layer that it was done for
    """

    what: str
    here: Visit
    of: Visit
    verb: str = ""
    tag: str = ""
    size: int = 0  # bytes of each message
    block: int | None = None
    members: list[int] = field(default_factory=list)  # the peer of each message, or the slots

    def goes_on_with(self, following: Line) -> bool:
        """Whether another is the same again, so that one line says both."""
        same = replace(self, members=[]) == replace(following, members=[])
        return same and (self.what != "compute" or following.members[0] == self.members[-1] + 1)


def visits(script: list[Event], layers: int) -> list[Visit]:
    """Where the rank is at each event. A sub-layer that another one is entered from, as the head is for the loss, goes
    on when that one is left."""
    phases, places = [("", "")], []
    inside = [0]  # the visits that have not been left, the innermost last
    for event in script:
        if event.what == "enter":
            inside = [] if event.phase[0] in BETWEEN else inside
            of_phase = [place for place, number in enumerate(inside) if phases[number] == event.phase]
            if of_phase:
                del inside[of_phase[0] + 1 :]
            else:
                inside.append(len(phases))
                phases.append(event.phase)
        places.append(inside[-1])
    named = _with_layers(phases, layers)
    return [named[place] for place in places]


def _with_layers(phases: list[tuple[str, str]], layers: int) -> list[Visit]:
    """The visits of these phases. Each layer is entered equally often: in a backward twice, if its forward is
    recomputed."""
    entered = dict.fromkeys(phases, 0)
    found = []
    for number, (sublayer, direction) in enumerate(phases):
        turn, times = entered[sublayer, direction], phases.count((sublayer, direction)) // layers
        entered[sublayer, direction] += 1
        if sublayer not in IN_LAYERS:
            found.append(Visit(number, sublayer, direction))
            continue
        layer = turn // times if direction == "forward" else layers - 1 - turn // times
        found.append(Visit(number, sublayer, direction, layer, turn % times < times - 1))
    return found


def tag_name(event: Event) -> str:
    """The purpose of a message."""
    return str(getattr(event.tag, "name", event.tag))


class Owners:
    """Finds the sub-layer that a message is posted for, of all visits of a step. Asked message by message, in order."""

    def __init__(self, all_visits: Iterable[Visit]) -> None:
        self.visits = list(all_visits)
        self.seen: set[tuple[Visit, str, str, int, int | None]] = set()  # weights that were posted for each visit

    def of(self, here: Visit, event: Event) -> Visit:
        """This one, one to come, or for gradients one that is over."""
        tag, alike = tag_name(event), [visit for visit in self.visits if visit.phase == event.phase]
        over = [visit for visit in alike if visit.number < here.number and not visit.recomputed][::-1]
        to_come = [visit for visit in alike if visit.number > here.number]
        if event.phase == here.phase:
            found = [here, *to_come]
        else:
            found = [*over, *to_come] if tag.endswith("GRADIENTS") else [*to_come, *over]
        if not tag.endswith("WEIGHTS"):
            return next(iter(found), here)
        # A forward that is recomputed is counted as the backward's, from which it may be prefetched. A sub-layer needs
        # each block, or all of a rank's in one message, once: the second time it is for the next one.
        key = event.verb, tag, event.peer, event.block
        owner = next((visit for visit in found if (visit, *key) not in self.seen), here)
        self.seen.add((owner, *key))
        return owner


def lines_of(script: list[Event], layers: int) -> list[Line]:
    """All that a rank computed, posted and waited for, each as a line of its own, in order. A message that it only
    looked after, and found complete, has no wait."""
    where = visits(script, layers)
    owners = Owners(dict.fromkeys(where))
    in_flight: dict[int, Line] = {}
    lines = []
    for here, event in zip(where, script):
        if event.what == "compute":
            slots = list(range(event.slot, event.slot + event.tiles))
            lines.append(Line("compute", here, here, block=event.block, members=slots))
        elif event.what == "post":
            post = Line(CALLS[event.verb], here, owners.of(here, event), event.verb, tag_name(event), event.size,
                        event.block, [event.peer])
            in_flight[event.request] = post
            lines.append(post)
        elif event.what == "wait" and event.request in in_flight:
            post = in_flight.pop(event.request)
            lines.append(Line("wait", here, post.of, post.verb, post.tag, 0, post.block, list(post.members)))
    return lines


def totals(lines: list[Line]) -> dict[str, tuple[int, int]]:
    """Messages and bytes that were posted, by verb."""
    found = {}
    for verb, call in CALLS.items():
        posts = [line for line in lines if line.what == call]
        found[verb] = sum(len(post.members) for post in posts), sum(len(post.members) * post.size for post in posts)
    return found


def collapsed(lines: Iterable[Line]) -> list[Line]:
    """One line for those on end that say the same."""
    found: list[Line] = []
    for line in lines:
        if found and found[-1].goes_on_with(line):
            found[-1].members += line.members
        else:
            found.append(replace(line, members=list(line.members)))
    return found


def ranges(numbers: Iterable[int]) -> str:
    """Numbers in short: 0, 2-5."""
    found: list[list[int]] = []
    for number in sorted(set(numbers)):
        if found and found[-1][1] == number - 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in found)


def _about(line: Line) -> str:
    """The block, and with which slots, or to or from which ranks."""
    noun, link = ("slot", "with") if line.what == "compute" else ("rank", "to" if line.verb == "send" else "from")
    block = "" if line.block is None else f"block {line.block} "
    return f"{block}{link} {noun}{'s' if len(set(line.members)) > 1 else ''} {ranges(line.members)}"


def _amount(line: Line) -> str:
    """The bytes of a post; how many messages, if one line stands for several."""
    count = len(line.members)
    if line.what == "wait":
        return f"{count} messages" if count > 1 else ""
    if line.what == "compute":
        return ""
    return f"{count} x {line.size:,}" if count > 1 else f"{line.size:,}"


def _purpose(line: Line) -> str:
    """The tag; and the sub-layer, if it is not the one that the rank is in."""
    if line.of == line.here:
        return line.tag
    return f"{line.tag}  {'for' if line.of.number > line.here.number else 'of'} {line.of.place}"


def score(lines: Iterable[Line], chosen: Callable[[Visit], bool], width: int) -> list[str]:
    """What was done in the chosen sub-layers, or for them, in lines of text of a width."""
    shown = collapsed(line for line in lines if chosen(line.here) or chosen(line.of))
    about_width, amount_width = (max(map(len, map(cell, shown)), default=0) for cell in (_about, _amount))
    text: list[str] = []
    here = None
    for line in shown:
        if line.here != here:
            here = line.here
            text += ["", *textwrap.wrap(f"{here}" if chosen(here) else f"{here}: what is of the sub-layers asked for",
                                        width)]
        begin = f"  {line.what:<7}  {_about(line):<{about_width}}  {_amount(line):>{amount_width}}"
        purpose = f"  {_purpose(line)}".rstrip()
        # Where a line is too long, what it is for goes below: nothing is cut off.
        fits = len(begin + purpose) <= width
        text += [(begin + purpose).rstrip()] if fits else [begin.rstrip(), f"{'':<9}{purpose}"]
    return text
