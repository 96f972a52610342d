"""Write the keys and values of new tokens into a paged cache.

The cache is seen through strides, so the order of slots and items within a block is the owner's choice, and may differ
between keys and values.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def store_rows(
    keys, values, keys_stride_t, keys_stride_h, values_stride_t, values_stride_h, slots,
    key_cache, key_stride_n, key_stride_h, key_stride_s, key_stride_d,
    value_cache, value_stride_n, value_stride_h, value_stride_s, value_stride_d,
    HEADS: tl.constexpr, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, LANES_H: tl.constexpr, LANES_D: tl.constexpr,
):  # fmt: skip
    """All heads of one token, rounded to the cache's type."""
    t = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + t).to(tl.int64)
    if slot >= 0:
        block = slot // BLOCK_SIZE
        offset = slot % BLOCK_SIZE
        h = tl.arange(0, LANES_H)[:, None]
        d = tl.arange(0, LANES_D)[None, :]
        mask = (h < HEADS) & (d < SIZE)
        key = tl.load(keys + t * keys_stride_t + h * keys_stride_h + d, mask=mask)
        value = tl.load(values + t * values_stride_t + h * values_stride_h + d, mask=mask)
        key_at = key_cache + block * key_stride_n + h * key_stride_h + offset * key_stride_s + d * key_stride_d
        value_at = value_cache + block * value_stride_n + h * value_stride_h
        value_at += offset * value_stride_s + d * value_stride_d
        tl.store(key_at, key.to(key_cache.dtype.element_ty), mask=mask)
        tl.store(value_at, value.to(value_cache.dtype.element_ty), mask=mask)


def store_kv(
    keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor
) -> None:
    """Write keys and values [T, heads, size] into the cache.

    Args:
        keys, values: float32, bfloat16 or float16, contiguous in their last dimension.
        slots: [T] int32 or int64: block * block_size + place in the block; -1 writes nothing. No two alike.
        key_cache, value_cache: [blocks, heads, block_size, size], any strides.
    """
    rows, heads, size = keys.shape
    if keys.shape != values.shape or keys.stride(2) != 1 or values.stride(2) != 1:
        raise ValueError(f"store_kv: keys {list(keys.shape)} and values {list(values.shape)} do not fit")
    if key_cache.shape != value_cache.shape or (key_cache.shape[1], key_cache.shape[3]) != (heads, size):
        raise ValueError(
            f"store_kv: caches {list(key_cache.shape)} and {list(value_cache.shape)} do not fit keys {list(keys.shape)}"
        )
    if rows:
        store_rows[(rows,)](
            keys, values, *keys.stride()[:2], *values.stride()[:2], slots,
            key_cache, *key_cache.stride(), value_cache, *value_cache.stride(),
            HEADS=heads, SIZE=size, BLOCK_SIZE=key_cache.shape[2],
            LANES_H=triton.next_power_of_2(heads), LANES_D=triton.next_power_of_2(size), num_warps=4,
        )  # fmt: skip
