"""The models of a mixture in C++ decoders: one for each distinct checkpoint, whoever shares it."""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt

from pcm_fast import _native, ops
from pcm_fast.backends import readers
from pcm_fast.backends.native_model import NativeModel, unsupported
from pcm_fast.kv_cache import host_memory
from pcm_fast.pcm import LearnedPCM
from pcm_fast.spec import ModelSpec

Float32 = npt.NDArray[np.float32]


def reason_against(spec: ModelSpec) -> str | None:
    """Why the native backend cannot run this mixture; None if it can."""
    return readers.reason_against(spec, unsupported)


class NativeModels:
    """All models of a mixture, and who of its experts reads with which of them.

    Attributes:
        models: one for each distinct checkpoint that anybody reads with.
        experts: the reader of each of the K experts.
        pcm: the reader of a learned PCM, None for another kind.
        head: weight [K, d] and bias [K] of a learned PCM, float32.
        kv_dtype: "float32" or "bfloat16".
        num_threads: threads they compute on.
        lock: held while any of them computes: their buffers serve one step at a time.
    """

    def __init__(
        self, spec: ModelSpec, weights: str, num_threads: int | None, kv_dtype: str, activations: str = "float32"
    ) -> None:
        reason = reason_against(spec)
        if reason is not None:
            raise ValueError(f"backend: the native backend does not run {reason}; use backend='reference'")
        if weights == "gguf" and spec.checkpoint.format != "gguf":
            raise ValueError(f"weights: expected a GGUF file for 'gguf', got {spec.checkpoint.path}")
        self.num_threads, self.kv_dtype = ops.num_threads(num_threads), kv_dtype
        self.lock = threading.Lock()
        self.models: list[NativeModel] = []
        isa, pool = ops.isa(), ops.thread_pool(self.num_threads)
        self.sampler = _native.MixSampler(isa, pool)
        found = readers.Readers.of(spec, weights, activations, kv_dtype)
        for checkpoint, adapters in zip(found.checkpoints, found.adapters, strict=True):
            self.models.append(NativeModel(checkpoint, adapters, weights, activations, isa, pool))
        self.experts, self.pcm = found.experts, found.pcm
        self.head: tuple[Float32, Float32] | None = None
        if isinstance(spec.pcm, LearnedPCM):
            self.head = (
                np.ascontiguousarray(spec.pcm.weight, np.float32),
                np.ascontiguousarray(spec.pcm.bias, np.float32),
            )

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed weights and adapters."""
        return sum(model.num_bytes for model in self.models)

    def profile(self) -> dict[str, float]:
        """Seconds spent in each part of the decoders so far."""
        total: dict[str, float] = {}
        for model in self.models:
            for part, seconds in model.profile().items():
                total[part] = total.get(part, 0.0) + seconds
        return total

    def rows_of_model(self, model: int) -> int:
        """Rows that a sequence with all experts has on one of the models."""
        return readers.rows_of_model(self.experts, self.pcm, model)

    def kv_memory(self) -> int:
        """Bytes that the KV caches of an engine take at most unless somebody asks for more."""
        return host_memory() // 4
