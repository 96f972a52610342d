"""``pcm-fast demo``: two questions, each answered under several preferences by the same experts."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pcm_fast.commands.explain import Explanation, bar, colour, legend
from pcm_fast.commands.terminal import TokenCount, plain, progress
from pcm_fast.model import MixtureModel
from pcm_fast.pcm import CallablePCM, PCMContext
from pcm_fast.preference import Preference
from pcm_fast.presets import PROMPTED_EXPERTS

QUESTIONS = ("What should I do on a rainy Sunday?", "Tell me about dogs.")
PREFERENCES: tuple[Preference, ...] = (
    "concise",
    "friendly and humorous",
    {"elementary": 1.0, "friendly": 0.5},
)
CHANGE_AT = 12


def run_demo(model: MixtureModel, console: Console, options: dict[str, Any]) -> None:
    """Answer every question under every preference, then one more with weights that change as the answer goes on.

    Args:
        model: its experts are the prompted experts, its PCM weighs them by name.
        console: where everything is printed.
        options: keywords of ``generate``.
    """
    started = time.perf_counter()
    console.print("One model, four experts on it, each under a system prompt of its own:")
    for i, (name, system) in enumerate(PROMPTED_EXPERTS.items()):
        console.print(Text.assemble("  ", (f"{name}: ", colour(i)), system))
    console.print()
    if not plain(console):
        console.print(
            Text.assemble("Every token is in the colour of the expert that gave it most: ", legend(model.expert_names))
        )
    shown: list[tuple[str, Explanation]] = []
    for question in QUESTIONS:
        heading(console, question)
        for preference in PREFERENCES:
            shown.append((words(preference), show(model, console, question, preference, options)))
    heading(console, "Who wrote what: mean weight and mean share of every expert, over both answers")
    console.print(share_table(shown))
    console.print()
    heading(console, f"{QUESTIONS[1]} (weights that change: friendly for {CHANGE_AT} tokens, then elementary)")
    changing = MixtureModel(replace(model.spec, pcm=CallablePCM(first_friendly_then_elementary)))
    explanation = show(changing, console, QUESTIONS[1], None, options, active=("friendly", "elementary"))
    console.print("Token by token, for every expert its weight and its share of the token:")
    console.print(explanation.by_token(first=2 * CHANGE_AT, plain=plain(console)))
    count = sum(int(e.timings["tokens"]) for _, e in shown)
    decode = sum(e.timings["decode"] for _, e in shown)
    console.print()
    console.print(
        f"{len(shown)} answers, {count} tokens in all, {count / decode:.1f} tokens/s on the {model.backend} backend; "
        f"{time.perf_counter() - started:.0f} s altogether."
    )
    console.print('Your turn:  .venv/bin/pcm-fast generate "Explain tides." --preference "humorous" --explain')


def show(
    model: MixtureModel,
    console: Console,
    question: str,
    preference: Preference,
    options: dict[str, Any],
    active: tuple[str, ...] | None = None,
) -> Explanation:
    """Answer a question and print the answer."""
    with progress("reading", options["max_new_tokens"]) as advance:
        output = model.generate(
            **model.chat_inputs(question, preference=preference, active=active),
            preference=preference,
            active=active,
            streamer=TokenCount(advance),
            return_dict_in_generate=True,
            **options,
        )
    explanation = Explanation.of(output, model.tokenizer)
    label = f"[{words(preference)}] " if preference is not None else ""
    console.print(Text.assemble((label, "bold"), explanation.coloured()))
    console.print(Text(f"    {explanation.speed()}", "dim"))
    console.print()
    return explanation


def heading(console: Console, text: str) -> None:
    """A line that opens a part of the demo."""
    console.print(Text(text, "bold underline"), end="\n\n")


def share_table(shown: list[tuple[str, Explanation]]) -> Table:
    """A line per preference; for every expert that took part its mean weight, its mean share, and that as a bar."""
    table = Table(box=None, pad_edge=False, show_edge=False)
    table.add_column("preference", no_wrap=True)
    names = shown[0][1].names
    for i, name in enumerate(names):
        table.add_column(Text(name, colour(i)), no_wrap=True)
    for label in dict.fromkeys(label for label, _ in shown):
        answers = [explanation for other, explanation in shown if other == label]
        weights = np.concatenate([answer.weights for answer in answers]).mean(axis=0)
        shares = np.concatenate([answer.shares for answer in answers]).mean(axis=0)
        means = zip(weights, shares, strict=True)
        cells = [f"{weight:.2f} {share:.2f} {bar(share, 5)}" if weight else "" for weight, share in means]
        table.add_row(label, *(Text(cell, colour(i)) for i, cell in enumerate(cells)))
    return table


def words(preference: Preference) -> str:
    """A preference on one line."""
    if isinstance(preference, Mapping):
        return ", ".join(f"{name}={strength:g}" for name, strength in preference.items())
    return preference or "none"


def first_friendly_then_elementary(context: PCMContext) -> dict[str, float]:
    """A PCM written by hand: mixture weights for the next token, from nothing but how far the answer is."""
    friendly = 0.9 if context.step < CHANGE_AT else 0.1
    return {"friendly": friendly, "elementary": 1.0 - friendly}
