"""The kernels, behind checked arguments: NumPy arrays or torch tensors in, the same kind out.

Which implementation runs is visible (`backends`) and can be forced with the environment variable ``PCM_FAST_FORCE``:
``reference`` is pcm_fast/sampling.py, ``cpu`` the C++ kernels, ``triton`` the Triton kernels (for tensors on a GPU, or
any under ``TRITON_INTERPRET=1``), ``cuda`` the same, with the torch backend's KV cache served by the CUDA extension.
Unforced it is ``cpu``, and ``triton`` for tensors on a GPU.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import sys
from typing import Any

import numpy as np

from pcm_fast import _native, sampling
from pcm_fast.ops_arguments import Array, Draws, checked_weights
from pcm_fast.sampling import MergeRule

BACKENDS = ("reference", "cpu", "triton", "cuda")
_ISAS = tuple(_native.isas())
MERGES = {"linear": 0, "log_linear": 1, "power": 2}
_STATUS = {1: "NaN or +inf", 2: "no token left: all -inf, or excluded under these weights"}


def backends() -> dict[str, str]:
    """Every backend with what it is here: ``"available (...)"``, or why it is not."""
    return {
        "reference": "available (NumPy)",
        "cpu": f"available (C++, {isa()}; this machine can run {', '.join(_ISAS)})",
        "triton": _triton(),
        "cuda": _cuda(),
    }


def backend() -> str:
    """The backend that arrays and tensors on the CPU use next: ``PCM_FAST_FORCE`` if set, otherwise ``cpu``."""
    forced = os.environ.get("PCM_FAST_FORCE") or "cpu"
    if forced not in BACKENDS:
        raise ValueError(f"PCM_FAST_FORCE: expected one of {', '.join(BACKENDS)}, got {forced!r}")
    if forced in ("triton", "cuda"):
        state = _triton() if forced == "triton" else _cuda()
        if not state.startswith("available"):
            raise RuntimeError(f"PCM_FAST_FORCE={forced}: {state}")
    return forced


def _triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "not available: triton is not installed"
    where = "interpreted on the CPU" if _interpreted() else "for tensors on a GPU"
    return f"available (Triton {importlib.metadata.version('triton')}, {where})"


def _cuda() -> str:
    if importlib.util.find_spec("pcm_fast._cuda") is None:
        return "not available: this build has no CUDA extension"
    return "available (the KV cache's operations; the rest is triton's)"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _backend_of(name: str, source: Any) -> str:
    """The backend that an argument is served by: "reference", "cpu" or "triton"."""
    chosen = backend()
    torch = sys.modules.get("torch")
    device = source.device if torch is not None and isinstance(source, torch.Tensor) else None
    if device is not None and device.type == "cuda":
        if os.environ.get("PCM_FAST_FORCE") in ("reference", "cpu"):
            raise ValueError(f"{name}: expected a tensor on the CPU (PCM_FAST_FORCE={chosen}), got {device}")
        return "triton"
    if chosen in ("triton", "cuda"):
        if not _interpreted():
            raise ValueError(
                f"{name}: expected a tensor on a GPU (PCM_FAST_FORCE={chosen}), got {device or type(source).__name__}; "
                "TRITON_INTERPRET=1 runs the kernels without one"
            )
        return "triton"
    return chosen


def isa() -> str:
    """The instruction set the C++ kernels run on: ``PCM_FAST_ISA`` if set, otherwise the machine's best."""
    wanted = os.environ.get("PCM_FAST_ISA") or "auto"
    if wanted == "auto":
        return _ISAS[-1]
    if wanted not in _ISAS:
        raise ValueError(
            f"PCM_FAST_ISA: expected auto or one of {', '.join(_ISAS)} (what this machine runs), got {wanted!r}"
        )
    return wanted


def mix_sample(
    expert_logits: Any,
    mixture_weights: Any,
    *,
    merge: str | MergeRule = "linear",
    do_sample: Any = True,
    temperature: Any = 1.0,
    top_k: Any = 0,
    top_p: Any = 1.0,
    min_p: Any = 0.0,
    seed: Any = 0,
    sequence: Any = None,
    position: Any = 0,
    return_expert_logprobs: bool = False,
    num_threads: int | None = None,
) -> tuple[Any, ...]:
    """Merge the next-token distributions of K experts and draw one token per row, in one pass and without a sort.

    Args:
        expert_logits: [B, K, V] float32, bfloat16 or float16, any strides. K <= 16.
        mixture_weights: [B, K]. Rows sum to 1 (any signs and sum with ``merge="log_linear"``). The logits of an expert
            of weight 0 are not read.
        merge: ``"linear"``, ``"log_linear"`` or ``"power(a)"``.
        do_sample, temperature, top_k, top_p, min_p, seed: as in `SamplingParams`, each one value or [B].
        sequence: index of each row in its request, [B]; default 0..B-1.
        position: index of the token in its answer, one value or [B].
        return_expert_logprobs: also return log p_i(token), [B, K] float32, NaN for experts of weight 0.
        num_threads: default: the cores this process may use.

    Returns:
        tokens [B] int64 and logprobs [B] float32 (before temperature and truncation), then
        expert_logprobs if asked for.

    Raises:
        TypeError, ValueError: a bad argument, or a NaN, +inf or nothing but -inf in a row (which is named).
    """
    rule = MergeRule.parse(merge)
    chosen = _backend_of("expert_logits", expert_logits)
    logits = Array.of("expert_logits", expert_logits, 3)
    batch, experts, _ = logits.shape
    weights = checked_weights(mixture_weights, (batch, experts), rule)
    draws = Draws.of(batch, do_sample, temperature, top_k, top_p, min_p, seed, sequence, position)
    if chosen == "triton" and batch:
        from pcm_fast import triton_ops

        drawn = triton_ops.mix_sample(expert_logits, weights, rule.kind, rule.exponent, draws, return_expert_logprobs)
        _raise_for("expert_logits", drawn.statuses)
        return tuple(logits.as_given(x) for x in drawn[: 3 if return_expert_logprobs else 2])
    expert_logprobs = np.full((batch, experts), np.nan, np.float32) if return_expert_logprobs else None
    if chosen == "reference":
        rows = zip(logits.to_numpy(), draws.reference(), strict=True)
        for b, (row, (params, where, place)) in enumerate(rows):
            log_p = _named(b, lambda row=row, b=b: sampling.merge_log_probs(row, weights[b], rule))
            draws.tokens[b] = sampling.sample(log_p, params, sequence=where, position=place)
            draws.logprobs[b] = log_p[draws.tokens[b]]
            if expert_logprobs is not None:
                for i in np.flatnonzero(weights[b]):
                    expert_logprobs[b, i] = sampling.merge_log_probs(row[i : i + 1], [1.0])[draws.tokens[b]]
    elif batch:
        statuses = sampler(num_threads).mix_sample(
            logits.view(), weights, MERGES[rule.kind], rule.exponent, draws.native(), None, expert_logprobs
        )
        _raise_for("expert_logits", statuses)
    results: list[Any] = [draws.tokens, draws.logprobs] + ([expert_logprobs] if expert_logprobs is not None else [])
    return tuple(logits.like(result) for result in results)


def merge_log_probs(
    expert_logits: Any, mixture_weights: Any, *, merge: str | MergeRule = "linear", num_threads: int | None = None
) -> Any:
    """Log-probabilities [B, V] float32 of the mixture: `mix_sample` without the draw, for processors to act on.

    Args and errors as in `mix_sample`; there is no kernel of it for a GPU.
    """
    rule = MergeRule.parse(merge)
    chosen = _backend_of("expert_logits", expert_logits)
    if chosen == "triton":
        raise ValueError("expert_logits: there is no Triton kernel of merge_log_probs; expected an array on the CPU")
    logits = Array.of("expert_logits", expert_logits, 3)
    batch, experts, vocabulary = logits.shape
    weights = checked_weights(mixture_weights, (batch, experts), rule)
    log_probs = np.empty((batch, vocabulary), np.float32)
    if chosen == "reference":
        for b, row in enumerate(logits.to_numpy()):
            log_probs[b] = _named(b, lambda row=row, b=b: sampling.merge_log_probs(row, weights[b], rule))
    elif batch:
        statuses = sampler(num_threads).mix_sample(
            logits.view(), weights, MERGES[rule.kind], rule.exponent, None, log_probs, None
        )
        _raise_for("expert_logits", statuses)
    return logits.like(log_probs)


def sample(
    log_probs: Any,
    *,
    do_sample: Any = True,
    temperature: Any = 1.0,
    top_k: Any = 0,
    top_p: Any = 1.0,
    min_p: Any = 0.0,
    seed: Any = 0,
    sequence: Any = None,
    position: Any = 0,
    num_threads: int | None = None,
) -> tuple[Any, Any]:
    """Draw one token per row of log_probs [B, V], which need not be normalised: `mix_sample` after the merge.

    Returns:
        tokens [B] int64 and log_probs[b, tokens[b]] [B] float32. Other arguments and errors as in `mix_sample`. The
        Triton kernels normalise the rows first, and may round a mass differently for that.
    """
    chosen = _backend_of("log_probs", log_probs)
    rows = Array.of("log_probs", log_probs, 2)
    draws = Draws.of(rows.shape[0], do_sample, temperature, top_k, top_p, min_p, seed, sequence, position)
    if chosen == "triton" and rows.shape[0]:
        from pcm_fast import triton_ops

        drawn = triton_ops.sample(log_probs, draws)
        _raise_for("log_probs", drawn.statuses)
        return rows.as_given(drawn.tokens), rows.as_given(drawn.logprobs)
    if chosen == "reference":
        for b, (row, draw) in enumerate(zip(rows.to_numpy(), draws.reference(), strict=True)):
            draws.tokens[b] = _named(
                b, lambda row=row, draw=draw: sampling.sample(row, draw[0], sequence=draw[1], position=draw[2])
            )
            draws.logprobs[b] = row[draws.tokens[b]]
    elif rows.shape[0]:
        _raise_for("log_probs", sampler(num_threads).sample(rows.view(), draws.native()))
    return rows.like(draws.tokens), rows.like(draws.logprobs)


def view(logits: Any) -> _native.View:
    """A tensor [B, K, V] on the CPU, or an array, as the C++ kernels see it."""
    return Array.of("expert_logits", logits, 3).view()


def _named(row: int, compute: Any) -> Any:
    try:
        return compute()
    except ValueError as error:
        raise ValueError(f"row {row}: {error}") from None


def _raise_for(name: str, statuses: list[int]) -> None:
    for row, status in enumerate(statuses):
        if status:
            raise ValueError(f"{name}: row {row}: {_STATUS[status]}")


def num_threads(wanted: int | None) -> int:
    """The number of threads wanted, checked; by default the cores this process may use."""
    if wanted is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1:
        raise ValueError(f"num_threads: expected an integer >= 1, got {wanted!r}")
    return wanted


def thread_pool(count: int) -> _native.ThreadPool:
    """The threads that all kernels of this process share."""
    return _pool_of(count, os.getpid())


def sampler(wanted: int | None) -> _native.MixSampler:
    """The C++ merge and draw on so many threads."""
    return _sampler_of(isa(), num_threads(wanted), os.getpid())


@functools.lru_cache(maxsize=32)
def _sampler_of(isa: str, threads: int, pid: int) -> _native.MixSampler:
    return _native.MixSampler(isa, _pool_of(threads, pid))


@functools.lru_cache(maxsize=8)
def _pool_of(threads: int, pid: int) -> _native.ThreadPool:
    """Per process, since threads do not survive a fork."""
    return _native.ThreadPool(threads)
