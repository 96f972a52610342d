"""The kernels, behind checked arguments: NumPy arrays or torch tensors in, the same kind out.

Which implementation runs is visible (`backends`) and can be forced with the environment variable ``PCM_FAST_FORCE``:
``reference`` is pcm_fast/sampling.py, ``cpu`` the C++ kernels.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pcm_fast import _native, sampling
from pcm_fast.sampling import MergeRule, SamplingParams

BACKENDS = ("reference", "cpu", "triton", "cuda")
_DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
_NUMPY_NAMES = {np.dtype(np.float32): "float32", np.dtype(np.float16): "float16"}  # quicker than asking for the name
_ISAS = tuple(_native.isas())
MERGES = {"linear": 0, "log_linear": 1, "power": 2}
_STATUS = {1: "NaN or +inf", 2: "no token left: all -inf, or excluded under these weights"}


def backends() -> dict[str, str]:
    """Every backend with what it is here: ``"available (...)"``, or why it is not."""
    absent = "not available: this build has no GPU kernels"
    return {
        "reference": "available (NumPy)",
        "cpu": f"available (C++, {isa()}; this machine can run {', '.join(_ISAS)})",
        "triton": absent,
        "cuda": absent,
    }


def backend() -> str:
    """The backend the next call uses: ``PCM_FAST_FORCE`` if set, otherwise ``cpu``."""
    forced = os.environ.get("PCM_FAST_FORCE") or "cpu"
    if forced not in BACKENDS:
        raise ValueError(f"PCM_FAST_FORCE: expected one of {', '.join(BACKENDS)}, got {forced!r}")
    if forced in ("triton", "cuda"):
        raise RuntimeError(f"PCM_FAST_FORCE={forced}: {backends()[forced]}")
    return forced


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
    logits = _Array.of("expert_logits", expert_logits, 3)
    batch, experts, _ = logits.shape
    weights = _weights(mixture_weights, (batch, experts), rule)
    draws = _Draws.of(batch, do_sample, temperature, top_k, top_p, min_p, seed, sequence, position)
    expert_logprobs = np.full((batch, experts), np.nan, np.float32) if return_expert_logprobs else None
    if backend() == "reference":
        rows = zip(logits.to_numpy(), draws.reference(), strict=True)
        for b, (row, (params, where, place)) in enumerate(rows):
            log_p = _named(b, lambda row=row, b=b: sampling.merge_log_probs(row, weights[b], rule))
            draws.tokens[b] = sampling.sample(log_p, params, sequence=where, position=place)
            draws.logprobs[b] = log_p[draws.tokens[b]]
            if expert_logprobs is not None:
                for i in np.flatnonzero(weights[b]):
                    expert_logprobs[b, i] = sampling.merge_log_probs(row[i : i + 1], [1.0])[draws.tokens[b]]
    elif batch:
        statuses = _sampler(num_threads).mix_sample(
            logits.view(), weights, MERGES[rule.kind], rule.exponent, draws.native(), None, expert_logprobs
        )
        _raise_for("expert_logits", statuses)
    results: list[Any] = [draws.tokens, draws.logprobs] + ([expert_logprobs] if expert_logprobs is not None else [])
    return tuple(logits.like(result) for result in results)


def merge_log_probs(
    expert_logits: Any, mixture_weights: Any, *, merge: str | MergeRule = "linear", num_threads: int | None = None
) -> Any:
    """Log-probabilities [B, V] float32 of the mixture: `mix_sample` without the draw, for processors to act on.

    Args and errors as in `mix_sample`.
    """
    rule = MergeRule.parse(merge)
    logits = _Array.of("expert_logits", expert_logits, 3)
    batch, experts, vocabulary = logits.shape
    weights = _weights(mixture_weights, (batch, experts), rule)
    log_probs = np.empty((batch, vocabulary), np.float32)
    if backend() == "reference":
        for b, row in enumerate(logits.to_numpy()):
            log_probs[b] = _named(b, lambda row=row, b=b: sampling.merge_log_probs(row, weights[b], rule))
    elif batch:
        statuses = _sampler(num_threads).mix_sample(
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
        tokens [B] int64 and log_probs[b, tokens[b]] [B] float32. Other arguments and errors as in `mix_sample`.
    """
    rows = _Array.of("log_probs", log_probs, 2)
    draws = _Draws.of(rows.shape[0], do_sample, temperature, top_k, top_p, min_p, seed, sequence, position)
    if backend() == "reference":
        for b, (row, draw) in enumerate(zip(rows.to_numpy(), draws.reference(), strict=True)):
            draws.tokens[b] = _named(
                b, lambda row=row, draw=draw: sampling.sample(row, draw[0], sequence=draw[1], position=draw[2])
            )
            draws.logprobs[b] = row[draws.tokens[b]]
    elif rows.shape[0]:
        _raise_for("log_probs", _sampler(num_threads).sample(rows.view(), draws.native()))
    return rows.like(draws.tokens), rows.like(draws.logprobs)


class _Array(NamedTuple):
    """A strided array somewhere in memory: a NumPy array, or a torch tensor on the CPU."""

    source: Any
    address: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements

    @staticmethod
    def of(name: str, source: Any, dimensions: int) -> _Array:
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(source, torch.Tensor):
            if source.device.type != "cpu":
                raise ValueError(
                    f"{name}: expected a tensor on the CPU (this build has no GPU kernels), got {source.device}"
                )
            dtype = str(source.dtype).removeprefix("torch.")
            array = _Array(source, source.data_ptr(), dtype, tuple(source.shape), tuple(source.stride()))
        elif isinstance(source, np.ndarray):
            size = source.itemsize
            if any(stride % size for stride in source.strides):
                source = np.ascontiguousarray(source)
            strides = tuple([stride // size for stride in source.strides])
            address = source.__array_interface__["data"][0]
            dtype = _NUMPY_NAMES.get(source.dtype) or source.dtype.name
            array = _Array(source, address, dtype, source.shape, strides)
        else:
            raise TypeError(f"{name}: expected a NumPy array or a torch tensor, got {type(source).__name__}")
        if len(array.shape) != dimensions:
            letters = "[B, K, V]" if dimensions == 3 else "[B, V]"
            raise ValueError(f"{name}: expected shape {letters}, got {list(array.shape)}")
        if array.dtype not in _DTYPES:
            raise TypeError(f"{name}: expected float32, bfloat16 or float16, got {array.dtype}")
        if not 1 <= array.shape[-1] <= _native.MAX_VOCABULARY:
            raise ValueError(f"{name}: expected a vocabulary of 1 to {_native.MAX_VOCABULARY}, got {array.shape[-1]}")
        if dimensions == 3 and not 1 <= array.shape[1] <= _native.MAX_EXPERTS:
            raise ValueError(f"{name}: expected 1 to {_native.MAX_EXPERTS} experts, got {array.shape[1]}")
        return array

    def view(self) -> _native.View:
        return _native.View(self.address, _DTYPES[self.dtype], self.shape, self.strides)

    def to_numpy(self) -> npt.NDArray[np.float32]:
        if isinstance(self.source, np.ndarray):
            return self.source.astype(np.float32)
        result: npt.NDArray[np.float32] = self.source.detach().float().numpy()
        return result

    def like(self, result: npt.NDArray[Any]) -> Any:
        """The result as the kind of array the caller passed."""
        return result if isinstance(self.source, np.ndarray) else sys.modules["torch"].from_numpy(result)


class _Draws(NamedTuple):
    """The checked sampling parameters, each one value or [B], and room for the results."""

    greedy: Any
    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    seed: Any
    sequence: Any
    position: Any
    tokens: npt.NDArray[np.int64]
    logprobs: npt.NDArray[np.float32]

    @staticmethod
    def of(batch: int, do_sample: Any, temperature: Any, top_k: Any, top_p: Any, min_p: Any, seed: Any, sequence: Any,
           position: Any) -> _Draws:  # fmt: skip
        sampled = _per_row("do_sample", do_sample, batch, bool)
        heat = _per_row("temperature", temperature, batch, float, sys.float_info.max)
        single = isinstance(sampled, bool) and isinstance(heat, float)
        return _Draws(
            greedy=not sampled or heat == 0 if single else np.logical_not(sampled) | (np.asarray(heat) == 0),
            temperature=heat,
            top_k=_per_row("top_k", top_k, batch, int, 2**31 - 1),
            top_p=_per_row("top_p", top_p, batch, float, 1),
            min_p=_per_row("min_p", min_p, batch, float, 1),
            seed=_per_row("seed", seed, batch, int, 2**64 - 1),
            sequence=None if sequence is None else _per_row("sequence", sequence, batch, int, 2**64 - 1),
            position=_per_row("position", position, batch, int, 2**64 - 1),
            tokens=np.empty(batch, np.int64),
            logprobs=np.empty(batch, np.float32),
        )

    def reference(self) -> list[tuple[SamplingParams, int, int]]:
        """The parameters, sequence and position of every row."""
        batch = len(self.tokens)
        sequence = np.arange(batch) if self.sequence is None else self.sequence
        rows = (self.greedy, self.temperature, self.top_k, self.top_p, self.min_p, self.seed, sequence, self.position)
        lists = [np.broadcast_to(np.asarray(row), batch).tolist() for row in rows]
        return [
            (SamplingParams(not greedy, temperature, top_k, top_p, min_p, seed), where, position)
            for greedy, temperature, top_k, top_p, min_p, seed, where, position in zip(*lists, strict=True)
        ]

    def native(self) -> _native.Draws:
        return _native.Draws(*self)


def _per_row(name: str, value: Any, batch: int, kind: type[bool] | type[int] | type[float], high: float = 1) -> Any:
    """One value, or an array [B] of them, of the kind and in [0, high]."""
    if type(value) is kind or (kind is float and type(value) is int):
        if not 0 <= value <= high:
            raise ValueError(f"{name}: expected a value in [0, {high}], got {value!r}")
        return kind(value)
    array = np.asarray(value)
    kinds = {bool: "b", int: "iu", float: "iuf"}[kind]
    if array.dtype.kind not in kinds:
        raise TypeError(f"{name}: expected {kind.__name__}, or one for each row, got {value!r}")
    if array.shape not in ((), (batch,)):
        raise ValueError(f"{name}: expected one value or shape [{batch}], got shape {list(array.shape)}")
    if not ((array >= 0) & (array <= high)).all():
        raise ValueError(f"{name}: expected values in [0, {high}], got {value!r}")
    return array


def _weights(value: Any, shape: tuple[int, int], rule: MergeRule) -> npt.NDArray[np.float32]:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        value = value.detach().float().cpu().numpy()
    weights = np.ascontiguousarray(value, dtype=np.float32)
    if weights.shape != shape:
        raise ValueError(f"mixture_weights: expected shape {list(shape)} ([B, K]), got {list(weights.shape)}")
    return sampling.check_weights(weights, rule)


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


def _sampler(wanted: int | None) -> _native.MixSampler:
    return _sampler_of(isa(), num_threads(wanted), os.getpid())


@functools.lru_cache(maxsize=32)
def _sampler_of(isa: str, threads: int, pid: int) -> _native.MixSampler:
    return _native.MixSampler(isa, _pool_of(threads, pid))


@functools.lru_cache(maxsize=8)
def _pool_of(threads: int, pid: int) -> _native.ThreadPool:
    """Per process, since threads do not survive a fork."""
    return _native.ThreadPool(threads)
