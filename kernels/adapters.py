"""LoRA for a batch whose rows have different adapters: y[t] += B[a] A[a] x[t] with a = adapter of row t.

Two launches for each site, whatever the number of adapters. The shrink, A x, is split over the input so that few rows
still fill the chip; the expand sums the parts in a fixed order and adds the product to what the base layer left in y.
Nothing is sorted by adapter and no adapter is copied: in a mixture every token goes to every expert, in one order.

Adapters of different ranks are stacked with zeros up to the largest. Sites that read the same input (q, k and v; gate
and up) shrink together: stack their A along the rank, and let each expand take its columns of the result.
"""

import torch
import triton
import triton.language as tl

TILE = 8192  # numbers of A that a program multiplies at a time: a register file's worth, whatever the rank
BLOCK_OUT = 64  # of the output, a program
MAX_SPLITS = 32


@triton.jit
def shrink_rows(
    x, x_stride, A, A_stride_n, A_stride_r, adapter, parts, parts_stride_s, parts_stride_t, size, CHUNK,
    R: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """parts[s, t] = A[a] x[t] over the s-th stretch of the input, float32 [R]."""
    t = tl.program_id(0).to(tl.int64)
    s = tl.program_id(1)
    a = tl.load(adapter + t).to(tl.int64)
    if a >= 0:
        r = tl.arange(0, LANES)
        start = s * CHUNK
        end = tl.minimum(start + CHUNK, size)
        total = tl.zeros([LANES, BLOCK], tl.float32)
        for at in range(start, end, BLOCK):
            i = at + tl.arange(0, BLOCK)
            row = tl.load(x + t * x_stride + i, mask=i < end, other=0.0).to(tl.float32)
            where = A + a * A_stride_n + r[:, None] * A_stride_r + i[None, :]
            tile = tl.load(where, mask=(r[:, None] < R) & (i[None, :] < end), other=0.0).to(tl.float32)
            total += tile * row[None, :]
        tl.store(parts + s * parts_stride_s + t * parts_stride_t + r, tl.sum(total, 1), mask=r < R)


@triton.jit
def expand_rows(
    parts, parts_stride_s, parts_stride_t, B, B_stride_n, B_stride_o, adapter, y, y_stride, size, splits,
    R: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y[t] += B[a] (sum over s of parts[s, t]), for a stretch of the output."""
    t = tl.program_id(0).to(tl.int64)
    a = tl.load(adapter + t).to(tl.int64)
    if a >= 0:
        r = tl.arange(0, LANES)
        o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        low = tl.zeros([LANES], tl.float32)
        for s in range(splits):
            low += tl.load(parts + s * parts_stride_s + t * parts_stride_t + r, mask=r < R, other=0.0)
        where = B + a * B_stride_n + o[:, None] * B_stride_o + r[None, :]
        tile = tl.load(where, mask=(o[:, None] < size) & (r[None, :] < R), other=0.0).to(tl.float32)
        place = y + t * y_stride + o
        base = tl.load(place, mask=o < size, other=0.0).to(tl.float32)
        tl.store(place, (base + tl.sum(tile * low[None, :], 1)).to(y.dtype.element_ty), mask=o < size)


def shrink(x: torch.Tensor, A: torch.Tensor, adapter: torch.Tensor, *, splits: int = 1) -> torch.Tensor:
    """A[a] x for each row, in parts that are still to be summed.

    Args:
        x: [T, in], rows contiguous; float32, bfloat16 or float16.
        A: [N, R, in], zeros where an adapter's rank is less than R; last dimension contiguous.
        adapter: [T] int32, -1 for a row without one.
        splits: stretches of the input, 1 to 32.

    Returns:
        [splits, T, R] float32; rows without an adapter are not set.
    """
    rows, size = x.shape
    rank = A.shape[1]
    if x.stride(1) != 1 or A.stride(2) != 1 or A.shape[2] != size:
        raise ValueError(f"shrink: expected contiguous rows of one length, got x {list(x.shape)}, A {list(A.shape)}")
    if not 1 <= splits <= MAX_SPLITS:
        raise ValueError(f"splits: expected 1 to {MAX_SPLITS}, got {splits}")
    lanes = triton.next_power_of_2(rank)
    block = max(32, TILE // lanes)
    chunk = -(-size // (splits * block)) * block
    splits = -(-size // chunk)
    parts = torch.empty(splits, rows, rank, dtype=torch.float32, device=x.device)
    if rows:
        shrink_rows[(rows, splits)](
            x, x.stride(0), A, A.stride(0), A.stride(1), adapter, parts, parts.stride(0), parts.stride(1), size, chunk,
            R=rank, LANES=lanes, BLOCK=block, num_warps=8,
        )  # fmt: skip
    return parts


def expand(parts: torch.Tensor, B: torch.Tensor, adapter: torch.Tensor, y: torch.Tensor) -> None:
    """Add B[a] times the sum of the parts to y, in place.

    Args:
        parts: [splits, T, R] float32, from `shrink`; last dimension contiguous.
        B: [N, out, R], the adapters' scaling included; last dimension contiguous.
        adapter: [T] int32, -1 for a row without one.
        y: [T, out], rows contiguous: the base layer's product.
    """
    rows, size = y.shape
    rank = B.shape[2]
    if y.stride(1) != 1 or B.stride(2) != 1 or parts.stride(2) != 1:
        raise ValueError("expand: expected y, B and parts contiguous in their last dimension")
    if B.shape[1] != size or tuple(parts.shape[1:]) != (rows, rank):
        raise ValueError(f"expand: shapes do not fit: parts {list(parts.shape)}, B {list(B.shape)}, y {list(y.shape)}")
    if rows:
        expand_rows[(rows, triton.cdiv(size, BLOCK_OUT))](
            parts, parts.stride(0), parts.stride(1), B, B.stride(0), B.stride(1), adapter, y, y.stride(0), size,
            parts.shape[0], R=rank, LANES=triton.next_power_of_2(rank), BLOCK=BLOCK_OUT, num_warps=4,
        )  # fmt: skip
