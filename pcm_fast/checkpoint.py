"""A checkpoint as it lies on disk: the model's shape, and tensors that are read only when they are used."""

from __future__ import annotations

import hashlib
import mmap
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pcm_fast.quantization import READABLE_DTYPES, block_layout, dequantize

if TYPE_CHECKING:
    from pcm_fast.tokenizer import Tokenizer

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
MAX_LAYERS = 10_000  # a broken file must not ask for a list of billions


class LoadError(ValueError):
    """A file that cannot be loaded: one line naming the file, the tensor or key, what was expected and what came."""

    def __init__(self, message: str) -> None:
        super().__init__(message.replace("\n", " "))  # other libraries' reasons may have several lines


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder of the Llama, Mistral, Qwen2 or Qwen3 family.

    ``rope_scaling`` is None for plain rotary embeddings, otherwise a Hugging Face dictionary with ``rope_type``
    ("linear", "dynamic", "yarn", "longrope", "llama3") and its parameters, or, for a GGUF file whose per-frequency
    divisors follow no known rule, ``{"rope_type": "factors", "factors": (head_dim / 2 floats)}``: inverse frequency i
    is ``rope_theta ** (-2 i / head_dim) / factors[i]``.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    rope_scaling: Mapping[str, Any] | None = None
    sliding_window: int | None = None  # how many last positions a sliding layer sees, itself included
    sliding_layers: tuple[bool, ...] = ()  # one a layer; all False when not given
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # of q, k and v
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if self.num_layers > MAX_LAYERS:
            raise ValueError(f"num_layers: expected at most {MAX_LAYERS}, got {self.num_layers}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads: expected a divisor of {self.num_heads}, got {self.num_kv_heads}")
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim: expected an even number, got {self.head_dim}")
        if len(self.sliding_layers) not in (0, self.num_layers):
            raise ValueError(f"sliding_layers: expected {self.num_layers} entries, got {len(self.sliding_layers)}")
        if not self.sliding_layers:
            object.__setattr__(self, "sliding_layers", (False,) * self.num_layers)

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """``(out_features, in_features)`` of every linear layer, by Hugging Face module path, the head included."""
        q_width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        in_layer = {
            "self_attn.q_proj": (q_width, self.hidden_size),
            "self_attn.k_proj": (kv_width, self.hidden_size),
            "self_attn.v_proj": (kv_width, self.hidden_size),
            "self_attn.o_proj": (self.hidden_size, q_width),
            "mlp.gate_proj": (self.intermediate_size, self.hidden_size),
            "mlp.up_proj": (self.intermediate_size, self.hidden_size),
            "mlp.down_proj": (self.hidden_size, self.intermediate_size),
        }
        shapes = {
            f"model.layers.{layer}.{name}": shape
            for layer in range(self.num_layers)
            for name, shape in in_layer.items()
        }
        shapes["lm_head"] = (self.vocab_size, self.hidden_size)
        return shapes

    def has_bias(self, module: str) -> bool:
        """Whether the linear layer at this module path has a bias."""
        if module.endswith((".q_proj", ".k_proj", ".v_proj")):
            return self.attention_bias
        if module.endswith(".o_proj"):
            return self.attention_out_bias
        return self.mlp_bias and ".mlp." in module

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor a checkpoint must hold, by Hugging Face name; without a tied head."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, self.hidden_size)}
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}"
            shapes[f"{prefix}.input_layernorm.weight"] = (self.hidden_size,)
            shapes[f"{prefix}.post_attention_layernorm.weight"] = (self.hidden_size,)
            if self.qk_norm:
                shapes[f"{prefix}.self_attn.q_norm.weight"] = (self.head_dim,)
                shapes[f"{prefix}.self_attn.k_norm.weight"] = (self.head_dim,)
        shapes["model.norm.weight"] = (self.hidden_size,)
        for module, shape in self.linear_shapes().items():
            if module == "lm_head" and self.tie_word_embeddings:
                continue
            shapes[f"{module}.weight"] = shape
            if self.has_bias(module):
                shapes[f"{module}.bias"] = shape[:1]
        return shapes


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """One tensor as it lies in its file. ``data`` is a slice of a memory map: nothing is read until it is used.

    ``shape`` is in Hugging Face order, ``dtype`` a GGUF type name ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", ...).
    ``interleaved_heads`` is the number of heads whose rows llama.cpp interleaved for its rotary embedding, or 0.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    data: npt.NDArray[np.uint8] = field(repr=False)
    interleaved_heads: int = 0

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.data.nbytes

    def blocks(self) -> npt.NDArray[np.uint8]:
        """The stored bytes, uint8 [rows, bytes_per_row], rows in Hugging Face order; a vector is one row.

        A read-only view of the file, or a copy where rows had to be put in order. Quantised blocks stay as they are.
        """
        columns = self.shape[-1] if self.shape else 1
        block_size, block_bytes = block_layout(self.dtype)
        bytes_per_row = columns // block_size * block_bytes
        stored = self.data
        if self.interleaved_heads:
            # Whole rows move (single elements of a bias), so no block is ever taken apart.
            half_head = self.shape[0] // self.interleaved_heads // 2
            stored = stored.reshape(self.interleaved_heads, half_head, 2, -1).swapaxes(1, 2)
        return stored.reshape(-1, bytes_per_row)

    def dequantize(self) -> npt.NDArray[np.float32]:
        """A new float32 array of ``shape``."""
        values = dequantize(self.blocks(), self.dtype).reshape(self.shape)
        self.release()
        return values

    def release(self) -> None:
        """Let the pages of the file go that reading has brought into this process; the next use brings them back."""
        owner: object = self.data
        while isinstance(owner, np.ndarray):
            owner = owner.base
        if not isinstance(owner, mmap.mmap) or not hasattr(owner, "madvise") or not self.nbytes:
            return
        begin = self.data.ctypes.data - np.frombuffer(owner, np.uint8).ctypes.data
        page = begin // mmap.PAGESIZE * mmap.PAGESIZE
        owner.madvise(mmap.MADV_DONTNEED, page, begin + self.nbytes - page)


@dataclass
class Checkpoint:
    """A model on disk, checked against its own configuration.

    ``config`` is None for an architecture outside the four families (``family_reason`` says which); such a checkpoint
    runs through transformers alone. ``tensors`` go by Hugging Face names and are exactly those the model is made of,
    without a tied head, buffers and the like; where ``config`` is None, all that the files hold.
    """

    path: Path
    format: str  # "gguf" | "safetensors"
    config: ModelConfig | None
    tensors: Mapping[str, StoredTensor] = field(repr=False)
    read_tokenizer: Callable[[], Tokenizer | None] = field(repr=False)
    family_reason: str | None = None

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The checkpoint's tokenizer, read when first asked for; None if it has none.

        Raises:
            LoadError: the tokenizer cannot be read, or has token ids that the model's vocabulary lacks.
        """
        tokenizer = self.read_tokenizer()
        if tokenizer is not None and self.config is not None and tokenizer.vocab_size > self.config.vocab_size:
            raise LoadError(
                f"{self.path}: vocabulary mismatch: the tokenizer has {tokenizer.vocab_size} tokens, "
                f"expected at most {self.config.vocab_size}, the rows of model.embed_tokens.weight"
            )
        return tokenizer

    @property
    def head(self) -> StoredTensor:
        """The language-model head [vocab_size, hidden_size]: the embedding itself where the two are tied."""
        if self.config is not None and self.config.tie_word_embeddings:
            return self.tensors["model.embed_tokens.weight"]
        return self.tensors["lm_head.weight"]

    @property
    def num_parameters(self) -> int:
        """Parameters, a tied head counted once."""
        return sum(tensor.size for tensor in self.tensors.values())

    @property
    def num_bytes(self) -> int:
        """Bytes of those parameters on disk: what one pass over the weights has to read."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def dtypes(self) -> dict[str, int]:
        """Parameters by type name, most frequent first, e.g. ``{"Q4_1": 106168320, "F32": 35136}``."""
        counts: Counter[str] = Counter()
        for tensor in self.tensors.values():
            counts[tensor.dtype] += tensor.size
        return dict(counts.most_common())

    @cached_property
    def identity(self) -> str:
        """A hexadecimal name for these weights, the same wherever the files lie.

        Made of the configuration, every tensor's name, type and shape, and 64 bytes from the middle and the end of
        each: cheap for any size, and two trainings differ in nearly every byte.
        """
        digest = hashlib.sha256(repr(self.config or self.family_reason).encode())
        for name in sorted(self.tensors):
            tensor = self.tensors[name]
            digest.update(repr((name, tensor.shape, tensor.dtype, tensor.nbytes)).encode())
            middle = tensor.nbytes // 2
            digest.update(tensor.data[middle : middle + 64].tobytes())
            digest.update(tensor.data[-64:].tobytes())
            tensor.release()
        return digest.hexdigest()[:32]


def check_tensors(path: Path, config: ModelConfig, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors that the configuration asks for, each there in its shape and in a readable type; else LoadError."""
    needed: dict[str, StoredTensor] = {}
    for name, shape in config.tensor_shapes().items():
        tensor = tensors.get(name)
        if tensor is None:
            raise LoadError(f"{path}: tensor {name} is missing, expected shape {list(shape)}")
        if tensor.shape != shape:
            raise LoadError(f"{tensor.file}: tensor {name}: expected shape {list(shape)}, got {list(tensor.shape)}")
        if tensor.dtype not in READABLE_DTYPES:
            raise LoadError(
                f"{tensor.file}: tensor {name}: expected one of the types {', '.join(READABLE_DTYPES)}, "
                f"got {tensor.dtype}, which is not supported"
            )
        needed[name] = tensor
    return needed


def check_same_vocabulary(base: Checkpoint, other: Checkpoint) -> None:
    """Raise LoadError unless a token id means the same in both checkpoints.

    The numbers of logits must agree and, where both have a tokenizer, no token may have another id, and no id another
    token. An id that only one of them names is no conflict: GGUF files fill up the vocabulary with placeholders.
    """
    if base.config is not None and other.config is not None and base.config.vocab_size != other.config.vocab_size:
        raise LoadError(
            f"{other.path}: vocabulary mismatch: expected the {base.config.vocab_size} tokens of {base.path}, "
            f"got {other.config.vocab_size}"
        )
    if base.tokenizer is None or other.tokenizer is None:
        return
    expected, got = base.tokenizer.backend.get_vocab(), other.tokenizer.backend.get_vocab()
    if expected == got:
        return
    token_of = {index: token for token, index in got.items()}
    for token, index in sorted(expected.items(), key=lambda item: item[1]):
        if token_of.get(index, token) != token or got.get(token, index) != index:
            raise LoadError(
                f"{other.path}: vocabulary mismatch: expected token id {index} to be {token!r}, as in {base.path}, "
                f"got {token_of.get(index)!r}"
            )
