"""The models of a mixture in C++ decoders: one for each distinct checkpoint, whoever shares it."""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt

from pcm_fast import _native, ops
from pcm_fast.adapter import Adapter
from pcm_fast.backends.native_model import SITES, NativeModel, unsupported
from pcm_fast.checkpoint import Checkpoint
from pcm_fast.kv_cache import namespace_id
from pcm_fast.pcm import LearnedPCM
from pcm_fast.sequence import Reader
from pcm_fast.spec import ModelSpec
from pcm_fast.vocabulary import vocab_size

Float32 = npt.NDArray[np.float32]


def reason_against(spec: ModelSpec) -> str | None:
    """Why the native backend cannot run this mixture; None if it can."""
    if len(spec.experts) > _native.MAX_EXPERTS:
        return f"more than {_native.MAX_EXPERTS} experts"
    for owner, checkpoint, adapter in readers_of(spec):
        where = "" if checkpoint is spec.checkpoint else f" ({owner})"
        if checkpoint.config is None:
            return (checkpoint.family_reason or "an architecture it does not know") + where
        reason = unsupported(checkpoint.config)
        if reason is not None:
            return reason + where
        if checkpoint.config.vocab_size != vocab_size(spec.checkpoint):
            return f"a vocabulary of {checkpoint.config.vocab_size} tokens{where}"
        for path in adapter.sites if adapter is not None else ():
            if path != "lm_head" and not path.endswith(SITES):
                return f"an adapter on {path}"
    return None


def readers_of(spec: ModelSpec) -> list[tuple[str, Checkpoint, Adapter | None]]:
    """Everybody who reads text: a name for messages, the checkpoint and the adapter; the PCM last."""
    readers = [(f"expert {e.name!r}", spec.expert_checkpoint(i), e.adapter) for i, e in enumerate(spec.experts)]
    if isinstance(spec.pcm, LearnedPCM):
        readers.append(("the PCM", spec.pcm.checkpoint or spec.checkpoint, spec.pcm.adapter))
    return readers


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
        everybody = readers_of(spec)
        checkpoints = list({id(checkpoint): checkpoint for _, checkpoint, _ in everybody}.values())
        for checkpoint in checkpoints:
            adapters = [adapter for _, other, adapter in everybody if other is checkpoint and adapter is not None]
            self.models.append(NativeModel(checkpoint, adapters, weights, activations, isa, pool))
        index = {id(checkpoint): i for i, checkpoint in enumerate(checkpoints)}
        readers = [
            Reader(
                model=index[id(checkpoint)],
                adapter=self.models[index[id(checkpoint)]].adapter_index(adapter),
                namespace=namespace_id(
                    checkpoint.identity, adapter.identity if adapter else "", weights, activations, kv_dtype
                ),
                adapts_head=adapter is not None and "lm_head" in adapter.sites,
            )
            for _, checkpoint, adapter in everybody
        ]
        learned = isinstance(spec.pcm, LearnedPCM)
        self.experts: tuple[Reader, ...] = tuple(readers[:-1] if learned else readers)
        self.pcm: Reader | None = readers[-1] if learned else None
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
        readers = (*self.experts, *(() if self.pcm is None else (self.pcm,)))
        return sum(reader.model == model for reader in readers)
