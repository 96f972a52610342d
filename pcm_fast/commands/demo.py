"""``pcm-fast demo``: two questions, each answered under several preferences by the trained experts and their PCM."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pcm_fast.commands.explain import Explanation, bar, colour, legend
from pcm_fast.commands.terminal import TokenCount, plain, progress
from pcm_fast.model import MixtureModel
from pcm_fast.preference import Preference

QUESTIONS = ("What should I do on a rainy Sunday?", "How do bees make honey?")
PREFERENCES: tuple[Preference, ...] = (
    "keep it short",
    "be warm and make me laugh",
    {"elementary": 1.0, "friendly": 0.5},
)


def run_demo(model: MixtureModel, console: Console, options: dict[str, Any]) -> None:
    """Answer every question under every preference, and show who wrote what.

    Args:
        model: the trained experts, weighed by the trained PCM.
        console: where everything is printed.
        options: keywords of ``generate``.
    """
    started = time.perf_counter()
    console.print("One model of 135 million parameters, and six trained experts on it (LoRA adapters).")
    console.print("Before every token a trained Preference Control Model reads the preference and the text so far,")
    console.print("and weighs the experts.")
    console.print()
    if not plain(console):
        console.print(
            Text.assemble("Every token is in the colour of the expert that gave it most: ", legend(model.expert_names))
        )
        console.print()
    shown: list[tuple[str, Explanation]] = []
    for question in QUESTIONS:
        heading(console, question)
        for preference in PREFERENCES:
            shown.append((words(preference), show(model, console, question, preference, options)))
    heading(console, "Who wrote what: mean weight and mean share of every expert, over both answers")
    console.print(share_table(shown))
    console.print()
    label, explanation = shown[len(PREFERENCES) - 2]
    heading(console, f"The weights as the answer goes on: {QUESTIONS[0]} [{label}]")
    console.print(explanation.weights_by_position())
    count = sum(int(e.timings["tokens"]) for _, e in shown)
    decode = sum(e.timings["decode"] for _, e in shown)
    console.print()
    console.print(
        f"{len(shown)} answers, {count} tokens in all, {count / decode:.1f} tokens/s on the {model.backend} backend; "
        f"{time.perf_counter() - started:.0f} s altogether."
    )
    console.print('Your turn:  .venv/bin/pcm-fast generate "Explain tides." --preference "make it funny" --explain')


def show(
    model: MixtureModel,
    console: Console,
    question: str,
    preference: Preference,
    options: dict[str, Any],
) -> Explanation:
    """Answer a question and print the answer."""
    with progress("reading", options["max_new_tokens"]) as advance:
        output = model.generate(
            **model.chat_inputs(question, preference=preference),
            preference=preference,
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
    """A line per expert; for every preference its mean weight, its mean share, and that as a bar."""
    table = Table(box=None, pad_edge=False, show_edge=False)
    table.add_column("", no_wrap=True)
    labels = dict.fromkeys(label for label, _ in shown)
    means = []
    for label in labels:
        table.add_column(label, no_wrap=True)
        answers = [explanation for other, explanation in shown if other == label]
        weights = np.concatenate([answer.weights for answer in answers]).mean(axis=0)
        shares = np.concatenate([answer.shares for answer in answers]).mean(axis=0)
        means.append((weights, shares))
    for i, name in enumerate(shown[0][1].names):
        cells = [f"{w[i]:.2f} {s[i]:.2f} {bar(s[i], 10)}" if w[i] else "" for w, s in means]
        table.add_row(Text(name, colour(i)), *(Text(cell, colour(i)) for cell in cells))
    return table


def words(preference: Preference) -> str:
    """A preference on one line."""
    if isinstance(preference, Mapping):
        return ", ".join(f"{name}={strength:g}" for name, strength in preference.items())
    return preference or "none"
