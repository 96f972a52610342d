"""The arguments of ``ops``, checked: logits somewhere in memory, sampling parameters for each row, mixture weights."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pcm_fast import _native, sampling
from pcm_fast.sampling import MergeRule, SamplingParams

_DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
_NUMPY_NAMES = {np.dtype(np.float32): "float32", np.dtype(np.float16): "float16"}  # quicker than asking for the name


class Array(NamedTuple):
    """A strided array somewhere in memory: a NumPy array or a torch tensor."""

    source: Any
    address: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements

    @staticmethod
    def of(name: str, source: Any, dimensions: int) -> Array:
        """An argument, checked; dimensions: 3 for [B, K, V], 2 for [B, V]."""
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(source, torch.Tensor):
            if source.device.type not in ("cpu", "cuda"):
                raise ValueError(f"{name}: expected a tensor on the CPU or a GPU, got {source.device}")
            dtype = str(source.dtype).removeprefix("torch.")
            array = Array(source, source.data_ptr(), dtype, tuple(source.shape), tuple(source.stride()))
        elif isinstance(source, np.ndarray):
            size = source.itemsize
            if any(stride % size for stride in source.strides):
                source = np.ascontiguousarray(source)
            strides = tuple([stride // size for stride in source.strides])
            address = source.__array_interface__["data"][0]
            dtype = _NUMPY_NAMES.get(source.dtype) or source.dtype.name
            array = Array(source, address, dtype, source.shape, strides)
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
        """It as the C++ kernels see it."""
        return _native.View(self.address, _DTYPES[self.dtype], self.shape, self.strides)

    def to_numpy(self) -> npt.NDArray[np.float32]:
        """Its numbers as float32."""
        if isinstance(self.source, np.ndarray):
            return self.source.astype(np.float32)
        result: npt.NDArray[np.float32] = self.source.detach().float().numpy()
        return result

    def like(self, result: npt.NDArray[Any]) -> Any:
        """The result as the kind of array the caller passed."""
        if isinstance(self.source, np.ndarray):
            return result
        return sys.modules["torch"].from_numpy(result).to(self.source.device)

    def as_given(self, result: Any) -> Any:
        """A tensor as the kind of array the caller passed."""
        return result.numpy() if isinstance(self.source, np.ndarray) else result


class Draws(NamedTuple):
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
           position: Any) -> Draws:  # fmt: skip
        """The arguments of these names, checked."""
        sampled = _per_row("do_sample", do_sample, batch, bool)
        heat = _per_row("temperature", temperature, batch, float, sys.float_info.max)
        single = isinstance(sampled, bool) and isinstance(heat, float)
        return Draws(
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
        """They as the C++ kernels take them."""
        return _native.Draws(*self)


def _per_row(name: str, value: Any, batch: int, kind: type[bool] | type[int] | type[float], high: float = 1) -> Any:
    """One value, or an array [B] of them, of the kind and in [0, high]."""
    if type(value) is kind or (kind is float and type(value) is int):
        if not 0 <= value <= high:
            raise ValueError(f"{name}: expected a value in [0, {high}], got {value!r}")
        return kind(value)
    array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    kinds = {bool: "b", int: "iu", float: "iuf"}[kind]
    if array.dtype.kind not in kinds:
        raise TypeError(f"{name}: expected {kind.__name__}, or one for each row, got {value!r}")
    if array.shape not in ((), (batch,)):
        raise ValueError(f"{name}: expected one value or shape [{batch}], got shape {list(array.shape)}")
    if not ((array >= 0) & (array <= high)).all():
        raise ValueError(f"{name}: expected values in [0, {high}], got {value!r}")
    return array


def checked_weights(value: Any, shape: tuple[int, int], rule: MergeRule) -> npt.NDArray[np.float32]:
    """Mixture weights [B, K] float32 on the host."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor):
        value = value.detach().float().cpu().numpy()
    weights = np.ascontiguousarray(value, dtype=np.float32)
    if weights.shape != shape:
        raise ValueError(f"mixture_weights: expected shape {list(shape)} ([B, K]), got {list(weights.shape)}")
    return sampling.check_weights(weights, rule)
