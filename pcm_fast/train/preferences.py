"""Preferences as people state them: dimensions, strengths, and words for both."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pcm_fast.pcm import NO_PREFERENCE
from pcm_fast.preference import in_words
from pcm_fast.train.config import Config

STRENGTHS = {"strong": 2.0, "plain": 1.0, "weak": 0.5}
MAPPED = 0.15  # of the preferences are put as a mapping of names to strengths is
DENIED = 0.1  # of those in words also say by name what is not wanted


@dataclass(frozen=True)
class Stated:
    """A preference.

    Attributes:
        text: in words, as a learned PCM reads it.
        strengths: above 0, by dimension.
    """

    text: str
    strengths: Mapping[str, float]

    @property
    def shares(self) -> dict[str, float]:
        """Strengths that add up to 1."""
        total = sum(self.strengths.values())
        return {name: strength / total for name, strength in self.strengths.items()}


def composites(config: Config, sizes: Sequence[int] = (1, 2, 3)) -> list[tuple[str, ...]]:
    """Sets of dimensions that are compatible with one another, of these sizes."""
    allowed = {frozenset(pair) for pair in config.compatible}
    found = []
    for size in sizes:
        for names in itertools.combinations(config.dimensions, size):
            if all(frozenset(pair) in allowed for pair in itertools.combinations(names, 2)):
                found.append(names)
    return found


def state(config: Config, names: Sequence[str], random: random.Random, held_out: bool = False) -> Stated:
    """A preference for these dimensions, in words drawn at random.

    Args:
        config: for the wordings.
        names: the dimensions; none stands for no preference, which asks for all alike.
        random: draws strengths, wordings, their order, what is denied and the sentence around them.
        held_out: take the wordings that are never trained on, all of plain strength.
    """
    if not names:
        return Stated(NO_PREFERENCE, dict.fromkeys(config.dimensions, 1.0))
    chosen = list(names)
    random.shuffle(chosen)
    strengths, phrases = {}, []
    for name in chosen:
        dimension = config.dimensions[name]
        kind = "plain" if held_out else random.choices(("plain", "strong", "weak"), (0.7, 0.15, 0.15))[0]
        plain = dimension.held_out if held_out else dimension.train
        wordings = {"plain": plain, "strong": dimension.strong, "weak": dimension.weak}[kind]
        if not wordings:
            kind, wordings = "plain", plain
        strengths[name] = STRENGTHS[kind]
        phrases.append(random.choice(wordings))
    if not held_out and random.random() < MAPPED:
        return Stated(in_words(strengths), strengths)
    last = random.choice((", ", " and ", ", and "))
    text = phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + last + phrases[-1]
    others = [name for name in config.dimensions if name not in strengths]
    if others and not held_out and random.random() < DENIED:
        denied = random.choice(others).replace("_", " ")
        text = random.choice(("{}, not {}", "{} but not {}", "{}, and please not {}")).format(text, denied)
    return Stated(random.choice(config.joins).format(text), strengths)
