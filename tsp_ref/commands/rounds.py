"""Rounds of timings, and what they say together: medians, quartiles, and a figure only where the rounds agree."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import quantiles
from typing import Any, NamedTuple

FEWEST = 3  # rounds: fewer cannot contradict each other
NEGLIGIBLE = 0.05  # of the computation: it varies by a hundredth or so, which is too much of messages that take less
WIDEST = 0.20  # between the quartiles of what is hidden, for its median to be called a figure
BEYOND = 0.05  # by which a quartile may lie outside 0 to 1: no step is so slow or so fast, but one is disturbed

NOISY = "too noisy to tell"
FEW = "too few rounds to tell"
NOTHING = "nothing to hide"


def hidden_fraction(comm: float, compute: float, both: float) -> float:
    """How much of what can be hidden is: 1 if the shorter of the two costs no time at all, 0 if one comes after the
    other. For the times of messages alone, of computation alone, and of both together, in one unit."""
    shorter = min(comm, compute)
    return (comm + compute - both) / shorter if shorter else 1.0


@dataclass(frozen=True)
class Round:
    """One round, in seconds.

    comm, compute, both  the slowest rank's time: messages alone, computation alone, the step as it is
    exposed              the time that ranks spent in waits during the step as it is, the mean over the ranks: what of
                         the messages can be seen there, and the waits for a rank that has more to do or is disturbed
    """

    comm: float
    compute: float
    both: float
    exposed: float

    @property
    def hidden(self) -> float:
        """What is hidden, by the three timings."""
        return hidden_fraction(self.comm, self.compute, self.both)

    @property
    def hidden_by_waits(self) -> float:
        """What is hidden, by the waits: 1 - exposed / comm wherever messages are shorter than computation."""
        return hidden_fraction(self.comm, self.compute, self.compute + self.exposed)


class Spread(NamedTuple):
    """The quartiles of some values."""

    lower: float
    median: float
    upper: float


def spread(values: list[float]) -> Spread:
    """The quartiles, between two values in proportion; of a single value, that value."""
    return Spread(*quantiles(values, n=4, method="inclusive")) if len(values) > 1 else Spread(*(values * 3))


class Verdict(NamedTuple):
    """What can be told: a fraction from 0 to 1, or None and why."""

    fraction: float | None
    text: str


def told(fractions: list[float]) -> Verdict:
    """The median of what is hidden in each round, if the rounds agree and it is possible.

    They contradict each other where their quartiles lie WIDEST apart or more, and where a quarter of them are beyond 0
    or 1 by more than BEYOND: there the computation was not as fast in one timing as in the next.
    """
    if len(fractions) < FEWEST:
        return Verdict(None, FEW)
    found = spread(fractions)
    if found.upper - found.lower >= WIDEST or found.lower < -BEYOND or found.upper > 1 + BEYOND:
        return Verdict(None, NOISY)
    fraction = min(max(found.median, 0.0), 1.0)
    return Verdict(fraction, f"{fraction:.0%}")


@dataclass(frozen=True)
class Overlap:
    """What the rounds of one part of a step say.

    schedule   as the plan calls it
    part       "forward" or "forward+backward"
    rounds     at least one
    obstacle   why nothing can be told, whatever the rounds say; nothing if something can
    waits      whether waits are for messages alone; on a GPU they are for its computation, too
    """

    schedule: str
    part: str
    rounds: list[Round]
    obstacle: str = ""
    waits: bool = True

    def spread(self, name: str) -> Spread:
        """The quartiles of one of a round's values, by its name: seconds, or what is hidden."""
        return spread(self._all(name))

    def _all(self, name: str) -> list[float]:
        return [getattr(each, name) for each in self.rounds]

    @property
    def ratio(self) -> float:
        """The messages' time over the computation's."""
        return self.spread("comm").median / self.spread("compute").median

    @property
    def by_timings(self) -> Verdict:
        """What is hidden, by the three timings."""
        return self._verdict("hidden")

    @property
    def by_waits(self) -> Verdict:
        """What is hidden, by the waits."""
        if not self.waits:
            return Verdict(None, "not measured on a GPU")
        return self._verdict("hidden_by_waits")

    def _verdict(self, name: str) -> Verdict:
        if self.obstacle:
            return Verdict(None, self.obstacle)
        return Verdict(None, NOTHING) if self.ratio < NEGLIGIBLE else told(self._all(name))

    @property
    def settled(self) -> bool:
        """Whether more rounds are not needed, or would not help."""
        return self.by_timings.text not in (FEW, NOISY)

    def row(self) -> dict[str, Any]:
        """All of it, for a file: medians by name, and the lower and upper quartiles by the same names."""
        named = {f"{name}_seconds": self.spread(name) for name in ("comm", "compute", "both", "exposed")}
        named["hidden_fraction"] = self.spread("hidden")
        named["hidden_by_waits"] = self.spread("hidden_by_waits")
        row: dict[str, Any] = {"schedule": self.schedule, "part": self.part, "rounds": len(self.rounds)}
        row |= {name: found.median for name, found in named.items()}
        row |= {"hidden_fraction": self.by_timings.fraction, "verdict": self.by_timings.text,
                "hidden_by_waits": self.by_waits.fraction, "verdict_by_waits": self.by_waits.text}
        row["quartiles"] = {name: [found.lower, found.upper] for name, found in named.items()}
        if not self.waits:
            row["exposed_seconds"] = None
            del row["quartiles"]["exposed_seconds"], row["quartiles"]["hidden_by_waits"]
        return row
