"""Recording one step of a command, and drawing what it asks for: a chart in the terminal, a trace, an SVG."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console

from ..comm.clocks import gather_lanes, recording
from ..comm.communicator import Communicator
from ..comm.timeline import Lane, Timeline
from ..errors import UserError
from ..pictures.axis import end_of
from ..pictures.chart import chart
from ..pictures.svg import svg
from ..pictures.trace import trace
from .files import WholeFile, write_all


@dataclass(frozen=True)
class PictureOptions:
    """Which pictures of a step the command line asks for."""

    chart: bool = False
    trace: str | None = None
    svg: str | None = None

    @property
    def files(self) -> dict[str, str | None]:
        """The files that are asked for, by their options."""
        return {"--trace": self.trace, "--svg": self.svg}

    @property
    def option(self) -> str | None:
        """The first that is asked for, if any."""
        asked = {"--timeline": self.chart, "--trace": self.trace is not None, "--svg": self.svg is not None}
        return next((option for option, wanted in asked.items() if wanted), None)


class Pictures:
    """One step as its ranks recorded it, in the pictures that are asked for. Made, all files are known to be writable.

    All ranks call the same methods in the same order; rank 0 draws.
    """

    def __init__(self, comm: Communicator, options: PictureOptions, schedule: str) -> None:
        self.comm = comm
        self.options = options
        if options.option and schedule == "single":
            raise UserError(f"{options.option} shows ranks and their messages, and --schedule single has none: use one "
                            "of tp, sp, tp+sp, fsdp+sp, tsp")
        self.trace = WholeFile("--trace", options.trace if comm.rank == 0 else None)
        self.svg = WholeFile("--svg", options.svg if comm.rank == 0 else None)
        self.timeline: Timeline | None = None
        self.lanes: list[Lane] = []

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record what happens meanwhile, if anything is to be drawn."""
        if self.options.option is None:
            yield
            return
        with recording(self.comm) as self.timeline:
            yield

    def collect(self) -> None:
        """Bring what all ranks recorded to rank 0: soon after, for clocks drift apart."""
        if self.timeline is not None:
            self.lanes = gather_lanes(self.comm, self.timeline)

    def draw(self, console: Console, what: str) -> None:
        """Print the chart, write the files. Every rank must call it; an `AgreedError` if one cannot be written."""
        if self.timeline is None:
            return
        ranks = "1 rank" if self.comm.size == 1 else f"{self.comm.size} ranks"
        title = f"{what} on {ranks}: {1e3 * end_of(self.lanes):.1f} ms" if self.lanes else ""
        if self.options.chart and self.lanes:
            error = max(lane.clock_error for lane in self.lanes)
            console.print(f"\n{title}; the ranks' clocks are compared to within {1e6 * error:.0f} µs", highlight=False)
            console.print(chart(self.lanes, console.width))
        pictures = {file: draw for file, draw in ((self.trace, trace), (self.svg, svg)) if file.path is not None}
        write_all(self.comm, {file: draw(self.lanes, title) for file, draw in pictures.items()})
        for file in (self.trace, self.svg):
            if file.path is not None:
                console.print(f"{title}, in {file.path}", highlight=False, markup=False, soft_wrap=True)
