"""The definition of the mixture, in plain transformers and torch: one forward per expert per token.

Nothing here is fast, and nothing is a straw man either: adapters are merged into the weights, every expert has its KV
cache, and a batch is one forward. Everything fast in this package is held to what this file computes.

For prompt x, preference xi and K experts, at every step t, in float32:

1. ``log p_i = log_softmax(logits of expert i)``
2. ``w = PCM(xi, x, y_<t)``, exactly 0 for an expert that takes no part, which is then not run
3. ``log p`` is the merge of the ``log p_i`` under ``w``
4. processors change ``log p``
5. a token is drawn (``sampling.sample``)
6. reported are ``log p(token)``, ``w``, and every ``log p_i(token)``
"""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pcm_fast.adapter import Adapter
from pcm_fast.checkpoint import Checkpoint
from pcm_fast.generation import GenerateOptions
from pcm_fast.model import MixtureModel
from pcm_fast.pcm import LearnedPCM
from pcm_fast.prompts import Rows
from pcm_fast.request import Request, prepare_request, same_shape, stopped
from pcm_fast.sampling import MergeRule, sample
from pcm_fast.spec import ModelSpec
from pcm_fast.streaming import streaming
from pcm_fast.teacher_forcing import ForcedRequest, prepare_forced
from pcm_fast.transformers_model import build_model, merge_adapter

Array = npt.NDArray[Any]


def generate(model_spec: ModelSpec | MixtureModel, input_ids: Any, attention_mask: Any = None, **options: Any) -> Any:
    """``MixtureModel.generate`` as it is defined: the same arguments, the same results.

    Given a ModelSpec, builds the transformers models anew; a MixtureModel or a ``Decoder`` keeps them.
    """
    return _decoder(model_spec).generate(input_ids, attention_mask, GenerateOptions(**options))


def log_probs(model_spec: ModelSpec | MixtureModel, input_ids: Any, attention_mask: Any = None, **options: Any) -> Any:
    """``MixtureModel.log_probs`` as it is defined: the same arguments, the same results."""
    return _decoder(model_spec).log_probs(input_ids, attention_mask, **options)


class Decoder:
    """A mixture, and the transformers models it needs; each is built when first used, and kept.

    Experts that differ in their system prompts alone share one model, and a model with an adapter shares with the base
    every weight that the adapter leaves as it was.
    """

    def __init__(self, spec: ModelSpec, num_threads: int | None = None) -> None:
        self.spec = spec
        self._num_threads = num_threads
        self._models: dict[tuple[int, int], Any] = {}

    def generate(self, input_ids: Any, attention_mask: Any, options: GenerateOptions) -> Any:
        """See ``MixtureModel.generate``."""
        request = prepare_request(self.spec, input_ids, attention_mask, options)
        with torch.no_grad(), _threads(self._num_threads):
            return self._generate(request)

    def log_probs(self, input_ids: Any, attention_mask: Any = None, **options: Any) -> Any:
        """See ``MixtureModel.log_probs``."""
        forced = prepare_forced(self.spec, input_ids, attention_mask, **options)
        with torch.no_grad(), _threads(self._num_threads):
            return self._log_probs(forced)

    def _generate(self, request: Request) -> Any:
        options, mixture, running = request.options, request.mixture, list(request.mixture.running)
        experts = [Reader(self._expert_model(i), request.contexts[i], logits_to_keep=1) for i in running]
        pcm = [] if request.pcm_contexts is None else [Reader(self._pcm_model().base_model, request.pcm_contexts)]
        sequences = torch.from_numpy(request.batch.input_ids)  # [B, L], and longer by one at every step
        num_rows, prompt_length = sequences.shape
        unfinished, lengths = np.ones(num_rows, dtype=bool), np.zeros(num_rows, dtype=np.int64)
        reports, times = [], [time.perf_counter()]
        with streaming(options.streamer, request.batch.input_ids) as stream:
            for step in range(options.max_new_tokens):
                generated = sequences[:, prompt_length:].numpy()

                # 1. Every expert reads on in its own context.
                expert_log_p = torch.stack([reader.read().logits[:, -1].float().log_softmax(-1) for reader in experts])

                # 2. The weights [B, K] for this token; with pcm_interval > 1 those of an earlier token may still hold.
                if step % options.pcm_interval == 0:
                    hidden = pcm[0].read().last_hidden_state[:, -1].float().numpy() if pcm else None
                    weights = mixture.step_weights(request.batch.rows, list(generated), hidden)

                # 3. The merge.
                log_p = merge(expert_log_p, torch.from_numpy(weights[:, running]), mixture.rule)

                # 4. The processors: our own row by row, then the caller's.
                rows = zip(log_p.numpy(), request.batch.rows, generated, strict=True)
                log_p = torch.from_numpy(np.stack([request.processors.apply(*row) for row in rows]))
                for processor in options.logits_processors:
                    log_p = same_shape(processor(sequences, log_p), log_p)

                # 5. The draw. A row that has ended goes on with pad tokens that nobody reads.
                tokens = torch.full((num_rows,), request.pad_token_id)
                for row in np.flatnonzero(unfinished):
                    tokens[row] = _draw(log_p[row], options, int(row), step)

                # 6. The report.
                chosen = tokens[:, None]
                expert_logprobs = np.full((num_rows, len(mixture.expert_names)), np.nan, dtype=np.float32)
                expert_logprobs[:, running] = torch.stack([p.gather(1, chosen)[:, 0] for p in expert_log_p], 1).numpy()
                reports.append((log_p.gather(1, chosen)[:, 0].numpy(), weights, expert_logprobs))
                times.append(time.perf_counter())

                sequences = torch.cat([sequences, chosen], dim=1)
                lengths += unfinished
                stream(tokens.numpy())
                unfinished &= ~np.isin(tokens.numpy(), request.eos_token_ids)
                for criterion in options.criteria:
                    unfinished &= ~stopped(criterion(sequences, log_p), num_rows)
                if not unfinished.any():
                    break
                for reader in experts + pcm:
                    reader.append(tokens)
        logprobs, mixture_weights, expert_logprobs = (np.stack(steps, axis=1) for steps in zip(*reports, strict=True))
        timings = {
            "prefill": times[1] - times[0],
            "decode": times[-1] - times[1],
            "time_to_first_token": times[1] - times[0],
        }
        answers = sequences[:, prompt_length:].numpy()
        return request.result(answers, lengths, logprobs, mixture_weights, expert_logprobs, timings)

    def _log_probs(self, forced: ForcedRequest) -> Any:
        """Steps 1 to 3 for all positions of a row at once: what a position reads is the same as if it were the last."""
        output = forced.empty_output()  # [B, T, V]
        running = list(forced.mixture.running)
        for row in range(len(output)):
            length = forced.num_positions(row)
            expert_log_p = []
            for i in running:
                logits = Reader(self._expert_model(i), (forced.contexts[i][row],)).read().logits
                expert_log_p.append(logits[0, -length:].float().log_softmax(-1))
            hidden = None
            if forced.pcm_contexts is not None:
                states = Reader(self._pcm_model().base_model, (forced.pcm_contexts[row],)).read().last_hidden_state
                hidden = states[0, -length:].float().numpy()
            weights = torch.from_numpy(forced.position_weights(row, hidden)[:, running])
            output[row, -length:] = merge(torch.stack(expert_log_p), weights, forced.mixture.rule).numpy()
        return forced.result(output)

    def _expert_model(self, index: int) -> Any:
        return self._model(self.spec.expert_checkpoint(index), self.spec.experts[index].adapter)

    def _pcm_model(self) -> Any:
        pcm = self.spec.pcm
        assert isinstance(pcm, LearnedPCM)
        return self._model(pcm.checkpoint or self.spec.checkpoint, pcm.adapter)

    def _model(self, checkpoint: Checkpoint, adapter: Adapter | None) -> Any:
        key = id(checkpoint), id(adapter)
        if key not in self._models:
            self._models[key] = (
                build_model(checkpoint) if adapter is None else merge_adapter(self._model(checkpoint, None), adapter)
            )
        return self._models[key]


class Reader:
    """One model that reads a batch of B contexts of different lengths, token by token, with its KV cache.

    The contexts are padded on the left; padding is masked, and positions count from the first token that is none.
    """

    def __init__(self, model: Any, contexts: Rows, **arguments: Any) -> None:
        longest = max(map(len, contexts))
        self._model = model
        self._unread = torch.zeros((len(contexts), longest), dtype=torch.int64)  # [B, n]
        self._mask = torch.zeros((len(contexts), longest), dtype=torch.int64)  # [B, all that is or will be read]
        for row, context in enumerate(contexts):
            self._unread[row, longest - len(context) :] = torch.from_numpy(context)
            self._mask[row, longest - len(context) :] = 1
        self._cache: Any = None
        accepted = inspect.signature(model.forward).parameters
        names = [name for name in ("cache", "past_key_values") if name in accepted]  # by the release of transformers
        if not names:
            raise ValueError(f"{type(model).__name__}: expected a model with a KV cache (cache or past_key_values)")
        self._cache_name = names[0]
        # Architectures that know no positions (ALiBi, for one) take none.
        self._positions = "position_ids" in accepted
        self._arguments = {name: value for name, value in arguments.items() if name in accepted}

    def read(self) -> Any:
        """The model's output for the tokens [B, n] that it has not read yet."""
        arguments = dict(self._arguments)
        if self._positions:
            positions = (self._mask.cumsum(dim=1) - 1).clamp(min=0)
            arguments["position_ids"] = positions[:, -self._unread.shape[1] :]
        output = self._model(
            input_ids=self._unread,
            attention_mask=self._mask,
            use_cache=True,
            **{self._cache_name: self._cache},
            **arguments,
        )
        self._cache = output[self._cache_name]
        self._unread = self._unread[:, :0]
        return output

    def append(self, tokens: torch.Tensor) -> None:
        """One more token [B] for each row, to be read at the next ``read``."""
        self._unread = torch.cat([self._unread, tokens[:, None]], dim=1)
        self._mask = torch.cat([self._mask, torch.ones_like(tokens[:, None])], dim=1)


def merge(expert_log_p: torch.Tensor, weights: torch.Tensor, rule: MergeRule) -> torch.Tensor:
    """Merge expert_log_p [K, B, V] under mixture weights [B, K] into log p [B, V], in log space throughout.

    linear:     p = sum_i w_i p_i                        (Eq. 1 of arXiv 2407.04181)
    log_linear: log p = sum_i w_i log p_i - log Z        (a token that an expert of positive weight excludes stays
        excluded)
    power(a):   p = (sum_i w_i p_i^a)^(1/a) / Z
    """
    w = weights.T[:, :, None]
    if rule.kind == "log_linear":
        terms = torch.where(w == 0, 0, w * expert_log_p)
        zero = expert_log_p.isneginf()
        excluded = (zero & (w > 0)).any(dim=0) | (zero | (w == 0)).all(dim=0)
        merged = terms.sum(dim=0).masked_fill(excluded, -torch.inf)
    else:
        exponent = rule.exponent if rule.kind == "power" else 1.0
        terms = torch.where(w == 0, -torch.inf, exponent * expert_log_p + w.log())
        # Where one expert has p_i = 0, a negative exponent makes its term +inf, and log p becomes -inf.
        merged = terms.logsumexp(dim=0) / exponent
    return merged.log_softmax(dim=-1)


def _draw(log_p: torch.Tensor, options: GenerateOptions, row: int, step: int) -> int:
    try:
        return sample(log_p.numpy(), options.sampling, sequence=options.first_sequence + row, position=step)
    except ValueError as error:
        raise ValueError(f"row {row}, token {step}: {error}") from None


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Torch on so many threads, and as before afterwards; None leaves it alone."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _decoder(model: ModelSpec | MixtureModel | Decoder) -> Decoder:
    if isinstance(model, Decoder):
        return model
    if isinstance(model, MixtureModel):
        return model.reference
    if isinstance(model, ModelSpec):
        return Decoder(model)
    raise TypeError(f"model_spec: expected a ModelSpec or a MixtureModel, got {model!r}")
