"""``pcm-fast generate``: one answer, printed as it comes, explained, or as JSON."""

from __future__ import annotations

import json
from typing import Any

from rich.text import Text

from pcm_fast.commands import terminal
from pcm_fast.commands.explain import Explanation, legend
from pcm_fast.model import MixtureModel
from pcm_fast.preference import Preference
from pcm_fast.streaming import TextStreamer


def print_answer(
    model: MixtureModel,
    prompt: str,
    preference: Preference,
    options: dict[str, Any],
    *,
    raw: bool,
    explain: bool,
    tokens: bool,
    as_json: bool,
) -> None:
    """Answer a prompt and print the answer: as it comes on a terminal; once complete elsewhere, or if explained.

    Args:
        model: who answers.
        prompt: a user message; with raw, a text to continue.
        preference: see ``MixtureModel.generate``.
        options: further keywords of ``generate``.
        raw: do without the chat template.
        explain: colours and a summary.
        tokens: and a line per token.
        as_json: print JSON in place of text.
    """
    console = terminal.output()
    prompts: dict[str, Any]
    if raw:
        prompts = {"input_ids": [model.tokenizer.encode(prompt)]}
    else:
        prompts = model.chat_inputs(prompt, preference=preference)
    if console.is_terminal and not (explain or as_json):

        def write(piece: str) -> None:
            console.file.write(terminal.printable(piece))
            console.file.flush()

        model.generate(**prompts, preference=preference, streamer=TextStreamer(model.tokenizer, write), **options)
        console.print()
        return
    with terminal.progress("reading the prompt", options["max_new_tokens"]) as advance:
        output = model.generate(
            **prompts,
            preference=preference,
            streamer=terminal.TokenCount(advance),
            return_dict_in_generate=True,
            **options,
        )
    explanation = Explanation.of(output, model.tokenizer)
    if as_json:
        console.file.write(json.dumps(explanation.as_json()) + "\n")
    elif explain:
        plain = terminal.plain(console)
        if not plain:
            console.print(legend(explanation.names), end="\n\n")
        console.print(explanation.coloured(), end="\n\n")
        console.print(explanation.summary())
        if tokens:
            console.print()
            console.print(explanation.by_token(plain=plain))
        console.print(Text(f"\n{explanation.speed()}", "dim"))
    else:
        console.file.write(explanation.text + "\n")
