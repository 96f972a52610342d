"""The memory of the KV cache on the CPU."""

import sys
from pathlib import Path

import numpy as np
import pytest

from pcm_fast.kv_cache import KvStorage


def storage(dtype, **options):
    sizes = {"num_layers": 3, "num_blocks": 5, "num_kv_heads": 2, "block_size": 4, "head_dim": 8} | options
    return KvStorage(dtype=dtype, **sizes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_written_is_read_and_lies_where_the_header_says(dtype):
    random = np.random.default_rng(1)
    store = storage(dtype)
    assert store.array.shape == (5, 3, 2, 2, 4, 8)
    assert store.array.flags.c_contiguous
    assert store.array.ctypes.data % 64 == 0
    assert store.num_bytes == store.array.nbytes
    assert not store.array.any()
    table = [4, 0, 3]
    keys, values = random.integers(-128, 128, (2, 7, 2, 8)).astype(np.float32)  # exact in both dtypes
    store.write(1, table, 3, keys, values)
    for read, written in zip(store.read(1, table, 3, 7), (keys, values), strict=True):
        np.testing.assert_array_equal(read, written)
    raw = store.array if dtype == "float32" else (store.array.astype(np.uint32) << 16).view(np.float32)
    for i in range(7):
        block, slot = table[(3 + i) // 4], (3 + i) % 4
        tiles = raw[block, 1, 0].reshape(2, 8, 4)  # keys lie [head_dim][block_size]
        np.testing.assert_array_equal(tiles[:, :, slot], keys[i])
        np.testing.assert_array_equal(raw[block, 1, 1, :, slot], values[i])
    assert np.count_nonzero(raw) == np.count_nonzero(keys) + np.count_nonzero(values)
    before = store.array.copy()
    store.copy_block(0, 1)
    np.testing.assert_array_equal(store.array[1], before[0])
    np.testing.assert_array_equal(store.array[[0, 2, 3, 4]], before[[0, 2, 3, 4]])


def test_bfloat16_rounds_to_nearest_even():
    torch = pytest.importorskip("torch")
    random = np.random.default_rng(2)
    bits = random.integers(0, 2**32, 4096, dtype=np.uint32)
    ties = (random.integers(0, 2**16, 1024, dtype=np.uint32) << 16) | 0x8000
    edges = np.array([0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7F800001, 0x7FFFFFFF, 0, 1 << 31, 1], np.uint32)
    numbers = np.concatenate([bits, ties, edges, np.zeros(-len(edges) % 8, np.uint32)]).view(np.float32)
    store = storage("bfloat16", num_blocks=numbers.size // 8, num_kv_heads=1, block_size=1)
    table = np.arange(numbers.size // 8)
    store.write(0, table, 0, numbers.reshape(-1, 1, 8), numbers.reshape(-1, 1, 8))
    expected = torch.from_numpy(numbers).to(torch.bfloat16).float().numpy()
    for read in store.read(0, table, 0, len(table)):
        np.testing.assert_array_equal(read.ravel(), expected)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_follows_the_blocks_used():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    store = KvStorage(num_layers=4, num_blocks=20000, num_kv_heads=3, head_dim=64)
    assert store.num_bytes > 1900e6
    for block in range(20):
        store.copy_block(block + 20, block)
    assert resident() - before < 100e6


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda s, x: s.write(3, [0], 0, x, x), "layer: expected 0 to 2, got 3"),
        (lambda s, x: s.write(0, [5], 0, x, x), "block_table: expected 0 to 4, got 5"),
        (lambda s, x: s.write(0, [0, -1], 3, x, x), "block_table: expected 0 to 4, got -1"),
        (
            lambda s, x: s.write(0, [0], 3, x, x),
            "start, count: expected a span in the 4 slots of block_table, got 3, 2",
        ),
        (lambda s, x: s.write(0, [0], 0, x, x[:1]), "values: expected as many tokens as keys"),
        (
            lambda s, x: s.write(0, [0], 0, x[:, :1], x),
            r"keys: expected \[count, 2, 8\] float32, got float32 \(2, 1, 8\)",
        ),
        (lambda s, x: s.read(0, [0], -1, 1), "start, count"),
        (lambda s, x: s.copy_block(0, 5), "dst: expected 0 to 4, got 5"),
        (lambda s, x: s.copy_block(1, 1), "dst: expected another block than src, got 1"),
        (lambda s, x: storage("float16"), "dtype: expected 'float32' or 'bfloat16', got 'float16'"),
        (lambda s, x: storage("float32", head_dim=0), "head_dim: expected a positive number, got 0"),
    ],
)
def test_storage_refuses_nonsense(call, message):
    with pytest.raises(ValueError, match=message):
        call(storage("float32"), np.zeros((2, 2, 8), np.float32))
