"""transformers models out of our checkpoints, in float32, adapters merged."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
import transformers

from pcm_fast.adapter import Adapter
from pcm_fast.checkpoint import Checkpoint, ModelConfig

logger = logging.getLogger(__name__)


def build_model(checkpoint: Checkpoint) -> Any:
    """The causal LM of a checkpoint: weights dequantised to float32, names and shapes checked one by one, in eval mode.

    An architecture that is none of ours is loaded by transformers itself (from safetensors, without code of its own).
    """
    if checkpoint.config is None:
        logger.warning("%s: loaded through transformers: %s", checkpoint.path, checkpoint.family_reason)
        directory = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
        model = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
        return model.eval().requires_grad_(False)
    state = {name: torch.from_numpy(stored.dequantize()) for name, stored in checkpoint.tensors.items()}
    if checkpoint.config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    config = model_config(checkpoint.config)
    model = _assemble(config, state)
    # Rotary frequencies are no part of a state, so they have to be computed again.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    scaling = checkpoint.config.rope_scaling or {}
    if scaling.get("rope_type") == "factors":
        model.model.rotary_emb.inv_freq /= torch.tensor(scaling["factors"], dtype=torch.float32)
    return model


def merge_adapter(base: Any, adapter: Adapter) -> Any:
    """A copy of base with W + scaling * B A at the sites of the adapter; other weights are the base's own memory."""
    state = dict(base.state_dict())
    for site, factors in adapter.sites.items():
        state[f"{site}.weight"] = state[f"{site}.weight"] + torch.from_numpy(factors.delta())
    model = _assemble(base.config, state)
    model.model.rotary_emb = copy.deepcopy(base.model.rotary_emb)
    return model


def model_config(config: ModelConfig) -> Any:
    """The transformers configuration that says the same."""
    own_factors = (config.rope_scaling or {}).get("rope_type") == "factors"  # see build_model
    common: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": dict(config.rope_scaling) if config.rope_scaling and not own_factors else None,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids) or None,
        "pad_token_id": config.pad_token_id,
    }
    slides_in_layer = config.sliding_layers or (False,) * config.num_layers
    sliding = {
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
        "layer_types": ["sliding_attention" if slides else "full_attention" for slides in slides_in_layer],
    }
    if config.family == "llama":
        return transformers.LlamaConfig(**common, attention_bias=config.attention_bias, mlp_bias=config.mlp_bias)
    if config.family == "mistral":
        return transformers.MistralConfig(**common, sliding_window=config.sliding_window)
    if config.family == "qwen2":
        return transformers.Qwen2Config(**common, **sliding)
    if config.family == "qwen3":
        return transformers.Qwen3Config(**common, **sliding, attention_bias=config.attention_bias)
    raise ValueError(f"family: expected 'llama', 'mistral', 'qwen2' or 'qwen3', got {config.family!r}")


def _assemble(config: Any, state: dict[str, torch.Tensor]) -> Any:
    # On the meta device nothing is allocated or initialised; assign=True then takes the state's own memory.
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False)
