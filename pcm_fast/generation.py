"""The keywords of ``generate``, checked, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from pcm_fast.preference import Preference
from pcm_fast.processors import Processors, check_count
from pcm_fast.sampling import MergeRule, SamplingParams

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Every keyword of ``MixtureModel.generate``; what can be checked without the model is checked when it is made.

    Attributes:
        preference: free text, or a mapping from expert to strength, or None.
        active: names of the experts that may take part; None leaves it to the preference.
        merge: "linear", "log_linear" or "power(a)".
        max_new_tokens: tokens to generate at most, per sequence.
        min_new_tokens: tokens before which no end-of-sequence token is drawn.
        do_sample, temperature, top_k, top_p, min_p, seed: see ``SamplingParams``.
        logit_bias, banned_tokens, repetition_penalty, presence_penalty, frequency_penalty, no_repeat_ngram_size:
            see ``Processors``.
        eos_token_id: an id or several that end a sequence; None takes the model's own, an empty list stands for none.
        pad_token_id: written after the end of a sequence; None takes the model's own.
        num_return_sequences: sequences per prompt; those of prompt i are the rows from i * n on.
        first_sequence: sequence index of the first row. A draw depends on (seed, sequence index, token position) alone,
            so that a job cut into batches gives the tokens it gives in one, when each batch says where it begins.
        expert_input_ids: by name, the whole prompt of an expert, in place of its system turn and input_ids.
        pcm_input_ids: the whole prompt of a learned PCM, preference included, likewise.
        pcm_interval: the PCM weighs the experts anew before every so many-th token of an answer, and its last weights
            hold in between: an approximation of the mixture unless it is 1. Weights that depend on nothing stay.
        streamer: an object with ``put`` and ``end``, as transformers' streamers; for one sequence only.
        logits_processor: Hugging Face processors, each called with (input_ids [B, L], log-probabilities [B, V]).
        stopping_criteria: Hugging Face criteria, each called with (input_ids [B, L], log-probabilities [B, V]).
        return_dict_in_generate: return a ``GenerateOutput`` in place of the sequences alone.

    Raises:
        TypeError, ValueError: the message names the keyword, what was expected and what came.
    """

    preference: Preference = None
    active: Sequence[str] | None = None
    merge: str | MergeRule = "linear"
    max_new_tokens: int = 64
    min_new_tokens: int = 0
    do_sample: bool = True
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    logit_bias: Mapping[int, float] | None = None
    banned_tokens: Sequence[int] | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None
    num_return_sequences: int = 1
    first_sequence: int = 0
    expert_input_ids: Mapping[str, Any] | None = None
    pcm_input_ids: Any = None
    pcm_interval: int = 1
    streamer: Any = None
    logits_processor: Sequence[Callable[..., Any]] | Callable[..., Any] | None = None
    stopping_criteria: Sequence[Callable[..., Any]] | Callable[..., Any] | None = None
    return_dict_in_generate: bool = False

    def __post_init__(self) -> None:
        _ = self.rule, self.sampling, self.processors(())
        for name in ("max_new_tokens", "num_return_sequences", "pcm_interval"):
            check_count(name, getattr(self, name))
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected an integer >= 1, got {getattr(self, name)!r}")
        check_count("first_sequence", self.first_sequence)
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens: expected at most max_new_tokens={self.max_new_tokens}, got {self.min_new_tokens}"
            )
        if self.pad_token_id is not None:
            check_count("pad_token_id", self.pad_token_id)
        if self.streamer is not None and not (hasattr(self.streamer, "put") and hasattr(self.streamer, "end")):
            raise TypeError(f"streamer: expected an object with the methods put and end, got {self.streamer!r}")
        for name in ("logits_processor", "stopping_criteria"):
            _ = _functions(name, getattr(self, name))
        if not isinstance(self.return_dict_in_generate, bool):
            raise TypeError(f"return_dict_in_generate: expected a bool, got {self.return_dict_in_generate!r}")

    @property
    def rule(self) -> MergeRule:
        """The merge rule."""
        return MergeRule.parse(self.merge)

    @property
    def sampling(self) -> SamplingParams:
        """How tokens are drawn."""
        return SamplingParams(self.do_sample, self.temperature, self.top_k, self.top_p, self.min_p, self.seed)

    @property
    def logits_processors(self) -> tuple[Callable[..., Any], ...]:
        """The caller's own processors."""
        return _functions("logits_processor", self.logits_processor)

    @property
    def criteria(self) -> tuple[Callable[..., Any], ...]:
        """The caller's own stopping criteria."""
        return _functions("stopping_criteria", self.stopping_criteria)

    def processors(self, eos_token_ids: tuple[int, ...]) -> Processors:
        """The built-in processors, given the tokens that end a sequence."""
        return Processors(
            logit_bias={} if self.logit_bias is None else self.logit_bias,
            banned_tokens=() if self.banned_tokens is None else self.banned_tokens,  # type: ignore[arg-type]
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            no_repeat_ngram_size=self.no_repeat_ngram_size,
            min_new_tokens=self.min_new_tokens,
            eos_token_ids=eos_token_ids,
        )


@dataclass(frozen=True)
class GenerateOutput:
    """What was generated, and how. Fields are also items: ``output["logprobs"]``.

    B counts rows (prompts × num_return_sequences), T the tokens generated in the longest row, K all experts. Entries
    past the end of a row are 0. Arrays are torch tensors if the prompt was one, and NumPy arrays otherwise.

    Attributes:
        sequences: [B, prompt + T] int64, the prompts as they came in and the tokens, then pad tokens.
        lengths: [B] int64, tokens generated per row, the end-of-sequence token included.
        logprobs: [B, T] float32, log-probability of each token under the merged and processed distribution, before
            temperature and truncation.
        mixture_weights: [B, T, K] float32; exactly 0 for an expert that took no part.
        expert_logprobs: [B, T, K] float32, log p_i of each token; NaN for an expert that was not run.
        timings: seconds for "prefill" and "decode", "time_to_first_token" in seconds, and the number of "tokens".
        expert_names: the K names.
        merge: the merge rule.
    """

    sequences: Any
    lengths: Any
    logprobs: Any
    mixture_weights: Any
    expert_logprobs: Any
    timings: dict[str, float]
    expert_names: tuple[str, ...]
    merge: MergeRule = field(default_factory=MergeRule)

    def __getitem__(self, name: str) -> Any:
        if name not in self.keys():
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def keys(self) -> tuple[str, ...]:
        """Names of the fields."""
        return tuple(f.name for f in fields(self))


def expert_shares(output: GenerateOutput) -> Float32:
    """How much of each generated token was whose doing: [B, T, K] float32, rows sum to 1 (to 0 past the end).

    Under the linear merge this is the responsibility w_i p_i(y) / sum_j w_j p_j(y): the probability that the token came
    from expert i, had one expert been drawn with probability w_i. Under power(a) it is w_i p_i(y)^a, normalised;
    log_linear is its limit at a = 0, where shares are the weights themselves, signs included.
    """
    weights = np.asarray(output.mixture_weights, dtype=np.float64)
    log_p = np.asarray(output.expert_logprobs, dtype=np.float64)
    exponent = {"linear": 1.0, "power": output.merge.exponent, "log_linear": 0.0}[output.merge.kind]
    taking_part = weights != 0
    scores = np.where(taking_part, exponent * np.where(np.isfinite(log_p), log_p, -1e30), -np.inf)
    top = scores.max(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = weights * np.where(taking_part, np.exp(scores - top), 0.0)
        shares = shares / shares.sum(axis=-1, keepdims=True)
    past_end = np.arange(weights.shape[1]) >= np.asarray(output.lengths)[:, None]
    shares[past_end] = 0.0
    result: Float32 = shares.astype(np.float32)
    return result


def _functions(name: str, value: Any) -> tuple[Callable[..., Any], ...]:
    """One callable, or a sequence of them (Hugging Face's lists are callable sequences), as a tuple."""
    if value is None:
        return ()
    functions = tuple(value) if isinstance(value, Sequence) else (value,)
    for function in functions:
        if not callable(function):
            raise TypeError(f"{name}: expected a callable or a sequence of callables, got {function!r}")
    return functions
