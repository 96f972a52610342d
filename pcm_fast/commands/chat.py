"""``pcm-fast chat``: a conversation in the terminal, with a preference that may change from turn to turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from pcm_fast.commands.explain import Explanation
from pcm_fast.commands.terminal import TokenCount, one_line, plain, printable, progress
from pcm_fast.model import MixtureModel
from pcm_fast.preference import Preference

HELP = """\
/preference TEXT   what answers shall be like from now on: words, name=strength,..., or none; alone: show it
/seed N            seed of the draws from now on
/explain           colour answers by leading expert, or stop doing so
/reset             forget the conversation
/quit              leave (so does the end of the input)"""


@dataclass
class Conversation:
    """A conversation with a mixture, and how its answers are drawn.

    Attributes:
        model: who answers.
        console: where answers are printed.
        preference: what answers shall be like.
        parse_preference: reads a preference, given the name of who asks and the text; ValueError if it cannot.
        options: keywords of ``generate``.
        explain: whether answers are shown by leading expert.
        messages: what has been said.
    """

    model: MixtureModel
    console: Console
    preference: Preference
    parse_preference: Callable[[str, str], Preference]
    options: dict[str, Any]
    explain: bool = False
    messages: list[dict[str, str]] = field(default_factory=list)

    def run(self, read_line: Callable[[], str]) -> None:
        """Answer one line after another, until ``/quit`` or EOFError. An error ends the turn, not the conversation."""
        while True:
            try:
                line = read_line().strip()
            except EOFError:
                return
            try:
                if line.startswith("/"):
                    command, _, argument = line.partition(" ")
                    if command == "/quit":
                        return
                    self.obey(command, argument.strip())
                elif line:
                    self.answer(line)
            except ValueError as error:
                self.console.print(f"error: {one_line(error)}", style="red")

    def obey(self, command: str, argument: str) -> None:
        """Carry out a command; ValueError if there is no such command or its argument is malformed."""
        if command == "/preference":
            if argument:
                self.preference = None if argument == "none" else self.parse_preference(command, argument)
            self.console.print(f"preference: {self.preference or 'none'}")
        elif command == "/seed":
            if not argument.isdecimal():
                raise ValueError(f"/seed: expected an integer >= 0, got {argument!r}")
            self.options["seed"] = int(argument)
        elif command == "/explain":
            self.explain = not self.explain
        elif command == "/reset":
            self.messages.clear()
        elif command == "/help":
            self.console.print(HELP)
        else:
            raise ValueError(f"unknown command {command!r}; /help lists the commands")

    def answer(self, question: str) -> None:
        """Answer, print, and remember both; a failed or interrupted turn is not remembered."""
        messages = [*self.messages, {"role": "user", "content": question}]
        if self.explain:
            with progress("reading", self.options["max_new_tokens"]) as advance:
                inputs = self.model.chat_inputs(messages, preference=self.preference)
                output = self.model.generate(
                    **inputs,
                    preference=self.preference,
                    streamer=TokenCount(advance),
                    return_dict_in_generate=True,
                    **self.options,
                )
            explanation = Explanation.of(output, self.model.tokenizer)
            answer = explanation.text
            self.console.print(explanation.coloured())
            self.console.print(explanation.summary())
        else:
            answer = self.model.chat(messages, preference=self.preference, streamer=self._write, **self.options)
            self.console.print()
        self.messages = [*messages, {"role": "assistant", "content": answer}]

    def _write(self, piece: str) -> None:
        self.console.file.write(piece if plain(self.console) else printable(piece))
        self.console.file.flush()
