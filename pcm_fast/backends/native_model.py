"""A checkpoint and its adapters in the C++ decoder: the base weights once, in the precision they are kept in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from pcm_fast import _native
from pcm_fast.adapter import Adapter
from pcm_fast.backends.readers import SITES
from pcm_fast.checkpoint import Checkpoint, ModelConfig, StoredTensor

Float32 = npt.NDArray[np.float32]

FORMATS = {"F32": 0, "BF16": 1, "Q8_0": 2, "Q4_0": 3, "Q4_1": 4}
BLOCK_FORMATS = ("Q8_0", "Q4_0", "Q4_1")
ROPE_TYPES = ("default", "linear", "llama3", "factors")


def unsupported(config: ModelConfig) -> str | None:
    """Why the C++ decoder cannot run a model of this shape; None if it can."""
    rope = (config.rope_scaling or {}).get("rope_type", "default")
    if rope not in ROPE_TYPES:
        return f"rotary scaling of type {rope!r}"
    for name in ("hidden_size", "intermediate_size", "head_dim"):
        if getattr(config, name) % 16:
            return f"{name} {getattr(config, name)} is no multiple of 16"
    return None


class NativeModel:
    """One checkpoint in the C++ decoder, with the adapters its rows may carry (those of ``Readers.adapters``).

    Attributes:
        config: its shape.
        decoder: the C++ decoder.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        adapters: Sequence[Adapter],
        weights: str,
        activations: str,
        isa: str,
        pool: _native.ThreadPool,
    ) -> None:
        config = checkpoint.config
        assert config is not None
        self.config = config
        windows = [(config.sliding_window or 0) if slides else 0 for slides in config.sliding_layers]
        self.decoder = _native.Decoder(
            isa,
            pool,
            config.num_layers,
            config.hidden_size,
            config.intermediate_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            config.vocab_size,
            config.rms_norm_eps,
            windows,
        )
        in_blocks = weights == "q8_0" or any(t.dtype in BLOCK_FORMATS for t in checkpoint.tensors.values())
        if activations == "int8" and not in_blocks:
            raise ValueError(
                f"activations: 'int8' expects weights in blocks of 8 or 4 bits, and {checkpoint.path.name} has none; "
                "use weights='q8_0'"
            )
        self.decoder.int8_activations = activations == "int8"
        self._load(checkpoint.tensors, weights)
        for adapter in adapters:  # each gets its place among them as its number
            self.decoder.add_adapter(_native_sites(adapter, config.num_layers))
        self._positions = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of the packed weights and adapters."""
        return self.decoder.num_bytes

    def profile(self) -> dict[str, float]:
        """Seconds spent in each part of the decoder so far."""
        return self.decoder.profile()

    def reserve_positions(self, count: int) -> None:
        """Have rotary factors for so many positions."""
        if count > self._positions:
            self._positions = 1024 * math.ceil(count / 1024)
            angles = np.outer(np.arange(self._positions, dtype=np.float32), inverse_frequencies(self.config))
            self.decoder.set_rope(np.cos(angles), np.sin(angles))

    def _load(self, tensors: Mapping[str, StoredTensor], weights: str) -> None:
        decoder, config = self.decoder, self.config
        for name, set_weight in (("model.embed_tokens", decoder.set_embedding), ("lm_head", decoder.set_head)):
            if f"{name}.weight" in tensors:
                set_weight(*packed(tensors[f"{name}.weight"], weights))
                tensors[f"{name}.weight"].release()
        decoder.set_norm(0, "final", tensors["model.norm.weight"].dequantize())
        for layer in range(config.num_layers):
            prefix = f"model.layers.{layer}."
            decoder.set_norm(layer, "input", tensors[prefix + "input_layernorm.weight"].dequantize())
            decoder.set_norm(layer, "post", tensors[prefix + "post_attention_layernorm.weight"].dequantize())
            if config.qk_norm:
                decoder.set_norm(layer, "q", tensors[prefix + "self_attn.q_norm.weight"].dequantize())
                decoder.set_norm(layer, "k", tensors[prefix + "self_attn.k_norm.weight"].dequantize())
            for site, name in enumerate(SITES):
                tensor = tensors[f"{prefix}{name}.weight"]
                kind, rows = packed(tensor, weights)
                decoder.set_linear(layer, site, kind, tensor.shape[0], tensor.shape[1], rows)
                tensor.release()  # the decoder has them in panels
                if config.has_bias(prefix + name):
                    decoder.set_bias(layer, site, tensors[f"{prefix}{name}.bias"].dequantize())


def packed(tensor: StoredTensor, weights: str) -> tuple[int, npt.NDArray[np.uint8]]:
    """The format and the rows of bytes that a weight matrix [out, in] is kept in.

    "auto" and "gguf" keep what the checkpoint has; a kind that the decoder does not know becomes float32.
    """
    wanted = {"float32": "F32", "bfloat16": "BF16", "q8_0": "Q8_0"}.get(weights, tensor.dtype)
    if wanted not in FORMATS:
        wanted = "F32"
    if wanted == tensor.dtype:
        return FORMATS[wanted], np.ascontiguousarray(tensor.blocks())
    values = tensor.dequantize()
    if wanted == "F32":
        return FORMATS[wanted], values.view(np.uint8)
    import gguf

    kind = getattr(gguf.GGMLQuantizationType, wanted)
    return FORMATS[wanted], np.ascontiguousarray(gguf.quants.quantize(values, kind)).view(np.uint8)


def inverse_frequencies(config: ModelConfig) -> Float32:
    """Inverse rotary frequencies [head_dim / 2]; scaling as in Hugging Face's "linear" and "llama3" (Llama 3.1)."""
    scaling = config.rope_scaling or {}
    kind = scaling.get("rope_type", "default")
    frequencies = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    if kind == "factors":
        frequencies = frequencies / np.asarray(scaling["factors"])
    elif kind == "linear":
        frequencies = frequencies / scaling["factor"]
    elif kind == "llama3":
        low, high, factor = scaling["low_freq_factor"], scaling["high_freq_factor"], scaling["factor"]
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        smooth = np.clip((turns - low) / (high - low), 0, 1)
        frequencies = (1 - smooth) * frequencies / factor + smooth * frequencies
    result: Float32 = frequencies.astype(np.float32)
    return result


def _native_sites(adapter: Adapter, num_layers: int) -> list[tuple[int, int, Float32, Float32]]:
    """Layer, site and factors of every site; that of the LM head stands in the layer after the last."""
    sites = []
    for path, factors in adapter.sites.items():
        if path == "lm_head":
            layer, site = num_layers, 0
        else:
            _, _, number, name = path.split(".", 3)
            layer, site = int(number), SITES.index(name)
        scaled = np.ascontiguousarray(factors.B.T * np.float32(factors.scaling), dtype=np.float32)
        sites.append((layer, site, np.ascontiguousarray(factors.A, dtype=np.float32), scaled))
    return sites
