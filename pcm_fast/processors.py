"""Processors act on the merged log-probabilities, after the merge and before the draw (step 4).

They are applied in the order of the fields of ``Processors``; a caller's own Hugging Face processors come after them.
"The text" of a row is its prompt (without padding and without the experts' own system turns) and what was generated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Processors:
    """Checked settings of the built-in processors; the defaults change nothing.

    Attributes:
        logit_bias: added to the log-probability, by token id; -inf bans.
        banned_tokens: ids that are never drawn.
        repetition_penalty: for tokens that occur in the text, a negative log-probability is multiplied by it and a
            positive one (after a bias) divided; 1 changes nothing, as in Hugging Face's processor.
        presence_penalty: subtracted once from every token that was generated before, as in OpenAI's API.
        frequency_penalty: subtracted for every time the token was generated before, as in OpenAI's API.
        no_repeat_ngram_size: no sequence of this many tokens occurs twice in the text; 0 allows all.
        min_new_tokens: end-of-sequence tokens are banned before this many tokens.
        eos_token_ids: the end-of-sequence tokens that min_new_tokens is about.
    """

    logit_bias: Mapping[int, float] = field(default_factory=dict)
    banned_tokens: tuple[int, ...] = ()
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    min_new_tokens: int = 0
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.logit_bias, Mapping):
            raise TypeError(f"logit_bias: expected a mapping from token id to bias, got {self.logit_bias!r}")
        for token, bias in self.logit_bias.items():
            check_count("logit_bias", token)
            if isinstance(bias, bool) or not isinstance(bias, Real):
                raise TypeError(f"logit_bias: expected a number for token {token}, got {bias!r}")
            if math.isnan(bias) or bias == math.inf:
                raise ValueError(f"logit_bias: expected a finite number or -inf for token {token}, got {bias!r}")
        if isinstance(self.banned_tokens, (str, bytes)) or not isinstance(self.banned_tokens, (Sequence, np.ndarray)):
            raise TypeError(f"banned_tokens: expected a sequence of token ids, got {self.banned_tokens!r}")
        for token in self.banned_tokens:
            check_count("banned_tokens", token)
        for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
            number = getattr(self, name)
            if isinstance(number, bool) or not isinstance(number, Real):
                raise TypeError(f"{name}: expected a number, got {number!r}")
            if not math.isfinite(number):
                raise ValueError(f"{name}: expected a finite number, got {number!r}")
        if self.repetition_penalty <= 0:
            raise ValueError(f"repetition_penalty: expected a number > 0, got {self.repetition_penalty!r}")
        check_count("no_repeat_ngram_size", self.no_repeat_ngram_size)
        check_count("min_new_tokens", self.min_new_tokens)

    def check_vocabulary(self, vocab_size: int) -> None:
        """ValueError if a token id among the settings is not below vocab_size."""
        for name, tokens in (("logit_bias", tuple(self.logit_bias)), ("banned_tokens", self.banned_tokens)):
            for token in tokens:
                if token >= vocab_size:
                    raise ValueError(f"{name}: expected token ids below the vocabulary size {vocab_size}, got {token}")

    def apply(self, log_p: Float32, prompt: Tokens, generated: Tokens) -> Float32:
        """Processed log-probabilities of one row, not normalised again.

        Args:
            log_p: [V] float32, merged log-probabilities; left as it is.
            prompt: [P] int64, the row's prompt.
            generated: [T] int64, the row's tokens so far.

        Returns:
            [V] float32.
        """
        log_p = log_p.copy()
        for token, bias in self.logit_bias.items():
            log_p[token] += np.float32(bias)
        if len(self.banned_tokens):
            log_p[list(self.banned_tokens)] = -np.inf
        if self.repetition_penalty != 1:
            seen = np.unique(np.concatenate([prompt, generated]))
            penalty = np.float32(self.repetition_penalty)
            log_p[seen] = np.where(log_p[seen] < 0, log_p[seen] * penalty, log_p[seen] / penalty)
        if self.presence_penalty or self.frequency_penalty:
            tokens, counts = np.unique(generated, return_counts=True)
            log_p[tokens] -= (self.presence_penalty + self.frequency_penalty * counts).astype(np.float32)
        if self.no_repeat_ngram_size:
            log_p[repeating_tokens(np.concatenate([prompt, generated]), self.no_repeat_ngram_size)] = -np.inf
        if len(generated) < self.min_new_tokens:
            log_p[list(self.eos_token_ids)] = -np.inf
        return log_p


def repeating_tokens(text: Tokens, size: int) -> Tokens:
    """Tokens that would complete, at the end of text [L], an n-gram of this size that text already contains."""
    if len(text) < size:
        return text[:0]
    ngrams = np.lib.stride_tricks.sliding_window_view(text, size)
    last = text[len(text) - size + 1 :]
    return np.unique(ngrams[(ngrams[:, :-1] == last).all(axis=1), -1])


def check_count(name: str, value: int) -> None:
    """TypeError or ValueError unless value is an integer >= 0."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected an integer >= 0, got {value!r}")
    if value < 0:
        raise ValueError(f"{name}: expected an integer >= 0, got {value!r}")
