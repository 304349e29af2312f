"""The picture of TSP: it is drawn from the grid, it shows what a step does, and the stored file is up to date."""

from __future__ import annotations

from collections import defaultdict
from itertools import groupby, pairwise
from xml.etree import ElementTree

import numpy as np
import pytest
from cases import random_text

from tsp_ref.comm.communicator import Communicator
from tsp_ref.comm.virtual import VirtualCommunicator, VirtualWorld
from tsp_ref.model.config import make_config
from tsp_ref.pictures import folding
from tsp_ref.pictures.folding import BLOCKS, COLOURS, RANKS, TILES
from tsp_ref.process import jobs
from tsp_ref.training.loop import Training
from tsp_ref.training.strategy import Plan

SPACE = "{http://www.w3.org/2000/svg}"
STORED = jobs.ROOT / "docs" / "pictures" / "tsp.svg"

Cell = tuple[str, int, int]
"""("block" or "tile", its number, the rank whose colour it has)."""


def groups(svg: str) -> dict[str, list[ElementTree.Element]]:
    return {str(group.get("id")): list(group) for group in ElementTree.fromstring(svg).iter(f"{SPACE}g")}


def cells(group: list[ElementTree.Element]) -> list[Cell]:
    """What a group of the picture shows, read from its shapes, their colours, and the number after each."""
    return [(str(shape.get("class")), int(str(label.text)), COLOURS.index(str(shape.get("fill"))))
            for shape, label in pairwise(group) if shape.get("class")]


def test_the_stored_picture_is_the_one_that_is_drawn() -> None:
    assert STORED.read_text() == folding.picture(), "python -m tsp_ref.pictures.folding > docs/pictures/tsp.svg"


def test_every_block_and_tile_has_the_colour_of_the_rank_that_the_grid_gives_it_to() -> None:
    drawn = groups(STORED.read_text())
    held: dict[str, set[Cell]] = defaultdict(set)
    for rank in range(RANKS):
        grid = folding.grid_of(rank)
        own = [("block", block, rank) for block in grid.blocks] + [("tile", grid.tile(s), rank) for s in grid.slots]
        assert cells(drawn[f"rank{rank}"]) == own
        for cell in own:
            held[cell[0]].add(cell)
    assert cells(drawn["blocks"]) == sorted(held["block"]) and len(held["block"]) == BLOCKS
    assert cells(drawn["tiles"]) == sorted(held["tile"]) and len(held["tile"]) == TILES


def test_a_rank_is_drawn_with_its_share_under_every_strategy() -> None:
    drawn = groups(STORED.read_text())
    for strategy, (blocks, tiles) in {"TP": (2, 8), "SP": (8, 2), "TP+SP, 2 x 2 ranks": (4, 4), "TSP": (2, 2)}.items():
        filled = [shape.get("class") for shape in drawn[strategy] if shape.get("fill") == COLOURS[0]]
        assert (filled.count("block"), filled.count("tile")) == (blocks, tiles), strategy


class Watched:
    """Of a step of TSP on the picture's grid: the blocks that each rank works on in an MLP's forward, in order, and
    (sender, receiver) of the messages of each phase."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.blocks: dict[int, list[int]] = defaultdict(list)
        progress = Communicator.progress

        def watched(comm: Communicator, block: int, *place: int) -> None:
            if tuple(comm.phase) == ("mlp", "forward"):
                self.blocks[comm.rank].append(block)
            progress(comm, block, *place)

        monkeypatch.setattr(VirtualCommunicator, "progress", watched)
        config = make_config("tiny", [f"blocks={BLOCKS}", f"tiles={TILES}", "num_layers=1", "batch_size=1"])

        def step(comm: Communicator) -> set[tuple[str, int, int]]:
            Training(config, comm, Plan("tsp"), random_text(), np).step()
            return {(entry.tag, comm.rank, entry.peer) for entry in comm.ledger.entries if entry.verb == "send"}

        sent = set().union(*VirtualWorld(RANKS).run(step))
        self.messages: dict[str, set[tuple[int, int]]] = defaultdict(set)
        for tag, source, dest in sent:
            self.messages[tag].add((source, dest))


def test_a_step_moves_what_the_picture_says_that_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    watched, drawn = Watched(monkeypatch), groups(STORED.read_text())
    for rank in range(RANKS):
        table = [number for _, number, _ in cells(drawn[f"ring{rank}"])]
        assert [block for block, _ in groupby(watched.blocks[rank])] == table
    everyone = {(source, dest) for source in range(RANKS) for dest in range(RANKS) if source != dest}
    assert watched.messages["MLP_WEIGHTS"] == {(rank, (rank + 1) % RANKS) for rank in range(RANKS)}
    for tag in ("ATTENTION_WEIGHTS", "KEYS_VALUES", "MLP_GRADIENTS", "ATTENTION_GRADIENTS"):
        assert watched.messages[tag] == everyone, tag


def test_ranks_can_be_told_apart_in_grey() -> None:
    def lightness(colour: str) -> float:
        red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
        return (0.299 * red + 0.587 * green + 0.114 * blue) / 255

    greys = [lightness(colour) for colour in COLOURS]
    assert all(after - before > 0.15 for before, after in pairwise(greys))


def test_the_picture_has_a_ground_of_its_own_and_needs_no_other_file() -> None:
    text = STORED.read_text()
    ground = next(ElementTree.fromstring(text).iter(f"{SPACE}rect"))
    assert ground.get("fill") == "#ffffff" and int(str(ground.get("width"))) == folding.WIDTH - 1
    assert text.count("http") == 1 and "href" not in text
