"""The mixture on C++ decoders: the experts and the PCM are rows of one pass over one set of weights a token."""

from __future__ import annotations

from functools import partial

from pcm_fast.backends.engine_decoder import EngineDecoder
from pcm_fast.backends.native_models import NativeModels
from pcm_fast.backends.native_runner import NativeRunner
from pcm_fast.spec import ModelSpec


def native_decoder(
    spec: ModelSpec, weights: str, num_threads: int | None, kv_dtype: str, activations: str
) -> EngineDecoder:
    """A mixture on C++ decoders; see ``MixtureModel`` for the arguments."""
    models = NativeModels(spec, weights, num_threads, kv_dtype, activations)
    return EngineDecoder(spec, models, partial(NativeRunner, models))
