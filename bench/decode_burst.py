"""Candidates measured in alternation: in every turn each runs a short burst, and ratios are taken within the turn."""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

# Seconds before every burst. The idle threads of torch and llama.cpp spin for 4 to 6 ms after their last work, and not
# at all from then on (CPU time of the process while asleep); so OMP_WAIT_POLICY can stay as their users have it.
PAUSE = 0.1


@dataclass(frozen=True)
class Burst:
    """What one candidate did in one turn.

    Attributes:
        steps: seconds for each token after the first.
        first: seconds from the prompt to the first token.
        parts: seconds a step by part of the step, where the candidate knows them.
    """

    steps: list[float]
    first: float
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def step(self) -> float:
        """The median of the turn."""
        return statistics.median(self.steps)


class Decoder(Protocol):
    """Something that continues a prompt.

    Attributes:
        step_bytes: what a step reads from memory at least: weights, adapters and KV cache; 0 where unknown.
        stored_bytes: weights, adapters and KV cache that stay in memory, for ours; 0 for the others.
    """

    step_bytes: int
    stored_bytes: int

    def run(self, turn: int) -> Burst:
        """One burst; no two turns have the same prompt."""


@dataclass(frozen=True)
class Candidate:
    """A decoder by name, built by the process that measures it."""

    name: str
    build: Callable[[], Decoder]


@dataclass(frozen=True)
class Spread:
    """The median of the turns, the lowest and the highest."""

    median: float
    lowest: float
    highest: float

    @staticmethod
    def of(values: Sequence[float]) -> "Spread":
        return Spread(statistics.median(values), min(values), max(values))

    def range(self, digits: int = 3) -> str:
        return f"{self.lowest:.{digits}g} to {self.highest:.{digits}g}"


def interleave(decoders: dict[str, Decoder], turns: int) -> dict[str, list[Burst]]:
    """The bursts of every decoder, one a turn; another one begins each turn."""
    bursts: dict[str, list[Burst]] = {name: [] for name in decoders}
    names = list(decoders)
    for turn in range(turns):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            time.sleep(PAUSE)
            bursts[name].append(decoders[name].run(turn))
            print(f"turn {turn + 1} of {turns}: {bursts[name][-1].step * 1e3:9.2f} ms  {name}", file=sys.stderr)
    return bursts


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """One quotient a turn."""
    return Spread.of([n / d for n, d in zip(numerator, denominator, strict=True)])


def steps(bursts: Sequence[Burst]) -> list[float]:
    """Seconds a token in every turn."""
    return [burst.step for burst in bursts]
