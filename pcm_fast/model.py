"""``MixtureModel``: several experts that answer together, behind one face whatever runs them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pcm_fast.experts import load_experts
from pcm_fast.generation import GenerateOptions
from pcm_fast.loader import load_checkpoint
from pcm_fast.pcm import load_pcm
from pcm_fast.preference import Preference, resolve_preference
from pcm_fast.processors import check_count
from pcm_fast.prompts import Messages, chat_prompts, read_messages, to_numpy
from pcm_fast.sampling import MergeRule
from pcm_fast.spec import ModelSpec
from pcm_fast.streaming import TextStreamer, iterate
from pcm_fast.tokenizer import Tokenizer

if TYPE_CHECKING:
    from pcm_fast.backends.engine_decoder import EngineDecoder
    from pcm_fast.engine import Engine
    from pcm_fast.reference import Decoder

__all__ = ["MixtureModel", "ModelSpec"]

BACKENDS = ("auto", "reference", "native", "torch")
KV_DTYPES = ("float32", "bfloat16")
ACTIVATIONS = ("float32", "int8")
LOGGER = logging.getLogger(__name__)
WEIGHTS = ("auto", "float32", "bfloat16", "q8_0", "gguf")


class Backend(Protocol):
    """What runs a mixture; see ``MixtureModel`` for the meaning of the methods."""

    def generate(self, input_ids: Any, attention_mask: Any, options: GenerateOptions) -> Any:
        """Generate; checks its arguments through ``prepare_request``."""

    def log_probs(self, input_ids: Any, attention_mask: Any = None, **options: Any) -> Any:
        """Teacher-forced log-probabilities; checks its arguments through ``prepare_forced``."""


class MixtureModel:
    """Experts over one vocabulary and the PCM that weighs them.

    Attributes:
        spec: what it is made of.
        backend: name of the backend that runs it: "reference", "native" or "torch".
        device: where the torch backend runs it, such as "cuda:0" or "cpu"; None for another backend.
    """

    def __init__(
        self,
        spec: ModelSpec,
        backend: str = "auto",
        weights: str = "auto",
        num_threads: int | None = None,
        kv_dtype: str = "float32",
        activations: str = "float32",
        device: str | None = None,
    ) -> None:
        if not isinstance(spec, ModelSpec):
            raise TypeError(f"spec: expected a ModelSpec, got {spec!r}")
        if backend not in BACKENDS:
            raise ValueError(f"backend: expected one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
        if weights not in WEIGHTS:
            raise ValueError(f"weights: expected one of {', '.join(map(repr, WEIGHTS))}, got {weights!r}")
        if kv_dtype not in KV_DTYPES:
            raise ValueError(f"kv_dtype: expected one of {', '.join(map(repr, KV_DTYPES))}, got {kv_dtype!r}")
        if num_threads is not None:
            check_count("num_threads", num_threads)
            if num_threads < 1:
                raise ValueError(f"num_threads: expected an integer >= 1 or None, got {num_threads}")
        self.spec = spec
        if activations not in ACTIVATIONS:
            raise ValueError(f"activations: expected one of {', '.join(map(repr, ACTIVATIONS))}, got {activations!r}")
        if activations == "int8" and weights in ("float32", "bfloat16"):
            raise ValueError(f"activations: expected 'float32' with weights={weights!r}, got 'int8'")
        self.backend = _choose_backend(spec, backend, weights, kv_dtype, activations)
        self._weights, self._kv_dtype, self._activations = weights, kv_dtype, activations
        self._num_threads = num_threads
        self.device = _choose_device(self.backend, device)

    @classmethod
    def from_pretrained(
        cls,
        base: str | Path = "smollm2-135m-instruct",
        experts: Mapping[str, str | Path | Mapping[str, Any] | None] | None = None,
        pcm: Any = None,
        backend: str = "auto",
        weights: str = "auto",
        num_threads: int | None = None,
        kv_dtype: str = "float32",
        activations: str = "float32",
        device: str | None = None,
    ) -> MixtureModel:
        """Load a base, experts and a PCM.

        Args:
            base: a Hugging Face directory, a safetensors or GGUF file, or "smollm2-135m-instruct", which comes with the
                package.
            experts: by name, a PEFT adapter directory or a full model with the base's vocabulary (a path), the base
                itself (None), or a mapping with "adapter" or "model" and "system", a system prompt of its own. None:
                the base alone.
            pcm: how weights come from a preference. None or "named": by the names and strengths in it. "uniform"; a
                mapping from expert to weight; a function of a ``PCMContext``; the directory of a learned PCM.
            backend: "auto", "reference", "native" or "torch".
            weights: "auto" keeps the checkpoint's own precision; "float32", "bfloat16", "q8_0", "gguf".
            num_threads: threads to compute on; None leaves it to the backend.
            kv_dtype: what keys and values are kept in: "float32", or "bfloat16" in half the memory.
            activations: what meets weights in 8- and 4-bit blocks: "float32", or "int8" (by groups of 32), which is
                faster where many rows are read at once, and less exact.
            device: of the torch backend alone: "cuda", "cuda:1" and so on, or "cpu"; None: a GPU if there is one.

        Raises:
            LoadError: a file is missing, malformed, or does not fit; names file and tensor.
            TypeError, ValueError: any other bad argument; names it, what was expected and what came.
        """
        if not isinstance(base, (str, Path)):
            raise TypeError(f"base: expected a path or the name of the embedded model, got {base!r}")
        checkpoint = load_checkpoint(base)
        loaded = load_experts(experts, checkpoint)
        names = [expert.name for expert in loaded]
        spec = ModelSpec(checkpoint, loaded, load_pcm(pcm, names, checkpoint))
        return cls(spec, backend, weights, num_threads, kv_dtype, activations, device)

    @property
    def expert_names(self) -> tuple[str, ...]:
        """The names of the K experts, in the order of all weights."""
        return self.spec.expert_names

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that came with the base; ValueError if none did."""
        if self.spec.checkpoint.tokenizer is None:
            raise ValueError(f"tokenizer: {self.spec.checkpoint.path} has none")
        return self.spec.checkpoint.tokenizer

    @functools.cached_property
    def reference(self) -> Decoder:
        """The reference decoder of this mixture, whatever its backend is."""
        from pcm_fast.reference import Decoder

        return Decoder(self.spec, self._num_threads)

    @property
    def _backend(self) -> Backend:
        return self.reference if self.backend == "reference" else self._decoder

    @functools.cached_property
    def _decoder(self) -> EngineDecoder:
        """What runs the mixture on the native or the torch backend."""
        if self.backend == "torch":
            from pcm_fast.backends.torch import torch_decoder

            assert self.device is not None
            return torch_decoder(self.spec, self._weights, self._num_threads, self._kv_dtype, self.device)
        from pcm_fast.backends.native import native_decoder

        return native_decoder(self.spec, self._weights, self._num_threads, self._kv_dtype, self._activations)

    def engine(self, max_batch: int = 32, kv_blocks: int | None = None, prefill_chunk: int = 256) -> Engine:
        """An engine for requests that come in at any time. It shares this model's weights, and has its own KV cache.

        Args:
            max_batch: sequences that run at once; the others wait.
            kv_blocks: size of the KV cache of each model that runs (most mixtures have one), in blocks of 16 tokens of
                one row; a sequence has a row for each of its experts, and one for a learned PCM. None: room for
                max_batch sequences of 1024 tokens, or a quarter of the machine's memory (half of what is free on a
                GPU) if that is less. On a CPU memory is taken as blocks are first used, on a GPU at once.
            prefill_chunk: row-tokens that a step reads at most while prompts are being read, those of the sequences
                that already answer aside: fewer make answers come more evenly, more read prompts faster.

        Raises:
            TypeError, ValueError: a bad argument; or the model runs on the backend "reference".
        """
        for name, value in (("max_batch", max_batch), ("kv_blocks", kv_blocks), ("prefill_chunk", prefill_chunk)):
            if value is None and name == "kv_blocks":
                continue
            check_count(name, value)  # type: ignore[arg-type]
            if value < 1:  # type: ignore[operator]
                raise ValueError(f"{name}: expected an integer >= 1, got {value}")
        if self.backend == "reference":
            raise ValueError("backend: an engine needs the 'native' or the 'torch' backend, got 'reference'")
        return self._decoder.engine(max_batch, kv_blocks, prefill_chunk)

    def generate(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        preference: Preference = None,
        active: Sequence[str] | None = None,
        merge: str | MergeRule = "linear",
        max_new_tokens: int = 64,
        min_new_tokens: int = 0,
        do_sample: bool = True,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        logit_bias: Mapping[int, float] | None = None,
        banned_tokens: Sequence[int] | None = None,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        no_repeat_ngram_size: int = 0,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        num_return_sequences: int = 1,
        first_sequence: int = 0,
        expert_input_ids: Mapping[str, Any] | None = None,
        pcm_input_ids: Any = None,
        pcm_interval: int = 1,
        streamer: Any = None,
        logits_processor: Sequence[Callable[..., Any]] | Callable[..., Any] | None = None,
        stopping_criteria: Sequence[Callable[..., Any]] | Callable[..., Any] | None = None,
        return_dict_in_generate: bool = False,
    ) -> Any:
        """Generate tokens after a batch of prompts.

        Args:
            input_ids: [B, L] token ids as nested lists, NumPy array or torch tensor, padded on the left; or lists of
                different lengths without padding. An expert with a system prompt reads its system turn, as the chat
                template renders it, and then these.
            attention_mask: [B, L], 1 for text and 0 for padding; None: no padding.
            preference: free text, or a mapping from expert to strength. A mapping activates the experts it gives a
                strength above 0, text and None activate all.
            active: names of the experts that may take part, whatever the preference.
            merge: "linear" (p = sum_i w_i p_i), "log_linear" or "power(a)".
            max_new_tokens: tokens to generate at most, per sequence.
            min_new_tokens: tokens before which no end-of-sequence token is drawn.
            do_sample: draw; False, like temperature 0, takes the most likely token.
            temperature: divides the log-probabilities before truncation.
            top_k: draw among the k most likely tokens; 0: among all.
            top_p: draw among the most likely tokens that make up this probability.
            min_p: draw among tokens at least min_p times as likely as the most likely one.
            seed: of the random stream; the same seed draws the same tokens.
            logit_bias: added to the log-probability, by token id; -inf bans.
            banned_tokens: ids that are never drawn.
            repetition_penalty: of tokens that occur in the prompt or the answer; 1 for none, as in Hugging Face's
                processor.
            presence_penalty: subtracted from tokens that occur in the answer; 0 for none, as in OpenAI's API.
            frequency_penalty: subtracted for every occurrence in the answer; 0 for none, as in OpenAI's API.
            no_repeat_ngram_size: no sequence of so many tokens occurs twice; 0 allows all.
            eos_token_id: an id or several that end a sequence; None takes the model's own, an empty list stands for
                none.
            pad_token_id: written after the end of a sequence; None takes the model's own.
            num_return_sequences: sequences per prompt; those of prompt i are the rows from i * n on.
            first_sequence: sequence index of the first row, on which its draws depend.
            expert_input_ids: by name, the whole prompt [B, ...] of an expert, in place of its system turn and
                input_ids.
            pcm_input_ids: likewise for a learned PCM, the preference included.
            pcm_interval: the PCM weighs the experts anew before every so many-th token of an answer, and its last
                weights hold in between: an approximation unless it is 1.
            streamer: an object with ``put`` and ``end``, as transformers' streamers; for one sequence only.
            logits_processor: Hugging Face processors, each called with (input_ids [B, L], log-probabilities [B, V]).
            stopping_criteria: Hugging Face criteria, called likewise.
            return_dict_in_generate: return a ``GenerateOutput``.

        Returns:
            [B * num_return_sequences, L + T] int64: prompts, tokens, and pad tokens after the end; or a
            ``GenerateOutput``. torch tensors if input_ids is one, NumPy arrays otherwise.

        Raises:
            TypeError, ValueError: the message names the argument, what was expected and what came.
        """
        options = GenerateOptions(
            preference=preference,
            active=active,
            merge=merge,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            logit_bias=logit_bias,
            banned_tokens=banned_tokens,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            no_repeat_ngram_size=no_repeat_ngram_size,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            num_return_sequences=num_return_sequences,
            first_sequence=first_sequence,
            expert_input_ids=expert_input_ids,
            pcm_input_ids=pcm_input_ids,
            pcm_interval=pcm_interval,
            streamer=streamer,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            return_dict_in_generate=return_dict_in_generate,
        )
        return self._backend.generate(input_ids, attention_mask, options)

    def log_probs(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        preference: Preference = None,
        active: Sequence[str] | None = None,
        merge: str | MergeRule = "linear",
        prompt_length: int | Sequence[int] = 1,
        expert_input_ids: Mapping[str, Any] | None = None,
        pcm_input_ids: Any = None,
    ) -> Any:
        """Log-probabilities of the mixture for text that is given: what the tolerances of this package are about.

        The rows are read as if their first ``prompt_length`` tokens were the prompt and the rest had been generated. So
        a callable PCM is asked once per position t, with the prompt and the tokens after it up to and including t;
        inside the prompt, at t + 1 < prompt_length, it sees the prompt up to t.

        Args:
            input_ids: [B, T] the text, see ``generate``.
            attention_mask: [B, T], see ``generate``.
            preference: see ``generate``.
            active: see ``generate``.
            merge: see ``generate``.
            prompt_length: tokens of every row (padding not counted) that are its prompt, or one number per row.
            expert_input_ids: by name, the prompt of an expert in place of its system turn and the first prompt_length
                tokens.
            pcm_input_ids: likewise for a learned PCM.

        Returns:
            [B, T, V] float32. Position t is the merged distribution of the token *after* input_ids[:, t], before
            processors and temperature. NaN at padding; where expert_input_ids or pcm_input_ids is given, also before
            the last prompt token.
        """
        return self._backend.log_probs(
            input_ids,
            attention_mask,
            preference=preference,
            active=active,
            merge=merge,
            prompt_length=prompt_length,
            expert_input_ids=expert_input_ids,
            pcm_input_ids=pcm_input_ids,
        )

    def chat_inputs(
        self, messages: str | Messages, *, preference: Preference = None, active: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """The prompts of a conversation, as keywords of ``generate``: input_ids, expert_input_ids, pcm_input_ids.

        Every expert with a system prompt, and a learned PCM, gets the conversation with its own system turn at its
        head.

        Args:
            messages: one user message, or a sequence of {"role": "system" | "user" | "assistant", "content": text}.
            preference: see ``generate``; the prompt of a learned PCM holds it.
            active: see ``generate``.
        """
        conversation = read_messages(messages)
        resolved = resolve_preference(preference, self.expert_names, active)
        prompts = chat_prompts(self.spec, conversation, resolved)
        return {
            "input_ids": prompts.input_ids,
            "expert_input_ids": prompts.expert_input_ids,
            "pcm_input_ids": prompts.pcm_input_ids,
        }

    def chat(
        self,
        messages: str | Messages,
        *,
        preference: Preference = None,
        active: Sequence[str] | None = None,
        max_new_tokens: int = 256,
        streamer: Any = None,
        **options: Any,
    ) -> str:
        """Answer a conversation, through the chat template of the base.

        Args:
            messages: one user message, or a sequence of them, see ``chat_inputs``.
            preference: see ``generate``.
            active: see ``generate``.
            max_new_tokens: tokens of the answer at most.
            streamer: a function called with every piece of the answer's text, or a streamer as ``generate`` takes.
            options: further keywords of ``generate``, less those that make more than one text.

        Returns:
            The answer.
        """
        inputs = self.chat_inputs(messages, preference=preference, active=active)
        own = {*inputs, "attention_mask", "num_return_sequences", "return_dict_in_generate"}
        for name in options:
            if name in own:
                raise TypeError(
                    f"chat() got an unexpected keyword argument {name!r}; use generate with chat_inputs(...)"
                )
        if streamer is not None and not hasattr(streamer, "put") and callable(streamer):
            streamer = TextStreamer(self.tokenizer, streamer)
        sequences = self.generate(
            **inputs,
            preference=preference,
            active=active,
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            **options,
        )
        answer = np.asarray(to_numpy(sequences))[0, len(inputs["input_ids"][0]) :]
        return self.tokenizer.decode(answer.tolist())

    def stream_chat(self, messages: str | Messages, **options: Any) -> Iterator[str]:
        """The answer of ``chat`` in pieces, as they are generated; the same arguments, less streamer."""
        if "streamer" in options:
            raise TypeError("stream_chat() got an unexpected keyword argument 'streamer'")
        return iterate(lambda callback: self.chat(messages, streamer=callback, **options))


def _choose_backend(spec: ModelSpec, backend: str, weights: str, kv_dtype: str, activations: str) -> str:
    """The backend that runs, for what was asked for."""
    if backend == "torch":
        from pcm_fast.backends.torch_models import WEIGHTS as TORCH_WEIGHTS
        from pcm_fast.backends.torch_models import reason_against as torch_reason

        reason = torch_reason(spec)
        if reason is not None:
            raise ValueError(f"backend: the torch backend does not run {reason}; use backend='reference'")
        if weights not in TORCH_WEIGHTS:
            wanted = ", ".join(map(repr, TORCH_WEIGHTS))
            raise ValueError(f"weights: expected one of {wanted} with backend='torch', got {weights!r}")
        if activations != "float32":
            raise ValueError(f"activations: expected 'float32' with backend='torch', got {activations!r}")
        return backend
    if backend != "reference":
        from pcm_fast.backends.native_models import reason_against

        reason = reason_against(spec)
        if reason is None:
            return "native"
        if backend == "native":
            raise ValueError(f"backend: the native backend does not run {reason}; use backend='reference'")
        LOGGER.warning("running on the slow reference backend: the native one does not run %s", reason)
    if weights not in ("auto", "float32"):
        raise ValueError(
            f"weights: the reference backend computes in float32; expected 'auto' or 'float32', got {weights!r}"
        )
    if kv_dtype != "float32":
        raise ValueError(
            f"kv_dtype: the reference backend keeps keys and values in float32; expected 'float32', got {kv_dtype!r}"
        )
    if activations != "float32":
        raise ValueError(
            f"activations: the reference backend computes in float32; expected 'float32', got {activations!r}"
        )
    return "reference"


def _choose_device(backend: str, device: str | None) -> str | None:
    """The device that the torch backend runs on; None for another backend."""
    if device is not None and not isinstance(device, str):
        raise TypeError(f"device: expected a name such as 'cuda' or 'cpu', or None, got {device!r}")
    if backend != "torch":
        if device is not None:
            raise ValueError(f"device: only backend='torch' runs on a device of choice; this one is {backend!r}")
        return None
    from pcm_fast.backends.torch_models import resolve_device

    return resolve_device(device)
