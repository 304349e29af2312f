"""A step as an SVG that needs nothing else: for each rank bars of computation, and under them of waits and messages."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from ..comm.timeline import Lane, Pair, pairs
from .axis import Look, end_of, look_of, looks_in, ticks

WIDTH, LEFT, RIGHT, TOP = 1000, 70, 110, 40
LANE, BAR, STRIP = 44, 18, 6  # heights of a lane, its bar of computation, its strips of waits and of messages
WAIT, MESSAGE, GRID, INK = "#d93025", "#5f8dd3", "#e3e6ea", "#24292f"
FORWARD = 'fill-opacity="0.55"'  # of the colour that the backward has in full


def svg(lanes: list[Lane], title: str) -> str:
    """The whole file."""
    end = end_of(lanes)
    scale = (WIDTH - LEFT - RIGHT) / end
    bottom = TOP + LANE * len(lanes)
    found = pairs(lanes)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{bottom + 68}" '
        f'viewBox="0 0 {WIDTH} {bottom + 68}" font-family="sans-serif" font-size="12" fill="{INK}">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{bottom + 68}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="22" font-size="15">{escape(title)}</text>',
        *_axis(1e3 * end, bottom),
        *(line for lane in lanes for line in _lane(lane, found, scale)),
        *_legend(looks_in(lanes), bottom + 42),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _lane(lane: Lane, found: list[Pair], scale: float) -> list[str]:
    y = TOP + LANE * lane.rank
    kinds: dict[tuple[Look, bool], list[tuple[float, float]]] = {}
    for span in lane.spans:
        if span.what == "compute":
            kinds.setdefault((look_of(span), span.direction == "backward"), []).append(span[:2])
    waits = [span[:2] for span in lane.spans if span.what == "wait"]
    messages = sorted((pair.both_posted, pair.received.end) for pair in found if pair.dest == lane.rank)
    return [
        f'<g id="rank{lane.rank}"><text x="{LEFT - 8}" y="{y + 14}" text-anchor="end">rank {lane.rank}</text>',
        *(_bars(bars, y, BAR, scale, f'fill="{look.paper}"' + ("" if backward else f" {FORWARD}"),
                f"{look.name} {'backward' if backward else 'forward'}") for (look, backward), bars in kinds.items()),
        _bars(waits, y + BAR + 1, STRIP, scale, f'fill="{WAIT}"', "waits"),
        _bars(messages, y + BAR + STRIP + 2, STRIP, scale, f'fill="{MESSAGE}"', "messages in flight to this rank"),
        f'<text x="{WIDTH - RIGHT + 8}" y="{y + 13}">computes {lane.share("compute"):.0%}</text>',
        f'<text x="{WIDTH - RIGHT + 8}" y="{y + 28}" fill="{WAIT}">waits {lane.share("wait"):.0%}</text></g>',
    ]


def _bars(
    times: Iterable[tuple[float, float]], y: int, height: int, scale: float, style: str, title: str
) -> str:
    """Bars of one kind, in one path; those that touch or overlap are one."""
    joined: list[list[float]] = []
    for begin, end in times:
        if joined and begin <= joined[-1][1]:
            joined[-1][1] = max(end, joined[-1][1])
        elif end > begin:
            joined.append([begin, end])
    path = "".join(f"M{LEFT + begin * scale:.2f} {y}h{(end - begin) * scale:.2f}v{height}h-{(end - begin) * scale:.2f}z"
                   for begin, end in joined)
    return f'<path d="{path}" {style}><title>{title}</title></path>' if path else ""


def _axis(milliseconds: float, bottom: int) -> list[str]:
    lines = []
    for tick in ticks(milliseconds, 10):
        x = LEFT + tick / milliseconds * (WIDTH - LEFT - RIGHT)
        lines.append(f'<path d="M{x:.1f} {TOP - 4}V{bottom}" stroke="{GRID}"/>'
                     f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="middle">{tick:g}</text>')
    return [*lines, f'<text x="{WIDTH - RIGHT + 8}" y="{bottom + 14}">ms</text>']


def _legend(looks: list[Look], y: int) -> list[str]:
    entries = [(f'fill="{look.paper}"', look.name) for look in looks]
    entries += [(f'fill="{WAIT}"', "waits"), (f'fill="{MESSAGE}"', "messages in flight to this rank")]
    lines, x = [], LEFT
    for style, name in entries:
        lines.append(f'<rect x="{x}" y="{y - 9}" width="10" height="10" {style}/>'
                     f'<text x="{x + 14}" y="{y}">{name}</text>')
        x += 32 + 7 * len(name)
    return [*lines, f'<text x="{LEFT}" y="{y + 18}">pale: forward; full colour: backward, what it recomputes '
                    'included. A message is in flight since both ends have posted it.</text>']
