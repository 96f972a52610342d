"""Fixtures that several test files share: the embedded checkpoint, tiny models of each family, random adapters."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports transformers: no test may ask a hub

import numpy as np
import pytest

from pcm_fast.adapter import Adapter, AdapterSite
from pcm_fast.checkpoint import Checkpoint, ModelConfig
from pcm_fast.loader import EMBEDDED_MODEL, embedded_path, load_checkpoint

TINY_SHAPE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
TINY_VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "llama_biased": {"attention_bias": True, "mlp_bias": True, "head_dim": 32, "rope_parameters": LLAMA3_ROPE},
    "mistral": {"sliding_window": 8},
    "qwen2": {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {"head_dim": 32},
}


@pytest.fixture(scope="session", autouse=True)
def cache_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer cache of the test run's own."""
    directory = tmp_path_factory.mktemp("cache")
    os.environ["PCM_FAST_CACHE"] = str(directory)
    return directory


@pytest.fixture(scope="session")
def embedded_gguf() -> Path:
    """The GGUF file of the embedded model."""
    pytest.importorskip("gguf")
    return embedded_path()


@pytest.fixture(scope="session")
def embedded_checkpoint(cache_directory: Path) -> Checkpoint:
    """The embedded model, SmolLM2-135M-Instruct."""
    return load_checkpoint(EMBEDDED_MODEL)


@pytest.fixture(scope="session")
def make_tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``make_tiny_model(variant, seed=0, **config)``: a random model saved by transformers; its directory."""

    def make(variant: str, seed: int = 0, dtype: str = "float32", max_shard_size: str = "5GB", **config: Any) -> Path:
        import torch
        import transformers

        family = variant.partition("_")[0]
        config_class = getattr(
            transformers, {"llama": "Llama", "mistral": "Mistral"}.get(family, family.title()) + "Config"
        )
        settings = config_class(**{**TINY_SHAPE, **TINY_VARIANTS[variant], **config})
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
            for name, parameter in model.named_parameters():
                # Norms off one, biases off zero: a loader that forgot them would be seen.
                torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
        directory = tmp_path_factory.mktemp(variant)
        model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size=max_shard_size)
        return directory

    return make


@pytest.fixture(scope="session")
def tiny_models(make_tiny_model: Callable[..., Path]) -> dict[str, Path]:
    """A directory for each of TINY_VARIANTS."""
    return {variant: make_tiny_model(variant) for variant in TINY_VARIANTS}


@pytest.fixture(scope="session", params=sorted(TINY_VARIANTS))
def tiny_model(request: pytest.FixtureRequest, tiny_models: dict[str, Path]) -> Path:
    """Each tiny model in turn."""
    return tiny_models[request.param]


@pytest.fixture(scope="session")
def tiny_llama_dir(tiny_models: dict[str, Path]) -> Path:
    """The tiny Llama."""
    return tiny_models["llama"]


@pytest.fixture(scope="session")
def tiny_mistral_dir(tiny_models: dict[str, Path]) -> Path:
    """The tiny Mistral."""
    return tiny_models["mistral"]


@pytest.fixture(scope="session")
def tiny_qwen2_dir(tiny_models: dict[str, Path]) -> Path:
    """The tiny Qwen2."""
    return tiny_models["qwen2"]


@pytest.fixture(scope="session")
def tiny_qwen3_dir(tiny_models: dict[str, Path]) -> Path:
    """The tiny Qwen3."""
    return tiny_models["qwen3"]


@pytest.fixture(scope="session")
def random_adapter() -> Callable[..., Adapter]:
    """``random_adapter(config, seed, rank=4, modules=None)``: an adapter in memory that clearly changes the model.

    ``modules`` are name endings such as ("q_proj", "down_proj"), by default every linear layer but the head.
    """

    def make(
        config: ModelConfig, seed: int, rank: int = 4, modules: tuple[str, ...] | None = None, size: float = 0.5
    ) -> Adapter:
        rng = np.random.default_rng(seed)
        sites: dict[str, AdapterSite] = {}
        for module, (out_features, in_features) in config.linear_shapes().items():
            if module == "lm_head" if modules is None else not module.endswith(modules):
                continue
            a = rng.standard_normal((rank, in_features), dtype=np.float32) / np.float32(in_features**0.5)
            b = rng.standard_normal((out_features, rank), dtype=np.float32) * np.float32(size / out_features**0.5)
            sites[module] = AdapterSite(a, b, scaling=2.0)
        return Adapter(None, sites)

    return make
