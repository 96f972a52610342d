"""Dimensions of preference, from the file that describes them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from pcm_fast.train.toml import read_toml, section, take

DATA = Path(str(resources.files("pcm_fast.train"))) / "data"


@dataclass(frozen=True)
class Dimension:
    """One thing an answer can be: how it is measured, and how people ask for it.

    Attributes:
        name: also the name of its expert.
        train, held_out: wordings of the preference, such as "keep it short"; the second are never trained on.
        strong, weak: wordings of graded strength.
        system: the system prompt that asks for it (preference prompting).
        styles: system prompts under which further answers are drawn for its expert to learn from.
        reward: the scorer: the name of one of ours, or "file.py:function", a function of (prompts, answers) that gives
            a number for each; the path is relative to the file with the dimensions.
    """

    name: str
    train: tuple[str, ...]
    held_out: tuple[str, ...]
    system: str
    strong: tuple[str, ...] = ()
    weak: tuple[str, ...] = ()
    styles: tuple[str, ...] = ()
    reward: str = ""


def read_dimensions(path: Path) -> tuple[dict[str, Dimension], tuple[tuple[str, str], ...], tuple[str, ...]]:
    """Dimensions by name, compatible pairs and joins from their file."""
    table = read_toml(path)
    pairs = table.pop("compatible", None)
    joins = tuple(take(path, table, "joins", list, ["{}"]))
    if not all(isinstance(join, str) and join.count("{}") == 1 for join in joins):
        raise ValueError(f"{path}: joins: expected sentences with one '{{}}' each, got {joins!r}")
    dimensions = {}
    for name, entry in table.items():
        if not isinstance(entry, dict):
            raise ValueError(f"{path}: {name}: expected a table that describes a dimension, got {entry!r}")
        dimension = section(path, name, Dimension, {"name": name, **entry})
        reward = dimension.reward or name
        if ".py:" in reward:
            reward = str(path.parent / reward)
        dimensions[name] = replace(dimension, reward=reward)
    if len(dimensions) < 1:
        raise ValueError(f"{path}: expected a table for at least one dimension, got none")
    if pairs is None:
        names = list(dimensions)
        pairs = [[a, b] for i, a in enumerate(names) for b in names[i + 1 :]]
    for pair in pairs:
        if len(pair) != 2 or not set(pair) <= set(dimensions):
            raise ValueError(f"{path}: compatible: expected pairs of dimensions, got {pair!r}")
    return dimensions, tuple((a, b) for a, b in pairs), joins
