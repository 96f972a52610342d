"""A checkpoint and its adapters on torch: Llama, Mistral, Qwen2 and Qwen3, many rows over one set of weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from pcm_fast.adapter import Adapter
from pcm_fast.backends.native_model import inverse_frequencies
from pcm_fast.backends.torch_linear import Linear, StackedAdapters, on_device
from pcm_fast.checkpoint import Checkpoint

# attend(layer, queries [T, H, D], keys [T, Hkv, D], values [T, Hkv, D]) -> [T, H, D]: keeps the keys and values, and
# lets every token see the context of its row.
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights of one layer; norms float32."""

    input_norm: torch.Tensor
    post_norm: torch.Tensor
    qkv: Linear
    out: Linear
    gate_up: Linear
    down: Linear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None


class TorchModel:
    """One checkpoint on a device, with the adapters its rows may carry (those of ``Readers.adapters``).

    Activations are float32, and so is all arithmetic but the products with bfloat16 weights (``torch_linear.product``).

    Attributes:
        config: its shape.
        device: where it is.
    """

    def __init__(
        self, checkpoint: Checkpoint, adapters: Sequence[Adapter], dtype: torch.dtype, device: torch.device
    ) -> None:
        config = checkpoint.config
        assert config is not None
        self.config, self.device = config, device
        self._dtype, self._tensors, self._adapters = dtype, checkpoint.tensors, tuple(adapters)
        self._frequencies = on_device(inverse_frequencies(config), torch.float32, device)
        self._embedding = self._weight("model.embed_tokens.weight")
        self._norm = self._vector("model.norm.weight")
        tied = config.tie_word_embeddings
        head = self._embedding if tied else self._weight("lm_head.weight")
        self._head = Linear(head, None, self._stacked([("lm_head", 0, config.vocab_size)], config.hidden_size))
        self._layers = [self._layer(f"model.layers.{i}.") for i in range(config.num_layers)]
        linears = [linear for s in self._layers for linear in (s.qkv, s.out, s.gate_up, s.down)]
        self.num_bytes = sum(linear.num_bytes for linear in (*linears, self._head))
        self.num_bytes += 0 if tied else self._embedding.nbytes

    def forward(
        self, tokens: torch.Tensor, positions: torch.Tensor, adapters: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        """Hidden states after the last layer, before the final norm.

        Args:
            tokens, positions: [T] int64.
            adapters: [T] int32, -1 for none.
            attend: attention over the rows' contexts.

        Returns:
            [T, hidden] float32.
        """
        config = self.config
        angles = positions[:, None].float() * self._frequencies
        cos, sin = (torch.cat((x, x), -1)[:, None] for x in (angles.cos(), angles.sin()))
        heads, kv_heads, size = config.num_heads, config.num_kv_heads, config.head_dim
        x = functional.embedding(tokens, self._embedding).float()
        for i, layer in enumerate(self._layers):
            qkv = layer.qkv(self._normed(x, layer.input_norm), adapters).view(len(tokens), -1, size)
            q, k, v = qkv[:, :heads], qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :]
            if layer.q_norm is not None and layer.k_norm is not None:
                q, k = self._normed(q, layer.q_norm), self._normed(k, layer.k_norm)
            q, k = q * cos + _half_turned(q) * sin, k * cos + _half_turned(k) * sin
            attended = attend(i, q, k, v).reshape(len(tokens), heads * size)
            x = x + layer.out(attended, adapters)
            gate, up = layer.gate_up(self._normed(x, layer.post_norm), adapters).chunk(2, -1)
            x = x + layer.down(functional.silu(gate) * up, adapters)
        return x

    def final(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states after the final norm, [m, hidden] float32: what the head, and that of a PCM, reads."""
        return self._normed(hidden, self._norm)

    def logits(self, states: torch.Tensor, adapters: torch.Tensor) -> torch.Tensor:
        """Logits [m, V] float32 from ``final`` states."""
        return self._head(states, adapters)

    def window(self, layer: int) -> int:
        """How many last positions a layer sees; 0 for all."""
        return (self.config.sliding_window or 0) if self.config.sliding_layers[layer] else 0

    # --- Loading.

    def _layer(self, prefix: str) -> Layer:
        config = self.config
        q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        hidden, inner = config.hidden_size, config.intermediate_size
        attention = {"self_attn.q_proj": q, "self_attn.k_proj": kv, "self_attn.v_proj": kv}
        norms = [prefix + f"self_attn.{name}_norm.weight" if config.qk_norm else None for name in "qk"]
        q_norm, k_norm = (None if name is None else self._vector(name) for name in norms)
        return Layer(
            input_norm=self._vector(prefix + "input_layernorm.weight"),
            post_norm=self._vector(prefix + "post_attention_layernorm.weight"),
            qkv=self._linear(prefix, attention, hidden),
            out=self._linear(prefix, {"self_attn.o_proj": hidden}, q),
            gate_up=self._linear(prefix, {"mlp.gate_proj": inner, "mlp.up_proj": inner}, hidden),
            down=self._linear(prefix, {"mlp.down_proj": hidden}, inner),
            q_norm=q_norm,
            k_norm=k_norm,
        )

    def _linear(self, prefix: str, widths: dict[str, int], in_features: int) -> Linear:
        """The layers of these names and numbers of outputs, as one."""
        weight = torch.cat([self._weight(f"{prefix}{name}.weight") for name in widths])
        bias = None
        if self.config.has_bias(prefix + next(iter(widths))):
            bias = torch.cat([self._vector(f"{prefix}{name}.bias") for name in widths])
        columns = np.cumsum([0, *widths.values()]).tolist()
        sites = [(prefix + name, column, width) for (name, width), column in zip(widths.items(), columns, strict=False)]
        return Linear(weight, bias, self._stacked(sites, in_features))

    def _stacked(self, sites: Sequence[tuple[str, int, int]], in_features: int) -> StackedAdapters | None:
        if not self._adapters:
            return None
        return StackedAdapters(self._adapters, sites, in_features, self._dtype, self.device)

    def _weight(self, name: str) -> torch.Tensor:
        return on_device(self._tensors[name].dequantize(), self._dtype, self.device)

    def _vector(self, name: str) -> torch.Tensor:
        return on_device(self._tensors[name].dequantize(), torch.float32, self.device)

    def _normed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, weight.shape, weight, self.config.rms_norm_eps)


def _half_turned(x: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, -1)
    return torch.cat((-high, low), -1)
