"""kernels/attention.py in Triton's interpreter against plain torch."""

import pytest
import torch
import triton_interpreter  # noqa: F401
from pcm_fast.kernels.attention import attention

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def caches(blocks, heads, block_size, size, dtype, layout):
    """Keys and values [blocks, heads, block_size, size], as a cache of its owner's layout holds them."""
    shape = (blocks, 2, heads, block_size * size)
    memory = torch.full(shape, torch.nan, dtype=dtype)  # what is not written is not read either
    keys, values = memory[:, 0], memory[:, 1]
    values = values.view(blocks, heads, block_size, size)
    if layout == "keys by slot":
        return keys.view(blocks, heads, size, block_size).transpose(2, 3), values
    return keys.view(blocks, heads, block_size, size), values


def case(seed, lengths, heads, kv_heads, size, block_size, dtype, layout="by token"):
    """Queries, filled caches, scattered block tables, lengths, and every row's context as it was stored."""
    random = torch.Generator().manual_seed(seed)
    rows = len(lengths)
    per_row = -(-max(*lengths, 1) // block_size)
    tables = torch.full((rows, per_row + 2), 10**6, dtype=torch.int32)
    order = torch.randperm(rows * per_row, generator=random).to(torch.int32)
    tables[:, :per_row] = order.view(rows, per_row)
    key_cache, value_cache = caches(rows * per_row, kv_heads, block_size, size, dtype, layout)
    queries = torch.randn(rows, heads, size, generator=random).to(dtype)
    contexts = []
    for t, length in enumerate(lengths):
        tables[t, -(-length // block_size) :] = 10**6
        keys, values = torch.randn(2, length, kv_heads, size, generator=random)
        places = torch.arange(length)
        blocks = tables[t, places // block_size].long()
        key_cache[blocks, :, places % block_size] = keys.to(dtype)
        value_cache[blocks, :, places % block_size] = values.to(dtype)
        contexts.append((keys.to(dtype), values.to(dtype)))
    return queries, key_cache, value_cache, tables, torch.tensor(lengths, dtype=torch.int32), contexts


def expected(queries, contexts, scale, window=None):
    group = queries.shape[1] // contexts[0][0].shape[1]
    result = torch.zeros(queries.shape, dtype=torch.float64)
    for t, (keys, values) in enumerate(contexts):
        if len(keys):
            keys, values = (x.double()[-(window or len(keys)) :].repeat_interleave(group, 1) for x in (keys, values))
            weights = torch.softmax(torch.einsum("hd,nhd->hn", queries[t].double(), keys) * scale, -1)
            result[t] = torch.einsum("hn,nhd->hd", weights, values)
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("lengths", "heads", "kv_heads", "size", "block_size", "splits"),
    [
        ([1], 1, 1, 64, 16, 1),
        ([33, 1, 0, 32, 31], 9, 3, 64, 16, 1),
        ([100, 7, 64], 6, 2, 48, 7, 3),
        ([129, 5], 24, 1, 32, 32, 8),
        ([70], 4, 4, 128, 16, 5),
    ],
)
def test_equals_torch(lengths, heads, kv_heads, size, block_size, splits, dtype):
    queries, key_cache, value_cache, tables, sizes, contexts = case(
        3, lengths, heads, kv_heads, size, block_size, dtype
    )
    out = attention(queries, key_cache, value_cache, tables, sizes, scale=size**-0.5, splits=splits)
    assert out.dtype == dtype
    assert (out.double() - expected(queries, contexts, size**-0.5)).abs().max() < TOLERANCE[dtype]


@pytest.mark.parametrize("window", [1, 8, 31, 1000])
def test_a_window_reads_the_last_tokens_alone(window):
    queries, key_cache, value_cache, tables, lengths, contexts = case(4, [60, 8, 9], 4, 2, 32, 16, torch.float32)
    out = attention(queries, key_cache, value_cache, tables, lengths, scale=0.2, window=window, splits=2)
    assert (out.double() - expected(queries, contexts, 0.2, window)).abs().max() < 1e-5


def test_the_layout_of_the_cache_is_its_owners():
    plain = case(5, [40, 3], 4, 2, 32, 16, torch.float32)
    by_slot = case(5, [40, 3], 4, 2, 32, 16, torch.float32, "keys by slot")
    outs = [attention(*one[:5], scale=0.2, splits=2) for one in (plain, by_slot)]
    assert (outs[0] == outs[1]).all()


def test_large_scores_do_not_overflow():
    queries, key_cache, value_cache, tables, lengths, contexts = case(6, [50, 20], 4, 2, 32, 16, torch.float32)
    out = attention(queries, key_cache, value_cache, tables, lengths, scale=50.0, splits=3)
    assert (out.double() - expected(queries, contexts, 50.0)).abs().max() < 1e-3


def test_bad_shapes():
    queries, key_cache, value_cache, tables, lengths, _ = case(7, [5], 4, 2, 32, 16, torch.float32)
    with pytest.raises(ValueError, match=r"attention: queries .* do not fit"):
        attention(queries[:, :3], key_cache, value_cache, tables, lengths, scale=1.0)
    with pytest.raises(ValueError, match="splits: expected 1 to 64, got 0"):
        attention(queries, key_cache, value_cache, tables, lengths, scale=1.0, splits=0)
