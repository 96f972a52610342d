"""Attention of one new token a row over a paged cache, rows of different lengths, grouped heads.

The context of a row is split over programs, each of which serves all query heads of one key/value head, so that keys
and values are read once; a second launch puts the parts together. How often a context is split is the caller's choice
and not data: the same launches serve every length, as a CUDA graph needs.
"""

import torch
import triton
import triton.language as tl

BLOCK = 32  # tokens at a time
MIN_HEADS = 16  # rows of the smallest tile that tl.dot multiplies
MAX_SPLITS = 64


@triton.jit
def attend_parts(
    queries, query_stride_t, query_stride_h,
    key_cache, key_stride_n, key_stride_h, key_stride_s, key_stride_d,
    value_cache, value_stride_n, value_stride_h, value_stride_s, value_stride_d,
    tables, table_stride, lengths, window, scale_log2, tops, totals, parts, splits,
    GROUP: tl.constexpr, SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One stretch of one row's context for the GROUP query heads of one key/value head.

    Leaves the greatest score in units of log2 (tops), the sum of 2^(score - top) (totals) and the values summed with
    those weights (parts), at [t, head, split]. `scale_log2` is the scale of the scores times log2(e).
    """
    t = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(lengths + t)
    first = tl.maximum(length - window, 0)
    chunk = tl.cdiv(tl.cdiv(length - first, splits), BLOCK) * BLOCK
    start = first + split * chunk
    end = tl.minimum(start + chunk, length)

    g = tl.arange(0, HEADS)
    d = tl.arange(0, LANES)
    j = tl.arange(0, BLOCK)
    head = kv_head * GROUP + g
    query = tl.load(
        queries + t * query_stride_t + head[:, None] * query_stride_h + d[None, :],
        mask=(g[:, None] < GROUP) & (d[None, :] < SIZE),
        other=0.0,
    )
    top = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    part = tl.zeros([HEADS, LANES], tl.float32)
    for at in range(start, end, BLOCK):
        token = at + j
        inside = token < end
        block = tl.load(tables + t * table_stride + token // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        slot = token % BLOCK_SIZE
        key_at = key_cache + block * key_stride_n + kv_head * key_stride_h + slot * key_stride_s
        key = tl.load(
            key_at[None, :] + d[:, None] * key_stride_d, mask=(d[:, None] < SIZE) & inside[None, :], other=0.0
        )
        score = tl.dot(query, key.to(query.dtype), input_precision="ieee") * scale_log2
        score = tl.where(inside[None, :], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp2(score - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        value_at = value_cache + block * value_stride_n + kv_head * value_stride_h + slot * value_stride_s
        value = tl.load(
            value_at[:, None] + d[None, :] * value_stride_d, mask=inside[:, None] & (d[None, :] < SIZE), other=0.0
        )
        total = total * shrink + tl.sum(weight, 1)
        part = part * shrink[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        top = new_top

    heads = tl.num_programs(1) * GROUP
    place = (t * heads + head) * splits + split
    tl.store(tops + place, top, mask=g < GROUP)
    tl.store(totals + place, total, mask=g < GROUP)
    tl.store(
        parts + place[:, None] * SIZE + d[None, :], part, mask=(g[:, None] < GROUP) & (d[None, :] < SIZE)
    )  # fmt: skip


@triton.jit
def combine_parts(
    tops, totals, parts, output, output_stride_t, output_stride_h, splits,
    SIZE: tl.constexpr, LANES: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """The parts of one row and head put together; zeros for a row of length 0."""
    t = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    place = (t * tl.num_programs(1) + head) * splits
    s = tl.arange(0, SPLITS)
    d = tl.arange(0, LANES)
    top = tl.load(tops + place + s, mask=s < splits, other=float("-inf"))
    greatest = tl.max(top, 0)
    weight = tl.where(top == float("-inf"), 0.0, tl.exp2(top - greatest))
    total = tl.sum(weight * tl.load(totals + place + s, mask=s < splits, other=0.0), 0)
    part = tl.load(
        parts + (place + s)[:, None] * SIZE + d[None, :], mask=(s[:, None] < splits) & (d[None, :] < SIZE), other=0.0
    )
    mean = tl.sum(part * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(
        output + t * output_stride_t + head * output_stride_h + d, mean.to(output.dtype.element_ty), mask=d < SIZE
    )  # fmt: skip


def attention(
    queries: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    splits: int = 1,
) -> torch.Tensor:
    """Softmax attention of each row's newest token over the row's context, the token itself included.

    Args:
        queries: [T, heads, size], contiguous in the last dimension; float32, bfloat16 or float16.
        key_cache, value_cache: [blocks, kv_heads, block_size, size], any strides; heads is a multiple of kv_heads.
        tables: [T, .] int32, the blocks of each row in order. Entries past a row's length are not read.
        lengths: [T] int32, tokens of each row, the new one included; a row of length 0 gives zeros.
        scale: of the scores, such as size ** -0.5.
        window: only the last so many tokens are attended to; None for all.
        splits: programs that share a context, 1 to 64.

    Returns:
        [T, heads, size] of the queries' type.
    """
    rows, heads, size = queries.shape
    kv_heads, block_size = key_cache.shape[1:3]
    if heads % kv_heads or key_cache.shape != value_cache.shape or key_cache.shape[3] != size or queries.stride(2) != 1:
        caches = f"{list(key_cache.shape)}, {list(value_cache.shape)}"
        raise ValueError(f"attention: queries {list(queries.shape)} do not fit caches {caches}")
    if not 1 <= splits <= MAX_SPLITS:
        raise ValueError(f"splits: expected 1 to {MAX_SPLITS}, got {splits}")
    group = heads // kv_heads
    tops, totals = torch.empty(2, rows, heads, splits, dtype=torch.float32, device=queries.device)
    parts = torch.empty(rows, heads, splits, size, dtype=torch.float32, device=queries.device)
    output = torch.empty(rows, heads, size, dtype=queries.dtype, device=queries.device)
    lanes = max(16, triton.next_power_of_2(size))
    if rows == 0:
        return output
    attend_parts[(rows, kv_heads, splits)](
        queries, *queries.stride()[:2], key_cache, *key_cache.stride(), value_cache, *value_cache.stride(),
        tables, tables.stride(0), lengths, 2**31 - 1 if window is None else window, scale * 1.4426950408889634,
        tops, totals, parts, splits,
        GROUP=group, SIZE=size, BLOCK_SIZE=block_size,
        HEADS=max(MIN_HEADS, triton.next_power_of_2(group)), LANES=lanes, BLOCK=BLOCK, num_warps=4, num_stages=2,
    )  # fmt: skip
    combine_parts[(rows, heads)](
        tops, totals, parts, output, *output.stride()[:2], splits,
        SIZE=size, LANES=lanes, SPLITS=triton.next_power_of_2(splits), num_warps=4,
    )  # fmt: skip
    return output
