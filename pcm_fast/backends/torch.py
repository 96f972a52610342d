"""The mixture on torch, for a GPU: the experts and the PCM are rows of one pass, a decode step is one CUDA graph."""

from __future__ import annotations

from functools import partial

from pcm_fast.backends.engine_decoder import EngineDecoder
from pcm_fast.backends.torch_models import TorchModels
from pcm_fast.backends.torch_runner import TorchRunner
from pcm_fast.spec import ModelSpec


def torch_decoder(spec: ModelSpec, weights: str, num_threads: int | None, kv_dtype: str, device: str) -> EngineDecoder:
    """A mixture on torch; see ``MixtureModel`` for the arguments."""
    models = TorchModels(spec, weights, num_threads, kv_dtype, device)
    return EngineDecoder(spec, models, partial(TorchRunner, models))
