"""Keys and values on a device: the paged memory of one model, and what is done to it and to a step's counters.

The CUDA extension does this in one launch each (csrc/cuda/kv_ops.h says what); here it is composed of torch's
operators, for the CPU and for builds without the extension. Neither reads anything back from the device.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

import numpy as np
import torch

from pcm_fast.backends import cuda_kv
from pcm_fast.checkpoint import ModelConfig
from pcm_fast.kv_cache import BLOCK_SIZE

GOING, STOPPED, NO_ROOM, FAILED = range(4)  # states of a sequence, see csrc/cuda/kv_ops.h


class DeviceKv:
    """The paged keys and values of one model.

    Attributes:
        cache: [blocks + 1, layers, 2, kv_heads, block_size, head_dim]; all that belongs to a block lies together. The
            last block belongs to nobody: what rows without a slot would store goes there.
    """

    def __init__(self, config: ModelConfig, blocks: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (blocks + 1, config.num_layers, 2, config.num_kv_heads, BLOCK_SIZE, config.head_dim)
        self.cache = torch.zeros(shape, dtype=dtype, device=device)

    def layer(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer, each [blocks + 1, kv_heads, block_size, head_dim]."""
        return self.cache[:, index, 0], self.cache[:, index, 1]

    def copy_blocks(self, copies: Items[tuple[int, int]]) -> None:
        """Copy blocks (from, to), all at the same time."""
        pairs = torch.from_numpy(np.array(copies, np.int64)).to(self.cache.device)
        if _by_extension(self.cache):
            cuda_kv.copy_blocks(self.cache, pairs)
        else:
            self.cache[pairs[:, 1]] = self.cache[pairs[:, 0]]


def _by_extension(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cuda" and cuda_kv.available()


def store_kv(
    keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor
) -> None:
    """Write keys and values [T, heads, size] into their slots [T] int64 of a ``DeviceKv.layer``; -1 writes nothing."""
    if _by_extension(key_cache):
        _store_kv(keys, values, slots, key_cache, value_cache)
        return
    blocks, _, block_size, _ = key_cache.shape
    slots = torch.where(slots < 0, (blocks - 1) * block_size, slots)
    block, place = slots // block_size, slots % block_size
    key_cache[block, :, place] = keys.to(key_cache.dtype)
    value_cache[block, :, place] = values.to(value_cache.dtype)


@torch.library.custom_op("pcm_fast::store_kv", mutates_args=("key_cache", "value_cache"))
def _store_kv(
    keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor
) -> None:
    cuda_kv.store_kv(keys, values, slots, key_cache, value_cache)


@_store_kv.register_fake
def _(
    keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor
) -> None:
    if slots.dtype != torch.int64:
        raise TypeError(f"slots: expected int64, got {slots.dtype}")


def advance(
    drawn: torch.Tensor,
    stop_tokens: torch.Tensor,
    state: torch.Tensor,
    draw_positions: torch.Tensor,
    sequence_of: torch.Tensor,
    capacities: torch.Tensor,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    tables: torch.Tensor,
    going: torch.Tensor,
) -> None:
    """Turn the tokens of a step into the inputs of the next, in place: the last thing that a captured step does.

    Args:
        drawn: [B] int64, -1 where the sampler failed.
        stop_tokens: [B, .] int64, filled up with -1.
        state: [B] int32.
        draw_positions: [B] int64, the position that keys the next draw.
        sequence_of: [R] int32, whose row it is; -1 for rows that fill up a bucket.
        capacities: [R] int32, tokens that a row has slots for.
        input_ids, positions, slots: [R] int64, what the next step reads.
        lengths: [R] int32, positions + 1.
        tables: [R, .] int32, the blocks of each row.
        going: [1] int32, how many sequences go on.
    """
    if _by_extension(tables):
        _advance(
            drawn, stop_tokens, state, draw_positions, sequence_of, capacities, input_ids, positions, slots, lengths,
            tables, going, BLOCK_SIZE,
        )  # fmt: skip
        return
    mine = sequence_of >= 0
    whose = sequence_of.clamp(min=0).long()
    full = mine & (positions + 1 >= capacities)
    no_room = torch.zeros_like(state).index_add(0, whose, full.to(state.dtype)) > 0
    stopped = (stop_tokens == drawn[:, None]).any(1)
    new = torch.where(no_room, NO_ROOM, GOING)
    new = torch.where(drawn < 0, FAILED, torch.where(stopped, STOPPED, new))
    state.copy_(torch.where((state == GOING) | (state == NO_ROOM), new, state))
    goes = state == GOING
    draw_positions += goes
    moves = mine & goes[whose]
    input_ids.copy_(torch.where(moves, drawn[whose], input_ids))
    positions += moves
    lengths += moves
    at = (positions // BLOCK_SIZE).clamp(max=tables.shape[1] - 1)
    block = tables.gather(1, at[:, None])[:, 0]
    slots.copy_(torch.where(moves, block * BLOCK_SIZE + positions % BLOCK_SIZE, -1))
    going.copy_(goes.sum(0, keepdim=True))


@torch.library.custom_op(
    "pcm_fast::advance",
    mutates_args=("state", "draw_positions", "input_ids", "positions", "slots", "lengths", "going"),
)
def _advance(
    drawn: torch.Tensor,
    stop_tokens: torch.Tensor,
    state: torch.Tensor,
    draw_positions: torch.Tensor,
    sequence_of: torch.Tensor,
    capacities: torch.Tensor,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    tables: torch.Tensor,
    going: torch.Tensor,
    block_size: int,
) -> None:
    cuda_kv.advance(
        drawn, stop_tokens, state, draw_positions, sequence_of, capacities, input_ids, positions, slots, lengths,
        tables, going, block_size,
    )  # fmt: skip


@_advance.register_fake
def _(
    drawn: torch.Tensor,
    stop_tokens: torch.Tensor,
    state: torch.Tensor,
    draw_positions: torch.Tensor,
    sequence_of: torch.Tensor,
    capacities: torch.Tensor,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    tables: torch.Tensor,
    going: torch.Tensor,
    block_size: int,
) -> None:
    whole = (drawn, stop_tokens, draw_positions, input_ids, positions, slots)
    short = (state, sequence_of, capacities, lengths, tables, going)
    if any(x.dtype != torch.int64 for x in whole) or any(x.dtype != torch.int32 for x in short):
        raise TypeError("advance: expected int64 tokens, positions and slots, int32 states, lengths and tables")
