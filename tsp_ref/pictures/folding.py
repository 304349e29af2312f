"""TSP in one picture, drawn from the grid of a small model: who holds what, and what moves.

    python -m tsp_ref.pictures.folding > docs/pictures/tsp.svg

Every owner in it is asked of `Grid`. A rank has a colour, and the four differ in lightness, so that they can be told
apart in grey; every block and tile has its number besides.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from html import escape

from ..grid.grid import ALONE, Grid, Place, folded

RANKS, BLOCKS, TILES = 4, 8, 8
WIDTH, HEIGHT, MARGIN = 800, 602, 24
PAPER, INK, SOFT, LINE, CARD = "#ffffff", "#1f2328", "#57606a", "#8c959f", "#f3f5f8"
COLOURS = ("#17375e", "#2b7f8c", "#eda93b", "#fbe5d6")  # of the ranks, from dark to light
LETTERS = ("#ffffff", "#ffffff", INK, INK)  # what is written on them

STRATEGIES = {
    "TP": (Place(0, RANKS), ALONE),
    "SP": (ALONE, Place(0, RANKS)),
    "TP+SP, 2 x 2 ranks": (Place(0, 2), Place(0, 2)),
    "TSP": folded(0, RANKS),
}
"""Where rank 0 of RANKS stands on the axis of weights and on that of tokens."""

OTHER_MOVES = (
    ("broadcast", "Attention blocks: broadcast",
     ("each owner in turn sends one to all,", "under the work on those before")),
    ("gather", "Keys, values: all-gather",
     ("every rank sends its tiles' to all,", "the heads of one block at a time")),
    ("reduce", "Weight gradients: reduce",
     ("every rank sends the sum over its tiles", "to the rank that holds the block")),
)


def grid_of(rank: int) -> Grid:
    """The grid as a rank sees it."""
    return Grid(BLOCKS, TILES, 1, *folded(rank, RANKS))


def block_owner(block: int) -> int:
    """The rank that holds a block of every weight matrix."""
    return next(rank for rank in range(RANKS) if block in grid_of(rank).blocks)


def tiles_of(rank: int) -> list[int]:
    """The tiles of every sequence that a rank holds, in the order of its slots."""
    return [grid_of(rank).tile(slot) for slot in grid_of(rank).slots]


def tile_owner(tile: int) -> int:
    """The rank that holds a tile of every sequence."""
    return next(rank for rank in range(RANKS) if tile in tiles_of(rank))


def ring_block(rank: int, step: int) -> int:
    """The block that a rank works on at a step of the ring: its own, then its left neighbour's, and so on; then the
    second block of each."""
    around, back = divmod(step, RANKS)
    return grid_of(rank).blocks_of((rank - back) % RANKS)[around]


def picture() -> str:
    """The whole SVG."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="Helvetica, Arial, sans-serif" font-size="12" fill="{INK}">',
        "<title>TSP: who holds what, and what moves</title>",
        *_arrowhead(),
        f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="10" fill="{PAPER}" stroke="{LINE}"/>',
        _text(MARGIN, 36, "TSP: the same ranks share the weights and the tokens", 18, bold=True),
        _text(MARGIN, 56, f"{RANKS} ranks, a colour each. Every weight matrix is cut in {BLOCKS} blocks, "
              f"every sequence in {TILES} tiles.", 12.5, fill=SOFT),
        *_holdings(84),
        *_ring(228),
        *_other_moves(248),
        *_comparison(490),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _holdings(top: int) -> Iterator[str]:
    yield _text(MARGIN, top, "Who holds what", 14, bold=True)
    for kind, y, name, owner in (("block", top + 14, "weights", block_owner), ("tile", top + 60, "tokens", tile_owner)):
        yield f'<g id="{kind}s">'
        yield _text(MARGIN, y + 23, name, 13)
        yield from (_cell(kind, 86 + 44 * index, y, 36, owner(index), index) for index in range(8))
        yield "</g>"
    legend = "squares: blocks. circles: tiles, dealt from both ends, since later tokens attend to more"
    yield _text(86, top + 112, legend, 11.5, fill=SOFT)
    for rank in range(RANKS):
        yield from _rank(rank, 462 + 160 * (rank % 2), top + 10 + 46 * (rank // 2))


def _rank(rank: int, x: int, y: int) -> Iterator[str]:
    yield f'<g id="rank{rank}"><rect x="{x}" y="{y}" width="154" height="40" rx="6" fill="{CARD}"/>'
    yield _text(x + 8, y + 24, f"rank {rank}", 12, bold=True)
    held = [("block", block) for block in grid_of(rank).blocks] + [("tile", tile) for tile in tiles_of(rank)]
    yield from (_cell(kind, x + 58 + 24 * place, y + 10, 20, rank, index)
                for place, (kind, index) in enumerate(held))
    yield "</g>"


def _ring(top: int) -> Iterator[str]:
    """A table of which block is where when; an arrow is a message, sent while its block is worked on."""
    left, across, down, size = 78, 44, 42, 28
    yield _text(MARGIN, top, "What moves", 14, bold=True)
    yield _text(MARGIN, top + 20, "MLP blocks: a ring, rank r to r+1", 13, bold=True)
    yield _text(MARGIN, top + 37, "each rank works on the block shown, while the next one is in flight", 12, fill=SOFT)
    for step in range(BLOCKS):
        x = left + across * step
        yield _text(x + size / 2, top + 60, f"{step + 1}" if step else "step 1", 11, "middle", SOFT)
        for rank in range(RANKS):
            y = top + 70 + down * rank
            if step and block_owner(ring_block(rank, step)) != rank:
                yield _hop(x - across + size, y - down + size, across - size, down - size, rank == 0)
            if step < BLOCKS - 1 and rank == RANKS - 1 and block_owner(ring_block(0, step + 1)) != 0:
                yield _leaving(x + size, y + size)
    for rank in range(RANKS):
        y = top + 70 + down * rank
        yield f'<g id="ring{rank}">' + _text(MARGIN, y + 19, f"rank {rank}", 12)
        for step in range(BLOCKS):
            block = ring_block(rank, step)
            yield _cell("block", left + across * step, y, size, block_owner(block), block)
        yield "</g>"


def _hop(x: float, y: float, across: float, down: float, from_last: bool) -> str:
    """An arrow into a cell from the rank above it; what the last rank sends comes in over the first."""
    begin = f"M{x + across - 8} {y + down - 8}" if from_last else f"M{x} {y}"
    return f'<path d="{begin}L{x + across - 1} {y + down - 1}" stroke="{INK}" marker-end="url(#head)"/>'


def _leaving(x: float, y: float) -> str:
    return f'<path d="M{x} {y}l8 8" stroke="{INK}"/>'


def _other_moves(top: int) -> Iterator[str]:
    for place, (move, title, lines) in enumerate(OTHER_MOVES):
        y = top - 12 + 76 * place
        yield f'<g id="{move}">'
        yield from _icon(move, 466, y + 2)
        yield _text(546, y + 14, title, 13, bold=True)
        yield from (_text(546, y + 32 + 16 * row, line, 12, fill=SOFT) for row, line in enumerate(lines))
        yield "</g>"


def _icon(move: str, x: float, y: float) -> Iterator[str]:
    """Four ranks, and an arrow for each message of the move; rank 0 is the owner."""
    centres = [(x + 10 + 42 * (rank % 2), y + 10 + 42 * (rank // 2)) for rank in range(RANKS)]
    for source in range(RANKS):
        for dest in range(RANKS):
            if move == "gather" and source < dest:
                yield _arrow(*centres[source], *centres[dest], both=True)
            elif move != "gather" and source != dest and (source if move == "broadcast" else dest) == 0:
                yield _arrow(*centres[source], *centres[dest])
    for rank, (cx, cy) in enumerate(centres):
        yield (f'<circle cx="{cx}" cy="{cy}" r="9" fill="{COLOURS[rank]}" stroke="{INK}"/>'
               + _text(cx, cy + 4, str(rank), 11, "middle", LETTERS[rank]))


def _arrow(x: float, y: float, to_x: float, to_y: float, both: bool = False) -> str:
    """From circle to circle, or both ways."""
    length = ((to_x - x) ** 2 + (to_y - y) ** 2) ** 0.5
    dx, dy = 11 * (to_x - x) / length, 11 * (to_y - y) / length
    back = ' marker-start="url(#head)"' if both else ""
    return (f'<path d="M{x + dx:.1f} {y + dy:.1f}L{to_x - dx:.1f} {to_y - dy:.1f}" stroke="{INK}"{back} '
            'marker-end="url(#head)"/>')


def _comparison(top: int) -> Iterator[str]:
    yield _text(MARGIN, top, f"What one rank of {RANKS} holds", 14, bold=True)
    for y, name in ((top + 52, "weights"), (top + 78, "tokens")):
        yield _text(MARGIN, y, name, 13)
    for column, (name, axes) in enumerate(STRATEGIES.items()):
        x, grid = 86 + 176 * column, Grid(BLOCKS, TILES, 1, *axes)
        if name == "TSP":
            yield f'<rect x="{x - 10}" y="{top + 12}" width="172" height="80" rx="6" fill="{CARD}"/>'
        yield f'<g id="{escape(name)}">' + _text(x, top + 30, name, 13, bold=name == "TSP")
        yield from _held("block", x, top + 41, list(grid.blocks), BLOCKS)
        yield from _held("tile", x, top + 67, [grid.tile(slot) for slot in grid.slots], TILES)
        yield "</g>"


def _held(kind: str, x: int, y: int, held: list[int], count: int) -> Iterator[str]:
    for index in range(count):
        fill = COLOURS[0] if index in held else PAPER
        yield (f'<rect class="{kind}" x="{x + 14 * index}" y="{y}" width="12" height="12" '
               f'rx="{6 if kind == "tile" else 1}" fill="{fill}" stroke="{LINE if fill == PAPER else INK}"/>')
    whole = len(held) == count
    yield _text(x + 14 * count + 6, y + 11, "all" if whole else f"1/{count // len(held)}", 13, bold=not whole)


def _cell(kind: str, x: float, y: float, size: int, rank: int, index: int) -> str:
    """A block or a tile, in the colour of the rank that holds it."""
    corner = size / 2 if kind == "tile" else 2
    return (f'<rect class="{kind}" x="{x}" y="{y}" width="{size}" height="{size}" rx="{corner}" '
            f'fill="{COLOURS[rank]}" stroke="{INK}"/>'
            + _text(x + size / 2, y + size / 2 + 4.5, str(index), 12.5, "middle", LETTERS[rank]))


def _text(
    x: float, y: float, content: str, size: float, anchor: str = "start", fill: str = INK, bold: bool = False
) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return (f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" text-anchor="{anchor}" fill="{fill}"{weight}>'
            f"{escape(content)}</text>")


def _arrowhead() -> Iterator[str]:
    yield ('<defs><marker id="head" viewBox="0 0 6 6" refX="5" refY="3" markerWidth="6" markerHeight="6" '
           f'orient="auto-start-reverse"><path d="M0 0L6 3L0 6z" fill="{INK}"/></marker></defs>')


if __name__ == "__main__":
    sys.stdout.write(picture())
