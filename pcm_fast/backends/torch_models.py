"""The models of a mixture on torch: one for each distinct checkpoint, all on one device."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

import numpy as np
import torch

from pcm_fast import ops
from pcm_fast.backends import cuda_kv, readers
from pcm_fast.backends.native_model import ROPE_TYPES
from pcm_fast.backends.torch_linear import on_device
from pcm_fast.backends.torch_model import TorchModel
from pcm_fast.checkpoint import Checkpoint, ModelConfig
from pcm_fast.kv_cache import host_memory
from pcm_fast.pcm import LearnedPCM
from pcm_fast.spec import ModelSpec

LOGGER = logging.getLogger(__name__)
WEIGHTS = ("auto", "float32", "bfloat16")


def reason_against(spec: ModelSpec) -> str | None:
    """Why the torch backend cannot run this mixture; None if it can."""
    return readers.reason_against(spec, _unsupported)


def resolve_device(device: str | None) -> str:
    """The device that is meant, with its number; None: a GPU if there is one.

    Raises:
        ValueError: there is no such device here, or it is of another kind.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = device.partition(":")
    if device != "cpu" and (kind != "cuda" or (number and not number.isdecimal()) or device.endswith(":")):
        raise ValueError(f"device: expected 'cuda', 'cuda:N' or 'cpu', got {device!r}")
    if kind == "cpu":
        return device
    count = torch.cuda.device_count()
    if not torch.cuda.is_available() or (number and int(number) >= count):
        raise ValueError(f"device: expected a GPU that torch sees (it sees {count}), got {device!r}")
    return f"cuda:{number or torch.cuda.current_device()}"


class TorchModels:
    """All models of a mixture, and who of its experts reads with which of them.

    Attributes:
        models: one for each distinct checkpoint that anybody reads with.
        experts: the reader of each of the K experts.
        pcm: the reader of a learned PCM, None for another kind.
        head: weight [K, d] and bias [K] of a learned PCM, float32, on the device.
        device: where everything is.
        kv_dtype: "float32" or "bfloat16".
        num_threads: threads that the host computes on.
        lock: held while any of them computes: engines share the device, one step at a time.
    """

    def __init__(self, spec: ModelSpec, weights: str, num_threads: int | None, kv_dtype: str, device: str) -> None:
        assert reason_against(spec) is None
        self.device, self.kv_dtype = torch.device(device), kv_dtype
        self.num_threads = ops.num_threads(num_threads)
        if self.device.type == "cuda" and not cuda_kv.available():
            ops.backend()  # raises if it is forced
            LOGGER.warning("keys and values are stored by torch's operators: this build has no CUDA extension")
        self.lock = threading.Lock()
        found = readers.Readers.of(spec, "torch", weights, kv_dtype, device)
        with self.running():
            self.models = [
                TorchModel(checkpoint, adapters, _dtype(checkpoint, weights), self.device)
                for checkpoint, adapters in zip(found.checkpoints, found.adapters, strict=True)
            ]
            self.head: tuple[torch.Tensor, torch.Tensor] | None = None
            if isinstance(spec.pcm, LearnedPCM):
                weight, bias = (np.array(part, np.float32) for part in (spec.pcm.weight, spec.pcm.bias))
                self.head = on_device(weight, torch.float32, self.device), on_device(bias, torch.float32, self.device)
        self.experts, self.pcm = found.experts, found.pcm

    @property
    def num_bytes(self) -> int:
        """Bytes of weights and adapters."""
        return sum(model.num_bytes for model in self.models)

    @property
    def vocab_size(self) -> int:
        """V, the same for all models."""
        return self.models[0].config.vocab_size

    def rows_of_model(self, model: int) -> int:
        """Rows that a sequence with all experts has on one of the models."""
        return readers.rows_of_model(self.experts, self.pcm, model)

    def kv_memory(self) -> int:
        """Bytes that the KV caches of an engine take at most unless somebody asks for more."""
        if self.device.type == "cpu":
            return host_memory() // 4
        return torch.cuda.mem_get_info(self.device)[0] // 2

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """For this thread to compute in: on the device, on its number of threads, without gradients, alone."""
        with self.lock, torch.no_grad(), contextlib.ExitStack() as stack:
            if self.device.type == "cuda":
                stack.enter_context(torch.cuda.device(self.device))
            before = torch.get_num_threads()
            torch.set_num_threads(self.num_threads)
            try:
                yield
            finally:
                torch.set_num_threads(before)


def pcm_weights(
    hidden: torch.Tensor, head: tuple[torch.Tensor, torch.Tensor], rows: torch.Tensor, present: torch.Tensor
) -> torch.Tensor:
    """Mixture weights [B, K] of a learned PCM, exactly 0 where there is no expert.

    Args:
        hidden: [B, d] float32, the PCM's final states.
        head: weight [E, d] and bias [E].
        rows: [B, K] int64, which row of the head belongs to which expert.
        present: [B, K] bool, whether there is one.
    """
    weight, bias = head
    scores = (hidden[:, None] * weight[rows]).sum(-1) + bias[rows]
    weights = torch.softmax(scores.masked_fill(~present, -torch.inf), -1)
    return torch.where(present, weights, 0.0)


def _unsupported(config: ModelConfig) -> str | None:
    rope = (config.rope_scaling or {}).get("rope_type", "default")
    return None if rope in ROPE_TYPES else f"rotary scaling of type {rope!r}"


def _dtype(checkpoint: Checkpoint, weights: str) -> torch.dtype:
    """What the weights are kept in. "auto": bfloat16 if they come so; blocks and the like become float32, exactly."""
    if weights == "auto":
        weights = "bfloat16" if next(iter(checkpoint.dtypes)) == "BF16" else "float32"
    return torch.bfloat16 if weights == "bfloat16" else torch.float32
