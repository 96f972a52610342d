"""GGUF files of the four families: configuration and tensors under their Hugging Face names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from pcm_fast.checkpoint import FAMILIES, MAX_LAYERS, LoadError, ModelConfig, StoredTensor
from pcm_fast.gguf_header import GGUFHeader, StringList, TensorEntry
from pcm_fast.quantization import READABLE_DTYPES, dequantize

HF_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
HF_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FREQS = "rope_freqs.weight"
# The published Llama 3.1 and 3.2 checkpoints share these; llama.cpp stores only the divisors that they lead to.
LLAMA3_LOW, LLAMA3_HIGH, LLAMA3_CONTEXT = 1.0, 4.0, 8192


def hf_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor; a tensor of unknown purpose keeps its own."""
    stem, _, suffix = name.rpartition(".")
    if stem in HF_NAMES:
        return f"{HF_NAMES[stem]}.{suffix}"
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if layer and layer[2] in HF_LAYER_NAMES:
        return f"model.layers.{int(layer[1])}.{HF_LAYER_NAMES[layer[2]]}.{suffix}"
    return name


def read_tensors(header: GGUFHeader, config: ModelConfig) -> dict[str, StoredTensor]:
    """Every tensor, by Hugging Face name. llama.cpp's order of the rows of q and k is undone when they are read."""
    permuted = {"self_attn.q_proj": config.num_heads, "self_attn.k_proj": config.num_kv_heads}
    tensors: dict[str, StoredTensor] = {}
    for entry in header.tensors.values():
        name = hf_name(entry.name)
        module = name.rpartition(".")[0].partition("layers.")[2].partition(".")[2]
        heads = permuted.get(module, 0) if config.family in ("llama", "mistral") else 0
        if heads and entry.shape[0] != heads * config.head_dim:
            raise LoadError(
                f"{header.path}: tensor {name}: expected {heads * config.head_dim} rows, got {entry.shape[0]}"
            )
        tensors[name] = StoredTensor(name, entry.shape, entry.dtype, header.path, entry.data, heads)
    return tensors


def read_config(header: GGUFHeader) -> ModelConfig:
    """The configuration in a GGUF file's metadata.

    Raises:
        LoadError: another architecture, a part of a split file, or a key that is missing or of an unusable value.
    """
    path, metadata = header.path, header.metadata
    family = str(metadata.get("general.architecture"))
    if family not in FAMILIES:
        raise LoadError(
            f"{path}: general.architecture: expected one of {', '.join(FAMILIES)}, got {family!r}; "
            "another architecture runs from a Hugging Face directory"
        )
    if int(metadata.get("split.count", 0)) > 1:
        raise LoadError(f"{path}: expected a whole file, got one of {metadata['split.count']} parts: merge them first")
    if metadata.get(f"{family}.expert_count"):
        raise LoadError(f"{path}: {family}.expert_count: expected a dense model, got a mixture-of-experts one")

    def number(key: str, default: float | None = None) -> float:
        value = metadata.get(f"{family}.{key}", default)
        if isinstance(value, list) and len(set(value)) == 1:  # one value a layer, all the same
            value = value[0]
        if value is None:
            raise LoadError(f"{path}: {family}.{key}: expected a number, got nothing")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise LoadError(f"{path}: {family}.{key}: expected a number, got {value!r:.60}")
        return value

    def token_id(key: str) -> int | None:
        value = metadata.get(f"tokenizer.ggml.{key}_token_id")
        return value if isinstance(value, int) else None

    embedding = entry(header, "token_embd.weight")
    if len(embedding.shape) != 2:
        raise LoadError(f"{path}: tensor {embedding.name}: expected two dimensions, got shape {list(embedding.shape)}")
    num_layers, num_heads, hidden_size = (
        int(number(key)) for key in ("block_count", "attention.head_count", "embedding_length")
    )
    if num_heads < 1 or not 1 <= num_layers <= MAX_LAYERS:
        raise LoadError(f"{path}: expected 1 to {MAX_LAYERS} layers and a head, got {num_layers} and {num_heads}")
    rotated = number("rope.dimension_count", number("attention.key_length", hidden_size // num_heads))
    head_dim = int(number("attention.key_length", rotated))
    if rotated != head_dim:
        raise LoadError(
            f"{path}: {family}.rope.dimension_count: expected the whole head of {head_dim}, got {rotated:g}"
        )
    window = int(number("attention.sliding_window", 0))
    ids = (token_id("eos"), token_id("eot"))
    return ModelConfig(
        # llama.cpp calls Mistral "llama"; the two differ in nothing but the window.
        family="mistral" if family == "llama" and window else family,
        vocab_size=embedding.shape[0],
        hidden_size=hidden_size,
        intermediate_size=int(number("feed_forward_length")),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=int(number("attention.head_count_kv", num_heads)),
        head_dim=head_dim,
        rms_norm_eps=float(number("attention.layer_norm_rms_epsilon")),
        rope_theta=float(number("rope.freq_base", 10000.0)),
        rope_scaling=read_rope_scaling(header, family, head_dim, number),
        max_position_embeddings=int(number("context_length")),
        sliding_window=window or None,
        sliding_layers=(window > 0,) * num_layers,
        tie_word_embeddings="output.weight" not in header.tensors,
        attention_bias=family == "qwen2" or "blk.0.attn_q.bias" in header.tensors,
        attention_out_bias="blk.0.attn_output.bias" in header.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in header.tensors,
        qk_norm=family == "qwen3",
        bos_token_id=token_id("bos"),
        eos_token_ids=tuple(dict.fromkeys(index for index in ids if index is not None)),
        pad_token_id=token_id("padding"),
    )


def read_rope_scaling(header: GGUFHeader, family: str, head_dim: int, number: Any) -> dict[str, Any] | None:
    """The rotary scaling as a Hugging Face dictionary: from the keys, or from the stored divisors of Llama 3."""
    if ROPE_FREQS in header.tensors:
        stored = entry(header, ROPE_FREQS)
        if stored.shape != (head_dim // 2,) or stored.dtype not in READABLE_DTYPES:
            raise LoadError(
                f"{header.path}: tensor {ROPE_FREQS}: expected F32 [{head_dim // 2}], got "
                f"{stored.dtype} {list(stored.shape)}"
            )
        factors = dequantize(stored.data.reshape(1, -1), stored.dtype)[0]
        return scaling_of_factors(factors, float(number("rope.freq_base", 10000.0)))
    kind = str(header.metadata.get(f"{family}.rope.scaling.type", "none"))
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise LoadError(f"{header.path}: {family}.rope.scaling.type: expected none, linear or yarn, got {kind!r}")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": float(number("rope.scaling.factor"))}
    if kind == "yarn":
        context = number("rope.scaling.original_context_length", number("context_length"))
        scaling["original_max_position_embeddings"] = int(context)
    return scaling


def scaling_of_factors(factors: npt.NDArray[np.float32], theta: float) -> dict[str, Any] | None:
    """Llama 3's parameters if they explain the divisors [head_dim / 2], else the divisors themselves."""
    if bool((factors == 1.0).all()):
        return None
    factor = round(float(factors.max()), 4)
    if np.allclose(factors, llama3_factors(len(factors), theta, factor), rtol=1e-5):
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": LLAMA3_LOW,
            "high_freq_factor": LLAMA3_HIGH,
            "original_max_position_embeddings": LLAMA3_CONTEXT,
        }
    return {"rope_type": "factors", "factors": tuple(factors.tolist())}


def llama3_factors(count: int, theta: float, factor: float) -> npt.NDArray[np.float64]:
    """What Llama 3's rule divides each of ``count`` inverse frequencies by."""
    frequencies = theta ** -(np.arange(count) / count)
    wavelengths = 2 * np.pi / frequencies
    smooth = (LLAMA3_CONTEXT / wavelengths - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW)
    blended = 1.0 / ((1.0 - smooth) / factor + smooth)
    long_waves = np.where(wavelengths > LLAMA3_CONTEXT / LLAMA3_LOW, factor, blended)
    return np.where(wavelengths < LLAMA3_CONTEXT / LLAMA3_HIGH, 1.0, long_waves)


def entry(header: GGUFHeader, name: str) -> TensorEntry:
    """A tensor of the header; LoadError if it is not there."""
    if name not in header.tensors:
        raise LoadError(f"{header.path}: tensor {hf_name(name)} ({name}) is missing")
    return header.tensors[name]


def check_tokens(header: GGUFHeader, config: ModelConfig) -> None:
    """Raise LoadError if the file lists more tokens than the embedding has rows."""
    tokens: Mapping[str, Any] | StringList | None = header.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, StringList) and tokens.length > config.vocab_size:
        raise LoadError(
            f"{header.path}: vocabulary mismatch: tokenizer.ggml.tokens has {tokens.length} tokens, "
            f"expected at most {config.vocab_size}, the rows of model.embed_tokens.weight"
        )
