"""An answer in the terminal: coloured by leading expert, who contributed how much, token by token.

The *share* of an expert in a token is how much of the token's probability came from it (``generation.expert_shares``).
The expert with the greatest share leads the token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from rich.table import Table
from rich.text import Text

from pcm_fast.generation import GenerateOutput, expert_shares
from pcm_fast.streaming import TextStreamer
from pcm_fast.tokenizer import Tokenizer

Float32 = npt.NDArray[np.float32]

COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red", "bright_cyan", "bright_magenta", "bright_yellow")
EIGHTHS = ("", "▏", "▎", "▍", "▌", "▋", "▊", "▉")
HEIGHTS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Explanation:
    """What is to be shown of one answer of T tokens by K experts.

    Attributes:
        names: the K experts.
        tokens: [T] int64.
        pieces: the T texts of the tokens; empty for a special token, or where a character is not complete.
        logprobs: [T] float32, log-probability of each token under the mixture.
        weights: [T, K] float32, mixture weights.
        shares: [T, K] float32, each expert's part of the token's probability; rows sum to 1.
        timings: seconds for "prefill" and "decode", "time_to_first_token" in seconds, and the number of "tokens".
    """

    names: Sequence[str]
    tokens: npt.NDArray[np.int64]
    pieces: Sequence[str]
    logprobs: Float32
    weights: Float32
    shares: Float32
    timings: dict[str, float]

    @staticmethod
    def of(output: GenerateOutput, tokenizer: Tokenizer, row: int = 0) -> Explanation:
        """Of one row of what ``generate(..., return_dict_in_generate=True)`` returned."""
        length = int(output.lengths[row])
        start = len(output.sequences[row]) - np.shape(output.logprobs)[1]
        tokens = np.asarray(output.sequences)[row, start : start + length]
        return Explanation(
            names=output.expert_names,
            tokens=tokens,
            pieces=token_pieces(tokenizer, tokens.tolist()),
            logprobs=np.asarray(output.logprobs)[row, :length],
            weights=np.asarray(output.mixture_weights)[row, :length],
            shares=expert_shares(output)[row, :length],
            timings=output.timings,
        )

    @property
    def text(self) -> str:
        """The answer."""
        return "".join(self.pieces)

    @property
    def active(self) -> list[int]:
        """Indices of the experts that took part."""
        return [int(i) for i in np.flatnonzero(self.weights.any(axis=0))]

    def coloured(self) -> Text:
        """The answer, every token in the colour of its leading expert."""
        text = Text()
        for piece, leader in zip(self.pieces, self.shares.argmax(axis=1), strict=True):
            text.append(piece, style=colour(int(leader)))
        return text

    def summary(self) -> Table:
        """A line per expert that took part: mean weight, mean share (number and bar), and how many tokens it leads."""
        table = _table("expert", "weight", "share", "", "leads")
        leads = np.bincount(self.shares.argmax(axis=1), minlength=len(self.names))
        for i in self.active:
            weight, share = float(self.weights[:, i].mean()), float(self.shares[:, i].mean())
            lead = f"{leads[i]} of {len(self.pieces)}"
            name, length = Text(self.names[i], colour(i)), Text(bar(share), colour(i))
            table.add_row(name, f"{weight:.2f}", f"{share:.2f}", length, lead)
        return table

    def weights_by_position(self, first: int = 64) -> Table:
        """A line per expert that took part: its weight at each of the first tokens, as a column of that height."""
        table = Table(box=None, pad_edge=False, show_edge=False, show_header=False)
        table.add_column("expert", no_wrap=True)
        table.add_column("weights", no_wrap=True)
        for i in self.active:
            heights = np.rint(self.weights[:first, i] * (len(HEIGHTS) - 1)).astype(int)
            table.add_row(Text(self.names[i], colour(i)), Text("".join(HEIGHTS[h] for h in heights), colour(i)))
        return table

    def by_token(self, first: int | None = None, plain: bool = False) -> Table:
        """A line per token: text, probability, every active expert's weight and share, and the shares as a bar.

        Args:
            first: so many tokens only.
            plain: draw the bar with a letter of each expert's name in place of colours.
        """
        headings = [Text(self.names[i], colour(i)) for i in self.active]
        table = _table("token", "p", *headings, "shares")
        for t, piece in enumerate(self.pieces[:first]):
            token = Text(visible(piece), colour(int(self.shares[t].argmax())))
            token.truncate(12, overflow="ellipsis")
            cells = [Text(f"{self.weights[t, i]:.2f} {self.shares[t, i]:.2f}", colour(i)) for i in self.active]
            table.add_row(token, f"{np.exp(self.logprobs[t]):.2f}", *cells, self._stacked(t, plain))
        return table

    def speed(self) -> str:
        """Tokens, tokens per second and the time to the first token, in words."""
        count, decode = int(self.timings["tokens"]), self.timings["decode"]
        rate = f", {(count - 1) / decode:.1f} tokens/s" if decode > 0 and count > 1 else ""
        return f"{count} token{'s' * (count != 1)}{rate}, first token after {self.timings['time_to_first_token']:.2f} s"

    def as_json(self) -> dict[str, object]:
        """Everything, for programs."""
        rows = zip(self.tokens.tolist(), self.pieces, self.logprobs.tolist(), self.weights, self.shares, strict=True)
        return {
            "text": self.text,
            "experts": list(self.names),
            "tokens": [
                {"id": token, "text": piece, "logprob": logprob, "weights": w.tolist(), "shares": s.tolist()}
                for token, piece, logprob, w, s in rows
            ],
            "timings": self.timings,
        }

    def _stacked(self, token: int, plain: bool, width: int = 12) -> Text:
        """The shares of one token, side by side."""
        ends = np.rint(np.cumsum(np.clip(self.shares[token], 0, 1)) * width).astype(int)
        text = Text()
        for i, count in enumerate(np.diff(ends, prepend=0)):
            text.append((letters(self.names)[i] if plain else "█") * int(count), colour(i))
        return text


def token_pieces(tokenizer: Tokenizer, tokens: Iterable[int]) -> list[str]:
    """The text that each token adds; a character spread over several tokens comes with the last of them."""
    pieces: list[str] = []

    def add(piece: str) -> None:
        pieces[-1] += piece

    streamer = TextStreamer(tokenizer, add)
    streamer.put([])
    for token in tokens:
        pieces.append("")
        streamer.put([token])
    if pieces:
        streamer.end()
    return pieces


def letters(names: Sequence[str]) -> list[str]:
    """A letter for each name: the first in it that no earlier name has, or "?"."""
    found: list[str] = []
    for name in names:
        found.append(next((letter for letter in name if letter not in found), "?"))
    return found


def colour(expert: int) -> str:
    """The colour of an expert, by its index."""
    return COLOURS[expert % len(COLOURS)]


def legend(names: Iterable[str]) -> Text:
    """The names of the experts in their colours."""
    return Text("  ").join(Text(f"■ {name}", colour(i)) for i, name in enumerate(names))


def bar(value: float, width: int = 24) -> str:
    """A bar for a value in [0, 1], to an eighth of a character."""
    eighths = round(min(max(value, 0.0), 1.0) * width * 8)
    return "█" * (eighths // 8) + EIGHTHS[eighths % 8]


def visible(piece: str) -> str:
    """A token's text on one line, blanks included: ``·`` for a space, ``↵`` for a new line, ``∅`` for no text."""
    return piece.replace(" ", "·").replace("\n", "↵") or "∅"


def _table(*headings: str | Text) -> Table:
    table = Table(box=None, pad_edge=False, show_edge=False)
    for heading in headings:
        table.add_column(
            heading, justify="right" if heading in ("p", "weight", "share", "leads") else "left", no_wrap=True
        )
    return table
