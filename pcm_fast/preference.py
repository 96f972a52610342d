"""What the user wants, in words or as strengths: which experts are active, and how strongly each is asked for."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real

Preference = str | Mapping[str, float] | None

# "not too humorous", "without being long-winded": a denial reaches a name at most three words on, in the same clause.
_DENIAL = re.compile(r"\b(?:not|no|non|never|without|less|\w+n['’]t)\b[\s-]+(?:\w+[\s-]+){0,3}$")


@dataclass(frozen=True, slots=True)
class ResolvedPreference:
    """A preference held against the names of the experts.

    Attributes:
        text: the preference in words, as a learned PCM reads it; empty if there is none.
        strengths: strength of every expert that was named, None if the preference is text or absent.
        active: indices of the active experts, ascending.
    """

    text: str
    strengths: Mapping[str, float] | None
    active: tuple[int, ...]


def resolve_preference(
    preference: Preference, expert_names: Sequence[str], active: Sequence[str] | None = None
) -> ResolvedPreference:
    """Check a preference and decide which experts are active.

    A mapping activates the experts it gives a strength above 0; free text and None activate all of them. ``active``, a
    sequence of names, overrides both; a mapping may then name no expert outside it.

    Raises:
        TypeError: preference is neither text, mapping nor None, a strength is no number, active is no sequence of
            names.
        ValueError: unknown, repeated or no names; empty text; a strength that is negative, NaN or infinite; all of them
            0.
    """
    names = tuple(expert_names)
    chosen = None if active is None else _active_indices(active, names)
    if preference is None:
        return ResolvedPreference("", None, chosen or tuple(range(len(names))))
    if isinstance(preference, str):
        if not preference.strip():
            raise ValueError("preference: expected some text, got an empty string; None stands for no preference")
        return ResolvedPreference(preference.strip(), None, chosen or tuple(range(len(names))))
    if not isinstance(preference, Mapping):
        raise TypeError(f"preference: expected text, a mapping from expert to strength, or None, got {preference!r}")
    strengths = check_strengths("preference", preference, names)
    wanted = tuple(i for i, name in enumerate(names) if strengths.get(name, 0.0) > 0)
    if not wanted:
        raise ValueError(f"preference: expected a strength above 0 for at least one expert, got {dict(preference)!r}")
    outside = [names[i] for i in wanted if chosen is not None and i not in chosen]
    if outside:
        raise ValueError(f"preference: asks for {_quoted(outside)}, which active={list(active or ())!r} leaves out")
    return ResolvedPreference(in_words(strengths), strengths, chosen or wanted)


def check_strengths(argument: str, strengths: Mapping[str, float], expert_names: Sequence[str]) -> dict[str, float]:
    """The strengths as floats, if every name is an expert's and every strength a finite number >= 0."""
    checked = check_numbers(argument, strengths, expert_names)
    for name, strength in checked.items():
        if strength < 0:
            raise ValueError(f"{argument}: expected a strength >= 0 for {name!r}, got {strength!r}")
    return checked


def check_numbers(argument: str, numbers: Mapping[str, float], expert_names: Sequence[str]) -> dict[str, float]:
    """The mapping as floats, if it is not empty, every name is an expert's and every value finite."""
    if not numbers:
        raise ValueError(
            f"{argument}: expected at least one of the experts {_quoted(expert_names)}, got an empty mapping"
        )
    for name, number in numbers.items():
        if not isinstance(name, str) or name not in expert_names:
            raise ValueError(f"{argument}: expected names of experts ({_quoted(expert_names)}), got {name!r}")
        if isinstance(number, bool) or not isinstance(number, Real):
            raise TypeError(f"{argument}: expected a number for {name!r}, got {number!r}")
        if not math.isfinite(number):
            raise ValueError(f"{argument}: expected a finite number for {name!r}, got {number!r}")
    return {name: float(number) for name, number in numbers.items()}


def named_experts(text: str, expert_names: Sequence[str]) -> tuple[int, ...]:
    """Indices of the experts whose name occurs in the text as whole words, ascending.

    Case does not matter, and "step_by_step", "step-by-step" and "step by step" are the same name. Where names overlap
    the longer one counts ("very friendly" does not name "friendly" if both are experts).

    Raises:
        ValueError: the text denies a name ("not humorous"), which weights by name cannot express.
    """
    found = []
    rest = text.casefold()
    for index, name in sorted(enumerate(expert_names), key=lambda item: -len(item[1])):
        words = [re.escape(word) for word in re.split(r"[\s_-]+", name.casefold()) if word]
        pattern = re.compile(r"(?<!\w)" + r"[\s_-]+".join(words) + r"(?!\w)")
        for match in pattern.finditer(rest):
            if _DENIAL.search(rest[: match.start()]):
                raise ValueError(
                    f"preference: {text!r} denies {name!r}, and weights by name cannot; give a mapping such as "
                    f"{{{name!r}: 0.0, ...}}, or a learned PCM"
                )
        rest, count = pattern.subn(lambda match: "\0" * len(match.group()), rest)
        if count:
            found.append(index)
    return tuple(sorted(found))


def _active_indices(active: Sequence[str], names: tuple[str, ...]) -> tuple[int, ...]:
    if isinstance(active, str) or not isinstance(active, Sequence):
        raise TypeError(f"active: expected a sequence of names of experts, got {active!r}")
    if not active:
        raise ValueError(f"active: expected at least one of the experts {_quoted(names)}, got none")
    for name in active:
        if name not in names:
            raise ValueError(f"active: expected names of experts ({_quoted(names)}), got {name!r}")
    if len(set(active)) != len(active):
        raise ValueError(f"active: expected each expert once, got {list(active)!r}")
    return tuple(sorted(names.index(name) for name in active))


def in_words(strengths: Mapping[str, float]) -> str:
    """A mapping as a learned PCM reads it, strongest first.

    ``concise and friendly``, or ``concise (1), friendly (0.5)`` where the strengths differ.
    """
    asked = sorted(((name, s) for name, s in strengths.items() if s > 0), key=lambda item: -item[1])
    if len({strength for _, strength in asked}) == 1:
        names = [name for name, _ in asked]
        return " and ".join(names) if len(names) < 3 else ", ".join(names[:-1]) + " and " + names[-1]
    return ", ".join(f"{name} ({strength:g})" for name, strength in asked)


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names)
