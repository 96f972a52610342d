"""The mixture on the C++ decoder: the experts and the PCM are rows of one pass over one set of weights a token."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from pcm_fast import _native, ops
from pcm_fast.adapter import Adapter
from pcm_fast.backends.native_model import SITES, NativeModel, Rows, unsupported
from pcm_fast.generation import GenerateOptions
from pcm_fast.pcm import LearnedPCM
from pcm_fast.processors import Processors
from pcm_fast.prompts import Tokens
from pcm_fast.request import Request, prepare_request, same_shape, stopped
from pcm_fast.spec import ModelSpec
from pcm_fast.streaming import streaming
from pcm_fast.teacher_forcing import ForcedRequest, prepare_forced

Float32 = npt.NDArray[np.float32]

POSITIONS_AT_ONCE = 32  # whose logits are held at a time when a text is scored


def reason_against(spec: ModelSpec) -> str | None:
    """Why the native backend cannot run this mixture; None if it can."""
    config = spec.checkpoint.config
    if config is None:
        return spec.checkpoint.family_reason or "an architecture it does not know"
    if any(expert.checkpoint is not None for expert in spec.experts):
        return "an expert with weights of its own"
    if len(spec.experts) > _native.MAX_EXPERTS:
        return f"more than {_native.MAX_EXPERTS} experts"
    if isinstance(spec.pcm, LearnedPCM) and spec.pcm.checkpoint is not None:
        return "a PCM with weights of its own"
    for adapter in _adapters(spec):
        for path in adapter.sites:
            if not path.endswith(SITES):
                return f"an adapter on {path}"
    return unsupported(config)


class NativeDecoder:
    """A mixture on the C++ decoder."""

    def __init__(self, spec: ModelSpec, weights: str = "auto", num_threads: int | None = None) -> None:
        reason = reason_against(spec)
        if reason is not None:
            raise ValueError(f"backend: the native backend does not run {reason}; use backend='reference'")
        if weights == "gguf" and spec.checkpoint.format != "gguf":
            raise ValueError(f"weights: expected a GGUF file for 'gguf', got {spec.checkpoint.path}")
        self.spec = spec
        self._threads = ops.num_threads(num_threads)
        self.model = NativeModel(spec.checkpoint, _adapters(spec), weights, ops.isa(), ops.thread_pool(self._threads))

    def generate(self, input_ids: Any, attention_mask: Any, options: GenerateOptions) -> Any:
        """See ``MixtureModel.generate``."""
        return self._generate(prepare_request(self.spec, input_ids, attention_mask, options))

    def log_probs(self, input_ids: Any, attention_mask: Any = None, **options: Any) -> Any:
        """See ``MixtureModel.log_probs``."""
        return self._log_probs(prepare_forced(self.spec, input_ids, attention_mask, **options))

    def _generate(self, request: Request) -> Any:
        options, mixture, running = request.options, request.mixture, list(request.mixture.running)
        num_rows, num_running, num_experts = len(request.batch.rows), len(running), len(mixture.expert_names)
        # One row of the decoder for each (sequence, expert), the PCM last: row-major [B, R].
        readers = [(request.contexts[i], self.spec.experts[i].adapter) for i in running]
        if request.pcm_contexts is not None:
            assert isinstance(mixture.pcm, LearnedPCM)
            readers.append((request.pcm_contexts, mixture.pcm.adapter))
        contexts = [rows[b] for b in range(num_rows) for rows, _ in readers]
        adapters = [self.model.adapter_index(adapter) for _ in range(num_rows) for _, adapter in readers]
        times = [time.perf_counter()]
        rows = Rows(self.model, contexts, adapters, options.max_new_tokens)
        hidden = rows.read(contexts, 1).reshape(num_rows, len(readers), -1)  # [B, R, d]
        logits = np.empty((num_rows, num_running, self.model.config.vocab_size), np.float32)

        sequences = request.batch.input_ids
        prompt_length = sequences.shape[1]
        unfinished, lengths = np.ones(num_rows, dtype=bool), np.zeros(num_rows, dtype=np.int64)
        reports = []
        with streaming(options.streamer, sequences) as stream:
            for step in range(options.max_new_tokens):
                live = np.flatnonzero(unfinished)
                generated = sequences[:, prompt_length:]
                pcm_hidden = hidden[:, -1] if request.pcm_contexts is not None else None
                weights = mixture.step_weights(request.batch.rows, list(generated), pcm_hidden)
                self.model.logits(hidden[live, :num_running].reshape(len(live) * num_running, -1), logits)
                drawn = self._draw(request, logits[: len(live)], weights[live][:, running], live, sequences, step)
                tokens = np.full(num_rows, request.pad_token_id, dtype=np.int64)
                tokens[live] = drawn[0]
                logprobs = np.zeros(num_rows, np.float32)
                logprobs[live] = drawn[1]
                expert_logprobs = np.full((num_rows, num_experts), np.nan, np.float32)
                expert_logprobs[live[:, None], running] = drawn[2]
                reports.append((logprobs, weights, expert_logprobs))
                times.append(time.perf_counter())

                sequences = np.concatenate([sequences, tokens[:, None]], axis=1)
                lengths += unfinished
                stream(tokens)
                unfinished &= ~np.isin(tokens, request.eos_token_ids)
                for criterion in options.criteria:
                    unfinished &= ~_ask(criterion, sequences, drawn[3], live)
                if not unfinished.any() or step + 1 == options.max_new_tokens:
                    break
                live = np.flatnonzero(unfinished)
                entries = (live[:, None] * len(readers) + np.arange(len(readers))).ravel()
                states = rows.step(np.repeat(tokens[live], len(readers)), entries)
                hidden[live] = states.reshape(len(live), len(readers), -1)
        logprobs, mixture_weights, expert_logprobs = (np.stack(steps, axis=1) for steps in zip(*reports, strict=True))
        timings = {
            "prefill": times[1] - times[0],
            "decode": times[-1] - times[1],
            "time_to_first_token": times[1] - times[0],
        }
        return request.result(
            sequences[:, prompt_length:], lengths, logprobs, mixture_weights, expert_logprobs, timings
        )

    def _draw(
        self, request: Request, logits: Float32, weights: Float32, live: Any, sequences: Tokens, step: int
    ) -> tuple[Any, Any, Any, Any]:
        """Tokens [n], their logprobs [n] and expert_logprobs [n, R] of the live rows; log p [n, V] if it was needed."""
        options, rule = request.options, request.mixture.rule
        params = options.sampling
        draw = {
            "do_sample": not params.greedy,
            "temperature": params.temperature,
            "top_k": params.top_k,
            "top_p": params.top_p,
            "min_p": params.min_p,
            "seed": params.seed,
            "sequence": options.first_sequence + live,
            "position": step,
            "num_threads": self._threads,
        }
        plain = Processors(eos_token_ids=request.processors.eos_token_ids)
        if request.processors == plain and not options.logits_processors and not options.criteria:
            return *ops.mix_sample(logits, weights, merge=rule, return_expert_logprobs=True, **draw), None
        log_p = ops.merge_log_probs(logits, weights, merge=rule, num_threads=self._threads)
        prompt_length = request.batch.input_ids.shape[1]
        for index, row in enumerate(live):
            log_p[index] = request.processors.apply(
                log_p[index], request.batch.rows[row], sequences[row, prompt_length:]
            )
        if options.logits_processors:
            import torch

            scores = torch.from_numpy(log_p)
            for processor in options.logits_processors:
                scores = same_shape(processor(torch.from_numpy(sequences[live]), scores), scores)
            log_p = scores.numpy()
        tokens, logprobs = ops.sample(log_p, **draw)
        one = np.ones((len(live), 1), np.float32)
        expert_logprobs = [
            np.take_along_axis(ops.merge_log_probs(logits[:, i : i + 1], one), tokens[:, None], axis=1)[:, 0]
            if (weights[:, i] != 0).any()
            else np.full(len(live), np.nan, np.float32)
            for i in range(logits.shape[1])
        ]
        return tokens, logprobs, np.stack(expert_logprobs, axis=1), log_p

    def _log_probs(self, forced: ForcedRequest) -> Any:
        output = forced.empty_output()  # [B, T, V]
        running = list(forced.mixture.running)
        adapters = [self.model.adapter_index(self.spec.experts[i].adapter) for i in running]
        for row in range(len(output)):
            length = forced.num_positions(row)
            contexts, row_adapters = [forced.contexts[i][row] for i in running], list(adapters)
            if forced.pcm_contexts is not None:
                assert isinstance(forced.mixture.pcm, LearnedPCM)
                contexts.append(forced.pcm_contexts[row])
                row_adapters.append(self.model.adapter_index(forced.mixture.pcm.adapter))
            hidden = Rows(self.model, contexts, row_adapters, 0).read(contexts, length)  # [R, length, d]
            weights = forced.position_weights(row, hidden[-1] if forced.pcm_contexts is not None else None)[:, running]
            experts = np.ascontiguousarray(hidden[: len(running)].swapaxes(0, 1))  # [length, R, d]
            for start in range(0, length, POSITIONS_AT_ONCE):
                part = slice(start, min(start + POSITIONS_AT_ONCE, length))
                logits = np.empty((part.stop - start, len(running), output.shape[-1]), np.float32)
                self.model.logits(experts[part].reshape(-1, experts.shape[-1]), logits)
                output[row, output.shape[1] - length + start : output.shape[1] - length + part.stop] = (
                    ops.merge_log_probs(logits, weights[part], merge=forced.mixture.rule, num_threads=self._threads)
                )
        return forced.result(output)


def _adapters(spec: ModelSpec) -> list[Adapter]:
    found = [expert.adapter for expert in spec.experts if expert.adapter is not None]
    if isinstance(spec.pcm, LearnedPCM) and spec.pcm.adapter is not None:
        found.append(spec.pcm.adapter)
    return found


def _ask(criterion: Callable[..., Any], sequences: Tokens, log_p: Float32, live: Any) -> npt.NDArray[np.bool_]:
    """The rows [B] that a stopping criterion ends; log_p [n, V] are those of the live rows, the others score 0."""
    import torch

    scores = np.zeros((len(sequences), log_p.shape[-1]), np.float32)
    scores[live] = log_p
    return stopped(criterion(torch.from_numpy(sequences), torch.from_numpy(scores)), len(sequences))
