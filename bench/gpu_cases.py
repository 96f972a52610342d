"""Calls of every launcher as a decode step makes them, for what is compiled and counted without a GPU."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from pcm_fast.kernels.adapters import expand, shrink
from pcm_fast.kernels.attention import attention
from pcm_fast.kernels.mix_sample import Workspace, mix_sample

META = torch.device("meta")


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor without memory."""
    return torch.empty(*shape, dtype=dtype, device=META)


def mix_sample_call(
    batch: int,
    experts: int,
    vocabulary: int,
    splits: int,
    merge: str = "linear",
    limits: tuple[str, ...] = ("top_p",),
    dtype: torch.dtype = torch.bfloat16,
    expert_logprobs: bool = False,
) -> Callable[[], Any]:
    """A call of mix_sample."""
    column = partial(tensor, batch)
    dtypes = {"top_k": torch.int64, "top_p": torch.float64, "min_p": torch.float64}
    return partial(
        mix_sample,
        tensor(batch, experts, vocabulary, dtype=dtype),
        tensor(batch, experts, dtype=torch.float32),
        merge=merge,
        exponent=0.5,
        temperature=column(dtype=torch.float32),
        **{name: column(dtype=torch.int64) for name in ("seeds", "sequences", "positions")},
        **{name: column(dtype=dtypes[name]) for name in limits},
        return_expert_logprobs=expert_logprobs,
        splits=splits,
        workspace=Workspace.of(batch, vocabulary, META),
    )


def adapter_call(
    rows: int, adapters: int, size_in: int, size_out: int, rank: int, splits: int, dtype: torch.dtype = torch.bfloat16
) -> Callable[[], Any]:
    """A call of shrink and expand, as for one site."""
    adapter = tensor(rows, dtype=torch.int32)

    def call() -> None:
        A, B = tensor(adapters, rank, size_in, dtype=dtype), tensor(adapters, size_out, rank, dtype=dtype)
        parts = shrink(tensor(rows, size_in, dtype=dtype), A, adapter, splits=splits)
        expand(parts, B, adapter, tensor(rows, size_out, dtype=dtype))

    return call


def attention_call(
    rows: int, heads: int, kv_heads: int, size: int, context: int, splits: int, dtype: torch.dtype = torch.bfloat16
) -> Callable[[], Any]:
    """A call of attention, as for one layer, with keys that lie by slot."""
    block_size = 16
    blocks = rows * -(-context // block_size)

    def call() -> None:
        keys = tensor(blocks, kv_heads, size, block_size, dtype=dtype).transpose(2, 3)
        values = tensor(blocks, kv_heads, block_size, size, dtype=dtype)
        tables, lengths = tensor(rows, context // block_size, dtype=torch.int32), tensor(rows, dtype=torch.int32)
        queries = tensor(rows, heads, size, dtype=dtype)
        attention(queries, keys, values, tables, lengths, scale=size**-0.5, splits=splits)

    return call


EVERY_LIMIT = ("top_k", "top_p", "min_p")
CASES: dict[str, Callable[[], Any]] = {
    "mix_sample, rows, linear, top-p": mix_sample_call(64, 4, 128_256, 1),
    "mix_sample, rows, power, K=16, all limits": mix_sample_call(
        64, 16, 49_152, 1, "power", EVERY_LIMIT, torch.float32, True
    ),
    "mix_sample, split, linear, top-p": mix_sample_call(1, 4, 128_256, 63),
    "mix_sample, split, log_linear, all limits": mix_sample_call(4, 8, 151_936, 33, "log_linear", EVERY_LIMIT),
    "mix_sample, split, power, K=16, all limits": mix_sample_call(
        1, 16, 49_152, 24, "power", EVERY_LIMIT, torch.float32, True
    ),
    "adapters, 4096, rank 16": adapter_call(32, 4, 4096, 4096, 16, 8),
    "adapters, 576, rank 64, float32": adapter_call(5, 4, 576, 1536, 64, 2, torch.float32),
    "attention, 32 heads, 8 of keys, 128": attention_call(32, 32, 8, 128, 4096, 8),
    "attention, 9 heads, 3 of keys, 64, float32": attention_call(5, 9, 3, 64, 2048, 16, torch.float32),
}
