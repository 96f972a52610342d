"""What a step does on a device beside matrix products: the Triton kernels as torch operators, and torch on the CPU.

Each operator is declared once: on CUDA it launches the kernels of ``pcm_fast.kernels``, on the CPU it is composed of
torch's own operators (the draw is that of ``pcm_fast.ops``), or interpreted if ``PCM_FAST_FORCE=triton``. What a fake
tensor gets says which shapes and types come out, so that a step can be traced for a device that is not there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from pcm_fast import _native, ops

Draw = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _on_kernels(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cuda" or ops.backend() == "triton"


def _processors(device: torch.device) -> int:
    """Multiprocessors, among which the programs of a launch are shared out; 1 where triton interprets."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _expect(name: str, tensor: torch.Tensor | None, dtype: torch.dtype) -> None:
    """What a kernel would read as another type is an error already while a step is traced."""
    if tensor is not None and tensor.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {tensor.dtype}")


# --- LoRA by row: two launches for each group of sites.


@torch.library.custom_op("pcm_fast::shrink", mutates_args=())
def shrink(x: torch.Tensor, A: torch.Tensor, adapter: torch.Tensor) -> torch.Tensor:
    """A[a] x for each row, in parts that are still to be summed, [parts, T, R] float32.

    x: [T, in]; A: [N, R, in]; adapter: [T] int32, -1 for none (whose parts mean nothing).
    """
    if _on_kernels(x):
        from pcm_fast.kernels import adapters

        splits = max(1, min(adapters.MAX_SPLITS, _processors(x.device) // max(len(x), 1)))
        parts: torch.Tensor = adapters.shrink(x, A, adapter, splits=splits)
        return parts
    low = x.new_zeros(1, len(x), A.shape[1])
    for n in range(len(A)):
        mine = adapter == n
        if mine.any():
            low[0, mine] = functional.linear(x[mine], A[n].to(x.dtype))
    return low


@shrink.register_fake
def _(x: torch.Tensor, A: torch.Tensor, adapter: torch.Tensor) -> torch.Tensor:
    _expect("adapter", adapter, torch.int32)
    return x.new_empty((1, x.shape[0], A.shape[1]), dtype=torch.float32)


@torch.library.custom_op("pcm_fast::expand", mutates_args=("y",))
def expand(parts: torch.Tensor, B: torch.Tensor, adapter: torch.Tensor, y: torch.Tensor) -> None:
    """Add B[a] times the sum of the parts to y [T, out], in place; B: [N, out, R]."""
    if _on_kernels(y):
        from pcm_fast.kernels import adapters

        adapters.expand(parts, B, adapter, y)
        return
    low = parts.sum(0)
    for n in range(len(B)):
        mine = adapter == n
        if mine.any():
            y[mine] += functional.linear(low[mine], B[n].to(low.dtype))


@expand.register_fake
def _(parts: torch.Tensor, B: torch.Tensor, adapter: torch.Tensor, y: torch.Tensor) -> None:
    _expect("adapter", adapter, torch.int32)
    if parts.shape[2] != B.shape[2]:
        raise ValueError(f"B: expected rank {parts.shape[2]}, got {B.shape[2]}")


# --- Attention of one token a row over the paged cache.


@torch.library.custom_op("pcm_fast::attention", mutates_args=())
def attention(
    queries: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    window: int,
) -> torch.Tensor:
    """Attention of each row's newest token over its context, itself included; [T, heads, size].

    queries: [T, heads, size]; caches: [blocks, kv_heads, block_size, size]; tables: [T, .] int32; lengths: [T] int32,
    0 gives zeros; window: only the last so many tokens, 0 for all.
    """
    rows, heads, _ = queries.shape
    kv_heads, block_size = key_cache.shape[1:3]
    if _on_kernels(queries):
        from pcm_fast.kernels import attention as kernel

        # A launch shape may not depend on data: as if every context were as long as its table allows.
        chunks = -(-tables.shape[1] * block_size // kernel.BLOCK)
        wanted = 2 * _processors(queries.device) // max(rows * kv_heads, 1)
        splits = max(1, min(kernel.MAX_SPLITS, chunks, wanted))
        attended: torch.Tensor = kernel.attention(
            queries, key_cache, value_cache, tables, lengths, scale=scale, window=window or None, splits=splits
        )
        return attended
    longest = int(lengths.max()) if rows else 0
    blocks = tables[:, : -(-longest // block_size)].clamp(min=0).long()
    if blocks.shape[1] == 0:
        return torch.zeros_like(queries)
    keys, values = (
        cache[blocks].transpose(2, 3).flatten(1, 2).transpose(1, 2)  # [T, kv_heads, context, size]
        for cache in (key_cache, value_cache)
    )
    place = torch.arange(keys.shape[2])[None]
    seen = place < lengths[:, None]
    if window:
        seen = seen & (place >= lengths[:, None] - window)
    group = heads // kv_heads
    mixed = functional.scaled_dot_product_attention(
        queries[:, :, None],
        keys.repeat_interleave(group, 1).to(queries.dtype),
        values.repeat_interleave(group, 1).to(queries.dtype),
        attn_mask=seen[:, None, None],
        scale=scale,
    )[:, :, 0]
    return mixed.masked_fill((lengths == 0)[:, None, None], 0.0)


@attention.register_fake
def _(
    queries: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    scale: float,
    window: int,
) -> torch.Tensor:
    _expect("tables", tables, torch.int32)
    _expect("lengths", lengths, torch.int32)
    return torch.empty_like(queries, memory_format=torch.contiguous_format)


# --- Merge and draw.


@torch.library.custom_op("pcm_fast::mix_sample", mutates_args=())
def mix_sample(
    expert_logits: torch.Tensor,
    weights: torch.Tensor,
    seeds: torch.Tensor,
    sequences: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
    merge: str,
    exponent: float,
) -> Draw:
    """Merge K experts and draw one token a row.

    Gives tokens [B] int64, logprobs [B], status [B] int32 and expert_logprobs [B, K].

    expert_logits: [B, K, V]; weights: [B, K] float32; seeds, sequences, positions: [B] int64; temperature: [B] float32,
    0 for the most likely token; top_k: [B] int64; top_p, min_p: [B] float64; None where no row has that limit.
    """
    if _on_kernels(expert_logits):
        from pcm_fast.kernels.mix_sample import mix_sample as kernel

        drawn = kernel(
            expert_logits, weights, seeds=seeds, sequences=sequences, positions=positions, temperature=temperature,
            top_k=top_k, top_p=top_p, min_p=min_p, merge=merge, exponent=exponent, return_expert_logprobs=True,
        )  # fmt: skip
        return drawn.tokens, drawn.logprobs, drawn.status, drawn.expert_logprobs
    batch, experts, _ = expert_logits.shape
    tokens, logprobs = torch.empty(batch, dtype=torch.int64), torch.empty(batch)
    expert_logprobs = torch.full((batch, experts), torch.nan)
    if batch == 0:
        return tokens, logprobs, torch.empty(0, dtype=torch.int32), expert_logprobs
    columns: list[Any] = [
        (temperature == 0).numpy(),
        temperature.numpy(),
        0 if top_k is None else top_k.numpy(),
        1.0 if top_p is None else top_p.numpy(),
        0.0 if min_p is None else min_p.numpy(),
        *(column.numpy().view("uint64") for column in (seeds, sequences, positions)),
        tokens.numpy(),
        logprobs.numpy(),
    ]
    draws = _native.Draws(*columns)
    statuses = ops.sampler(torch.get_num_threads()).mix_sample(
        ops.view(expert_logits), weights.numpy(), ops.MERGES[merge], exponent, draws, None, expert_logprobs.numpy()
    )
    status = torch.tensor(statuses, dtype=torch.int32)
    bad = status != 0
    return (
        tokens.masked_fill(bad, -1),
        logprobs.masked_fill(bad, torch.nan),
        status,
        expert_logprobs.masked_fill(bad[:, None], torch.nan),
    )


@mix_sample.register_fake
def _(
    expert_logits: torch.Tensor,
    weights: torch.Tensor,
    seeds: torch.Tensor,
    sequences: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
    merge: str,
    exponent: float,
) -> Draw:
    batch, experts, _ = expert_logits.shape
    wanted = {
        "weights": (weights, torch.float32),
        "seeds": (seeds, torch.int64),
        "sequences": (sequences, torch.int64),
        "positions": (positions, torch.int64),
        "temperature": (temperature, torch.float32),
        "top_k": (top_k, torch.int64),
        "top_p": (top_p, torch.float64),
        "min_p": (min_p, torch.float64),
    }
    for name, (tensor, dtype) in wanted.items():
        _expect(name, tensor, dtype)
    return (
        seeds.new_empty(batch),
        weights.new_empty(batch),
        seeds.new_empty(batch, dtype=torch.int32),
        weights.new_empty(batch, experts),
    )
