"""Hugging Face model directories: config.json, and safetensors weights in one file or in shards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pcm_fast.checkpoint import FAMILIES, MAX_LAYERS, LoadError, ModelConfig, StoredTensor
from pcm_fast.safetensors_file import read_safetensors

# What transformers assumes where config.json is silent; files it wrote itself are not.
DEFAULT_KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}
DEFAULT_MAX_WINDOW_LAYERS = 28


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; LoadError naming the file if it is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise LoadError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def read_shards(directory: Path) -> dict[str, StoredTensor]:
    """The tensors of ``model.safetensors``, or of the shards named by ``model.safetensors.index.json``."""
    single = directory / "model.safetensors"
    if single.exists():
        return read_safetensors(single)
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        raise LoadError(missing_weights(directory))
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise LoadError(f"{index}: expected an object weight_map from tensor names to shards, got {weight_map!r:.40}")
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(map(str, weight_map.values()))):
        if Path(shard).name != shard:
            raise LoadError(f"{index}: expected file names in weight_map, got the path {shard!r}")
        names = [name for name, where in weight_map.items() if where == shard]
        if not (directory / shard).exists():
            raise LoadError(
                f"{directory / shard}: this shard is missing, expected {len(names)} tensors, first {names[0]}"
            )
        stored = read_safetensors(directory / shard)
        for name in names:
            if name not in stored:
                raise LoadError(f"{directory / shard}: tensor {name} is missing, expected by {index.name}")
            tensors[name] = stored[name]
    return tensors


def missing_weights(directory: Path) -> str:
    """Why a directory without safetensors is refused."""
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
    if pickled:
        return (
            f"{directory / pickled[0]}: pickled weights can run code when loaded and are refused, "
            "expected model.safetensors"
        )
    ggufs = sorted(path.name for path in directory.glob("*.gguf"))
    hint = f"; to load {ggufs[0]}, name the file itself" if ggufs else ""
    return f"{directory}: expected model.safetensors or model.safetensors.index.json, got neither{hint}"


def read_config(directory: Path) -> tuple[ModelConfig | None, str | None]:
    """The model's configuration, or None and the reason why it is outside the four families.

    Raises:
        LoadError: config.json is missing or malformed, lacks a key, or says that the weights are quantised.
    """
    path = directory / "config.json"
    if not path.exists():
        if (directory / "adapter_config.json").exists():
            raise LoadError(
                f"{directory}: expected a model with a config.json, got a PEFT adapter: name it as an expert"
            )
        raise LoadError(f"{path}: missing, expected beside the weights")
    raw = read_json(path)
    generation_path = directory / "generation_config.json"
    generation = read_json(generation_path) if generation_path.exists() else {}
    if raw.get("quantization_config"):
        raise LoadError(f"{path}: quantization_config: expected plain weights, got {raw['quantization_config']!r:.80}")
    family = str(raw.get("model_type"))
    try:
        reason = unsupported(raw, family)
        if reason is not None:
            return None, f"{path}: {reason}"
        return parse_config(raw, generation, family), None
    except KeyError as error:
        raise LoadError(f"{path}: key {error} is missing") from error
    except (AttributeError, TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise LoadError(f"{path}: a value is not what was expected: {error}") from error


def unsupported(raw: Mapping[str, Any], family: str) -> str | None:
    """What keeps a configuration out of the four families, or None."""
    if family not in FAMILIES:
        return f"model_type {family!r} is none of {', '.join(FAMILIES)}"
    if raw.get("hidden_act", "silu") != "silu":
        return f"hidden_act is {raw['hidden_act']!r}, expected 'silu'"
    rope = raw.get("rope_parameters") or {}
    if "full_attention" in rope or "sliding_attention" in rope:
        return "rope_parameters differ by layer type"
    if (rope.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1.0) != 1.0:
        return "only a part of each head is rotated (partial_rotary_factor)"
    return None


def parse_config(raw: Mapping[str, Any], generation: Mapping[str, Any], family: str) -> ModelConfig:
    """A config.json of one of the four families; generation_config.json decides the end-of-sequence tokens."""
    num_layers, num_heads, hidden_size = (
        int(raw[key]) for key in ("num_hidden_layers", "num_attention_heads", "hidden_size")
    )
    if num_layers > MAX_LAYERS:
        raise ValueError(f"num_hidden_layers: expected at most {MAX_LAYERS}, got {num_layers}")
    theta, scaling = parse_rope(raw)
    window = raw.get("sliding_window", 4096 if family == "mistral" else None)
    sliding = sliding_layers(raw, family, num_layers) if window is not None else (False,) * num_layers
    all_bias = bool(raw.get("attention_bias", False)) and family in ("llama", "qwen3")
    head_dim = raw.get("head_dim") or (128 if family == "qwen3" else hidden_size // num_heads)
    ids = {key: generation.get(key, raw.get(key)) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return ModelConfig(
        family=family,
        vocab_size=int(raw["vocab_size"]),
        hidden_size=hidden_size,
        intermediate_size=int(raw["intermediate_size"]),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=int(raw.get("num_key_value_heads") or DEFAULT_KV_HEADS.get(family, num_heads)),
        head_dim=int(head_dim),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=int(raw.get("max_position_embeddings", 2048)),
        sliding_window=int(window) if any(sliding) else None,
        sliding_layers=sliding,
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        attention_bias=all_bias or family == "qwen2",
        attention_out_bias=all_bias,
        mlp_bias=bool(raw.get("mlp_bias", False)) and family == "llama",
        qk_norm=family == "qwen3",
        bos_token_id=first_id(ids["bos_token_id"]),
        eos_token_ids=token_ids(ids["eos_token_id"]),
        pad_token_id=first_id(ids["pad_token_id"]),
    )


def parse_rope(raw: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """``rope_theta`` and the scaling, from transformers 5's rope_parameters or from the older pair of keys."""
    merged = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    theta = float(merged.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0)
    kind = merged.pop("rope_type", None) or merged.get("type") or "default"
    merged.pop("type", None)
    merged.pop("partial_rotary_factor", None)
    if kind == "default":
        return theta, None
    if "original_max_position_embeddings" in raw:
        merged.setdefault("original_max_position_embeddings", raw["original_max_position_embeddings"])
    return theta, {"rope_type": str(kind), **merged}


def sliding_layers(raw: Mapping[str, Any], family: str, num_layers: int) -> tuple[bool, ...]:
    """Which layers see only the last ``sliding_window`` positions."""
    if family in ("llama", "mistral"):
        return (family == "mistral",) * num_layers
    if not raw.get("use_sliding_window", False):
        return (False,) * num_layers
    if raw.get("layer_types"):
        return tuple(kind == "sliding_attention" for kind in raw["layer_types"])
    first = int(raw.get("max_window_layers", DEFAULT_MAX_WINDOW_LAYERS))
    return tuple(layer >= first for layer in range(num_layers))


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """One id, several or none, as a tuple."""
    if value is None:
        return ()
    return tuple(int(item) for item in value) if isinstance(value, list) else (int(value),)


def first_id(value: int | list[int] | None) -> int | None:
    """The first of one id, several or none."""
    return next(iter(token_ids(value)), None)
