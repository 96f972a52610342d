"""What falls short of what was set out to be shown, in words. Each is read off the numbers; none is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

EFFECT = 0.8  # Cohen's d by which an expert should move its own reward
FLUENCY = -0.5  # nats a token by which it may become less fluent
PROMPTS, PREFERENCES = 100, 8  # for a comparison worth the name
LEADS = 0.5  # share of a dimension's held-out wordings at which its expert should have the greatest weight
CLEAR_OF = ("soup", "prompting", "uniform")  # baselines that the PCM should beat beyond chance


def shortfalls(
    summary: Mapping[str, Any], wordings: Sequence[Mapping[str, Any]], num_prompts: int, missing: Mapping[str, str]
) -> list[str]:
    """Sentences, empty if nothing falls short.

    Args:
        summary: what ``summarise`` gives.
        wordings: what ``read_wordings`` gives, or nothing.
        num_prompts: how many prompts it is about.
        missing: why methods are missing, by name.
    """
    found = []
    if num_prompts < PROMPTS or len(summary["preferences"]) < PREFERENCES:
        found.append(
            f"This is a small run: {num_prompts} prompts and {len(summary['preferences'])} composite preferences, "
            f"where {PROMPTS} and {PREFERENCES} were set as the least."
        )
    for name, expert in summary["experts"].items():
        effect, in_base = expert["d"][name]["value"], expert["in_base_standard_deviations"][name]
        if effect is None or min(effect, in_base or 0.0) < EFFECT:
            found.append(
                f"The {name} expert moves its own reward by d = {number(effect)} ({number(in_base)} standard "
                f"deviations of the base), less than {EFFECT}."
            )
        change = expert["fluency_change"]["value"]
        if change is None or change < FLUENCY:
            found.append(f"The {name} expert is less fluent than the base by {number(change, sign=-1)} nats a token.")
    found += _pcm(summary)
    for row in wordings:
        if row["leads"] < LEADS:
            found.append(
                f"Where {row['dimension']} is asked for in words that the PCM was not trained on, that expert has the "
                f"greatest weight for {100 * row['leads']:.0f} % of {row['wordings']} wordings."
            )
    found += [f"Left out: {name}, since {reason}." for name, reason in missing.items()]
    return found


def _pcm(summary: Mapping[str, Any]) -> list[str]:
    methods = {method["name"]: method for method in summary["methods"]}
    if "pcm" not in methods:
        return []
    found = []
    own = methods["pcm"]["average_win_rate"]["value"]
    better = [
        method["label"]
        for method in methods.values()
        if method["kind"] in ("baseline", "expert") and method["average_win_rate"]["value"] >= own
    ]
    if better:
        found.append(f"The PCM's average win rate ({number(own)}) is not above that of: {', '.join(better)}.")
    names = summary["win_rates"]["methods"]
    row = names.index("pcm")
    for name in CLEAR_OF:
        if name not in methods:
            continue
        column = names.index(name)
        value, low, high = (summary["win_rates"][end][row][column] for end in ("value", "low", "high"))
        if low <= 0.5:
            found.append(
                f"Against {methods[name]['label']} the PCM's win rate is {number(value)}, with a 95 % interval from "
                f"{number(low)} to {number(high)}: not clear of one half."
            )
    for method in methods.values():
        if method["kind"] == "ablation" and method["composite"]["value"] > methods["pcm"]["composite"]["value"]:
            found.append(
                f"The ablation {method['label']!r} has the greater mean composite reward: "
                f"{number(method['composite']['value'], 3)} against {number(methods['pcm']['composite']['value'], 3)}."
            )
    return found


def number(value: float | None, digits: int = 2, sign: int = 1) -> str:
    """A number as it stands in a sentence."""
    return "unknown" if value is None else f"{sign * value:.{digits}f}"
