"""Draws of sequences whose log p somebody wants to see first: processors, the caller's own included, and criteria."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from pcm_fast import ops
from pcm_fast.request import same_shape, stopped
from pcm_fast.sequence import Sequence

Float32 = npt.NDArray[np.float32]


def draw(sequence: Sequence, logits: Float32, num_threads: int) -> tuple[int, float, Float32, bool]:
    """Merge, process and draw.

    Args:
        sequence: the sequence; its tokens are those before this draw, its weights those for it.
        logits: [R, V] float32, of its running experts.
        num_threads: threads to compute on.

    Returns:
        The token, its log-probability, expert_logprobs [R] float32, and whether a stopping criterion ends the sequence.
    """
    weights = sequence.weights
    assert weights is not None
    request = sequence.submission.request
    options, params = request.options, request.options.sampling
    rule = request.mixture.rule
    with _naming(sequence):
        log_p = ops.merge_log_probs(logits[None], weights[None], merge=rule, num_threads=num_threads)  # [1, V]
    generated = np.array(sequence.tokens, dtype=np.int64)
    log_p[0] = request.processors.apply(log_p[0], request.batch.rows[sequence.index], generated)
    if options.logits_processors:
        import torch

        scores, ids = torch.from_numpy(log_p), torch.from_numpy(_text(sequence))
        for processor in options.logits_processors:
            scores = same_shape(processor(ids, scores), scores)
        log_p = scores.numpy()
    with _naming(sequence):
        tokens, logprobs = ops.sample(
            log_p,
            do_sample=not params.greedy,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            seed=params.seed,
            sequence=np.array([options.first_sequence + sequence.index], dtype=np.uint64),
            position=len(sequence.tokens),
            num_threads=num_threads,
        )
    token = int(tokens[0])
    expert_logprobs = np.full(len(weights), np.nan, np.float32)
    if sequence.submission.report:
        one = np.ones((1, 1), np.float32)
        for i in np.flatnonzero(weights):
            expert = ops.merge_log_probs(logits[None, i : i + 1], one, num_threads=num_threads)
            expert_logprobs[i] = expert[0, token]
    return token, float(logprobs[0]), expert_logprobs, _stops(sequence, token, log_p)


@contextlib.contextmanager
def _naming(sequence: Sequence) -> Iterator[None]:
    """Have an error about numbers say whose they are."""
    try:
        yield
    except ValueError as error:
        message = str(error).rpartition("row 0: ")[2]
        raise ValueError(f"row {sequence.index}, token {len(sequence.tokens)}: {message}") from None


def _stops(sequence: Sequence, token: int, log_p: Float32) -> bool:
    """Whether a stopping criterion ends the sequence after this token, drawn from log_p [1, V]."""
    criteria = sequence.submission.request.options.criteria
    if not criteria:
        return False
    import torch

    ids, scores = torch.from_numpy(_text(sequence, token)), torch.from_numpy(log_p)
    answers = [bool(stopped(criterion(ids, scores), 1)[0]) for criterion in criteria]  # all are asked: some may count
    return any(answers)


def _text(sequence: Sequence, *more: int) -> npt.NDArray[np.int64]:
    """[1, L]: the prompt as it came in, padding included, the answer so far and what comes after it."""
    prompt = sequence.submission.request.batch.input_ids[sequence.index]
    return np.concatenate([prompt, np.array([*sequence.tokens, *more], dtype=np.int64)])[None]
