"""The KV cache manager, promise by promise; test_kv_cache_random.py drives it at random beside a model."""

import gc

import numpy as np
import pytest

from pcm_fast.kv_cache import KvCacheManager, OutOfBlocks, namespace_id


def manager(**sizes):
    return KvCacheManager(**({"num_blocks": 32, "block_size": 4, "max_rows": 8, "max_blocks_per_row": 16} | sizes))


def fill(kv, row, tokens):
    copies = kv.append_slots(row, len(tokens))
    kv.commit(row, tokens)
    return copies


def start(kv, tokens, namespace=0):
    """A row with all of the tokens computed, and how many of them came from the cache."""
    row = kv.create_row(namespace, tokens)
    reused = kv.length(row)
    fill(kv, row, tokens[reused:])
    return row, reused


# --- Prefix reuse


def test_a_prompt_seen_before_is_reused_up_to_its_last_token():
    kv = manager()
    tokens = list(range(12))
    row, reused = start(kv, tokens)
    assert reused == 0
    table = kv.block_table(row).tolist()
    for count, expected in [(12, 8), (11, 8), (9, 8), (8, 4), (5, 4), (4, 0), (1, 0), (0, 0)]:
        assert kv.match_prefix(0, tokens[:count]) == (expected, 0)
        other = kv.create_row(0, tokens[:count])
        assert kv.length(other) == kv.committed(other) == expected
        assert kv.block_table(other).tolist() == table[: expected // 4]
        kv.free(other)
    assert kv.match_prefix(0, [*tokens, 99]) == (12, 0)
    assert kv.match_prefix(0, [99, *tokens]) == (0, 0)
    assert kv.match_prefix(0, [*tokens[:7], 99, *tokens[8:]]) == (4, 0)


def test_a_freed_prefix_stays_cached_and_survives_preemption():
    kv = manager()
    tokens = list(range(10))
    row, _ = start(kv, tokens)
    fill(kv, row, [77, 78, 79])  # generated tokens are reused as well
    kv.free(row)
    assert kv.num_free() == 32
    assert kv.match_prefix(0, [*tokens, 77, 78, 79]) == (12, 3)
    row, reused = start(kv, [*tokens, 77, 78, 79])
    assert reused == 12
    assert kv.num_free() == 28
    assert kv.stats()["reused_tokens"] == 12
    assert kv.stats()["prompt_tokens"] == 23
    assert (kv.stats()["hits"], kv.stats()["misses"]) == (1, 1)


@pytest.mark.parametrize("hash_mask", [2**64 - 1, 0])
def test_namespaces_and_collisions_never_give_a_false_hit(hash_mask):
    kv = manager(hash_mask=hash_mask)
    start(kv, [1, 2, 3, 4, 5, 6, 7, 8, 9], namespace=5)
    assert kv.match_prefix(5, [1, 2, 3, 4, 5, 6, 7, 8, 9]) == (8, 0)
    assert kv.match_prefix(6, [1, 2, 3, 4, 5, 6, 7, 8, 9]) == (0, 0)
    assert kv.match_prefix(5, [5, 6, 7, 8, 9]) == (0, 0)  # a second block is not a first one
    assert kv.match_prefix(5, [1, 2, 3, 4, 1, 2, 3, 4, 9]) == (4, 0)
    assert kv.match_prefix(5, [4, 3, 2, 1, 5, 6, 7, 8, 9]) == (0, 0)
    start(kv, [0, 2, 3, 4, 5, 6, 7, 8, 9], namespace=5)
    assert kv.match_prefix(5, [0, 2, 3, 4, 5, 6, 7, 8, 9]) == (8, 0)
    kv.check()


def test_only_committed_tokens_are_reused():
    kv = manager()
    row = kv.create_row(0, [1, 2, 3, 4, 5])
    kv.append_slots(row, 5)
    assert kv.match_prefix(0, [1, 2, 3, 4, 5]) == (0, 0)
    kv.commit(row, [1, 2, 3])
    assert kv.match_prefix(0, [1, 2, 3, 4, 5]) == (0, 0)
    kv.commit(row, [4])
    assert kv.match_prefix(0, [1, 2, 3, 4, 5]) == (4, 0)


def test_rows_that_compute_the_same_prefix_at_once_keep_their_own_blocks():
    kv = manager()
    tokens = list(range(9))
    first, second = kv.create_row(0, tokens), kv.create_row(0, tokens)
    kv.append_slots([first, second], [9, 9])
    tables = kv.block_table(first).tolist(), kv.block_table(second).tolist()
    assert not set(tables[0]) & set(tables[1])
    kv.commit(second, tokens)
    kv.commit(first, tokens)
    assert (kv.block_table(first).tolist(), kv.block_table(second).tolist()) == tables
    third = kv.create_row(0, tokens)
    assert kv.block_table(third).tolist() == tables[1][:2]
    kv.free(third)
    kv.free(first)
    assert kv.stats()["cached"] == 0
    kv.free(second)
    assert kv.stats()["cached"] == 2
    kv.check()


def test_a_prefix_whose_registered_blocks_are_gone_is_registered_again():
    kv = manager(num_blocks=8)
    tokens = list(range(8))
    first, second = kv.create_row(0, tokens), kv.create_row(0, tokens)
    kv.append_slots([first, second], [8, 8])
    kv.commit(first, tokens)
    kv.commit(second, tokens)
    kv.free(first)
    other, _ = start(kv, list(range(100, 124)), namespace=1)  # evicts what first had registered
    assert kv.match_prefix(0, [*tokens, 8, 9]) == (0, 0)
    kv.truncate(other, 4)
    fill(kv, second, [8, 9, 10, 11])
    assert kv.match_prefix(0, [*range(12), 12]) == (12, 0)
    kv.check()


# --- Eviction


def test_the_least_recently_released_prefix_goes_first_and_its_end_before_its_start():
    kv = manager(num_blocks=8)
    prompts = [[n * 100 + i for i in range(8)] for n in range(4)]
    rows = [start(kv, prompt)[0] for prompt in prompts]
    for i in (2, 0, 3, 1):
        kv.free(rows[i])
    assert kv.stats()["cached"] == 8
    new = kv.create_row(9, [])
    seen = []
    for _ in range(8):
        fill(kv, new, [7, 7, 7, 7])
        seen.append([kv.match_prefix(0, [*prompt, 0])[0] for prompt in prompts])
    assert seen == [
        [8, 8, 4, 8],
        [8, 8, 0, 8],
        [4, 8, 0, 8],
        [0, 8, 0, 8],
        [0, 8, 0, 4],
        [0, 8, 0, 0],
        [0, 4, 0, 0],
        [0, 0, 0, 0],
    ]
    assert kv.stats()["evictions"] == 8
    with pytest.raises(OutOfBlocks):
        kv.append_slots(new, 1)


def test_reuse_makes_a_prefix_recent():
    kv = manager(num_blocks=4)
    old, new = [1] * 5, [2] * 5
    for prompt in (old, new, old):
        kv.free(start(kv, prompt)[0])
    filler = kv.create_row(9, [])
    fill(kv, filler, [0] * 12)
    assert kv.match_prefix(0, old) == (4, 1)
    assert kv.match_prefix(0, new) == (0, 0)


def test_nothing_is_evicted_while_free_blocks_are_left():
    kv = manager(num_blocks=6)
    kv.free(start(kv, list(range(12)))[0])
    row = kv.create_row(1, [])
    fill(kv, row, [0] * 12)
    assert kv.stats() | {"cached": 3, "free": 0, "evictions": 0} == kv.stats()
    fill(kv, row, [0])
    assert kv.stats() | {"cached": 2, "free": 0, "evictions": 1} == kv.stats()


# --- Sharing


def test_forks_share_everything_and_copy_only_the_partial_block():
    kv = manager()
    parent, _ = start(kv, list(range(10)))
    rows = [parent, *(kv.fork(parent) for _ in range(3))]
    assert kv.stats()["used"] == 3
    shared = kv.block_table(parent).tolist()
    assert [kv.refcount(block) for block in shared] == [4, 4, 4]
    assert [kv.blocks_needed(row, 1) for row in rows] == [1, 1, 1, 1]
    assert [kv.blocks_needed(row, 0) for row in rows] == [0, 0, 0, 0]
    copies = kv.append_slots(rows, [1, 1, 1, 1])
    assert [src for src, _ in copies] == [shared[2]] * 3  # the last row keeps the block itself
    assert kv.stats()["used"] == 6
    assert kv.stats()["copies"] == 3
    assert [kv.block_table(row)[2] for row in rows] == [*(dst for _, dst in copies), shared[2]]
    for i, row in enumerate(rows):
        assert kv.block_table(row)[:2].tolist() == shared[:2]
        kv.commit(row, [i])
    kv.check()


def test_at_the_end_of_a_block_nothing_is_copied():
    kv = manager()
    parent, _ = start(kv, list(range(8)))
    child = kv.fork(parent)
    assert kv.append_slots([parent, child], [1, 1]) == []
    assert kv.block_table(parent)[2] != kv.block_table(child)[2]


def test_a_row_without_blocks_left_changes_nothing():
    kv = manager(num_blocks=4)
    parent, _ = start(kv, list(range(10)))
    child = kv.fork(parent)
    other = kv.create_row(1, [])
    before = kv.block_tables.tolist(), kv.lengths.tolist(), kv.stats()
    with pytest.raises(OutOfBlocks, match="1 blocks not in use"):
        kv.append_slots([other, parent, child], [1, 1, 1])  # one for each of the first two
    with pytest.raises(OutOfBlocks):
        kv.append_slots(other, 5)
    after = kv.block_tables.tolist(), kv.lengths.tolist(), kv.stats()
    assert after == (before[0], before[1], before[2] | {"refusals": 2})
    kv.append_slots([parent, child], [1, 1])
    kv.check()


# --- Rollback


def test_rollback_never_writes_into_what_others_read():
    kv = manager()
    tokens = list(range(9))
    row, _ = start(kv, tokens)
    reader, reused = start(kv, tokens)
    assert reused == 8
    kv.truncate(row, 6)
    table = kv.block_table(reader).tolist()
    assert kv.append_slots(row, 1) == [(table[1], int(kv.block_table(row)[1]))]
    kv.commit(row, [66])
    assert kv.block_table(reader).tolist() == table
    assert kv.match_prefix(0, tokens) == (8, 0)
    kv.check()


def test_a_cached_block_about_to_be_overwritten_is_forgotten_first():
    kv = manager()
    row, _ = start(kv, list(range(13)))
    block = kv.block_table(row)[1]
    kv.truncate(row, 6)
    assert kv.stats() | {"used": 2, "cached": 1} == kv.stats()
    assert kv.match_prefix(0, list(range(13))) == (12, 1)
    assert kv.append_slots(row, 2) == []
    assert kv.block_table(row)[1] == block
    assert kv.match_prefix(0, list(range(13))) == (4, 0)
    assert kv.stats() | {"used": 2, "cached": 0} == kv.stats()
    kv.commit(row, [60, 70])
    assert kv.match_prefix(0, [*range(6), 60, 70, 8]) == (8, 0)
    kv.check()


def test_refused_drafts_leave_no_trace():
    kv = manager(block_size=2)
    row, _ = start(kv, [1, 2, 3])
    kv.append_slots(row, 6)
    kv.commit(row, [4, 5])
    kv.truncate(row, 5)
    assert (kv.length(row), kv.committed(row), kv.stats()["used"]) == (5, 5, 3)
    fill(kv, row, [6])
    assert kv.match_prefix(0, [1, 2, 3, 4, 5, 6, 7]) == (6, 0)
    kv.free(row)
    assert kv.stats() | {"used": 0, "cached": 3, "free": 29} == kv.stats()


# --- At the border


def test_defragment_brings_content_to_the_front_and_loses_nothing():
    kv = manager()
    short = [start(kv, [1, 2, 3], namespace)[0] for namespace in (1, 2)]  # blocks 0 and 1
    early, _ = start(kv, list(range(200, 209)))  # 2, 3, 4
    row, _ = start(kv, list(range(100, 110)))  # 5, 6, 7
    late, _ = start(kv, list(range(300, 309)))  # 8, 9, 10
    for other in (*short, early, late):
        kv.free(other)  # whole blocks stay cached: 2, 3, 8, 9
    assert sorted(kv.defragment()) == [(7, 0), (8, 1), (9, 4)]
    kv.check()
    assert kv.block_table(row).tolist() == [5, 6, 0]
    assert kv.match_prefix(0, list(range(200, 209))) == (8, 2)
    assert kv.match_prefix(0, list(range(300, 309))) == (8, 2)
    again, reused = start(kv, list(range(300, 309)))
    assert reused == 8
    assert kv.block_table(again).tolist()[:2] == [1, 4]
    assert fill(kv, row, [110, 111]) == []
    assert kv.defragment() == []


def test_views_stay_where_they_are_and_keep_the_manager_alive():
    kv = manager()
    row, _ = start(kv, list(range(9)))
    tables, lengths, table = kv.block_tables, kv.lengths, kv.block_table(row)
    assert tables.shape == (8, 16)
    assert tables.dtype == lengths.dtype == np.int32
    assert table.ctypes.data == tables[row].ctypes.data
    assert table.tolist() == tables[row, :3].tolist()
    fill(kv, row, list(range(20)))
    assert lengths[row] == 29
    assert kv.block_tables.ctypes.data == tables.ctypes.data
    with pytest.raises(ValueError, match="read-only"):
        tables[0, 0] = 1
    del kv
    gc.collect()
    assert lengths[row] == 29


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda kv: kv.append_slots(0, -1), "count: expected 0 to 55, the room left in max_blocks_per_row, got -1"),
        (lambda kv: kv.append_slots(0, 56), "count: expected 0 to 55, .* got 56"),
        (lambda kv: kv.append_slots(1, 1), "row: expected the id of a live row, got 1"),
        (lambda kv: kv.append_slots([0, 0], [1, 1]), "rows: expected each row once; twice, got 0"),
        (lambda kv: kv.append_slots([0], [1, 1]), "counts: expected as many as rows, got 2"),
        (lambda kv: kv.commit(0, [1]), "count: expected 0 to 0 slots reserved and not committed, got 1"),
        (lambda kv: kv.truncate(0, 10), "length: expected 0 to 9, the row's length, got 10"),
        (lambda kv: kv.free(8), "row: expected the id of a live row, got 8"),
        (lambda kv: kv.refcount(32), "block: expected 0 to num_blocks - 1, got 32"),
        (lambda kv: kv.create_row(0, range(65)), "prompt tokens: expected 0 to 64, got 65"),
        (lambda kv: kv.create_row(0, [1.5]), "prompt: expected one-dimensional integers, got float64"),
        (lambda kv: kv.create_row(0, [[1]]), "prompt: expected one-dimensional integers, got int64"),
        (lambda kv: kv.create_row(0, [2**31]), "prompt: expected int32 values, got 2147483648"),
    ],
)
def test_nonsense_is_refused_and_changes_nothing(call, message):
    kv = manager()
    start(kv, list(range(9)))
    before = kv.stats(), kv.block_tables.tolist(), kv.lengths.tolist()
    with pytest.raises(ValueError, match=message):
        call(kv)
    assert (kv.stats(), kv.block_tables.tolist(), kv.lengths.tolist()) == before
    kv.check()


@pytest.mark.parametrize("name", ["num_blocks", "block_size", "max_rows", "max_blocks_per_row"])
def test_sizes_must_be_positive(name):
    with pytest.raises(ValueError, match=f"{name}: expected a positive number, got 0"):
        manager(**{name: 0})
    with pytest.raises(ValueError, match="less than 2\\^31"):
        manager(max_blocks_per_row=2**29 + 1)


def test_namespaces_depend_on_every_identity_and_on_their_borders():
    names = [("a", "b"), ("ab", ""), ("", "ab"), ("a", "c"), ("a",), ()]
    ids = {namespace_id(*name) for name in names}
    assert len(ids) == len(names)
    assert all(0 <= i < 2**64 for i in ids)
    assert namespace_id("a", "b") == namespace_id("a", "b")
