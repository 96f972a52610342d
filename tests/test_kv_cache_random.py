"""The KV cache manager beside a model that keeps each row as the list of its tokens, under random operations."""

import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pcm_fast.kv_cache import KvCacheManager, OutOfBlocks, OutOfRows

ROOT = Path(__file__).parents[1]
SOURCES = [
    "tests/cpp/kv_cache_driver.cpp",
    "csrc/kv_cache.cpp",
    "csrc/prefix_index.cpp",
    "csrc/kv_storage.cpp",
    "csrc/arena.cpp",
]


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler on PATH")
    path = tmp_path_factory.mktemp("driver") / "kv_cache_driver"
    sources = [ROOT / source for source in SOURCES]
    subprocess.run([compiler, "-std=c++17", "-O2", f"-I{ROOT / 'csrc'}", *sources, "-pthread", "-o", path], check=True)
    return path


@pytest.mark.parametrize("operations, threads", [(1_000_000, 1), (50_000, 2)])
def test_a_million_random_operations(driver, operations, threads):
    result = subprocess.run([driver, str(operations), "20240704", str(threads)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"passed: {operations} operations" in result.stdout


class Pool(RuleBasedStateMachine):
    """A slot's content is (namespace, the tokens up to it), which is what keys and values are a function of."""

    @initialize(
        block_size=st.sampled_from([1, 2, 4]),
        num_blocks=st.integers(2, 24),
        hash_mask=st.sampled_from([0, 3, 2**64 - 1]),
    )
    def build(self, block_size, num_blocks, hash_mask):
        self.kv = KvCacheManager(
            num_blocks=num_blocks, block_size=block_size, max_rows=6, max_blocks_per_row=6, hash_mask=hash_mask
        )
        self.content = {}
        self.rows = {}  # id -> (namespace, committed tokens)
        self.lengths = {}

    def blocks(self, tokens):
        return -(-tokens // self.kv.block_size)

    def pick(self, data):
        return data.draw(st.sampled_from(sorted(self.rows)), label="row")

    def holders(self, block):
        return sum(block in self.kv.block_table(row) for row in self.rows)

    def snapshot(self):
        return [self.kv.block_table(row).tolist() for row in self.rows], self.kv.lengths.tolist(), self.kv.num_free()

    @rule(namespace=st.integers(0, 1), tokens=st.lists(st.integers(0, 1), max_size=24), data=st.data())
    def create(self, namespace, tokens, data):
        tokens = tokens[: 6 * self.kv.block_size]
        if len(self.rows) == 6:
            with pytest.raises(OutOfRows):
                self.kv.create_row(namespace, tokens)
            return
        free = self.kv.num_free()
        cached, idle = self.kv.match_prefix(namespace, tokens)
        row = self.kv.create_row(namespace, tokens)
        reused = self.kv.length(row)
        assert reused == cached
        assert self.kv.num_free() == free - idle
        assert reused % self.kv.block_size == 0
        assert reused < len(tokens) or not tokens
        assert row not in self.rows
        self.rows[row] = (namespace, tokens[:reused])
        self.lengths[row] = reused
        self.append_to([row], [len(tokens) - reused], data, prompts={row: tokens[reused:]})

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def fork(self, data):
        parent = self.pick(data)
        if self.lengths[parent] != len(self.rows[parent][1]):
            with pytest.raises(ValueError, match="committed"):
                self.kv.fork(parent)
        elif len(self.rows) == 6:
            with pytest.raises(OutOfRows):
                self.kv.fork(parent)
        else:
            row = self.kv.fork(parent)
            assert row not in self.rows
            self.rows[row] = self.rows[parent]
            self.lengths[row] = self.lengths[parent]

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def append(self, data):
        rows = data.draw(st.lists(st.sampled_from(sorted(self.rows)), min_size=1, unique=True), label="rows")
        room = [6 * self.kv.block_size - self.lengths[row] for row in rows]
        counts = [data.draw(st.integers(0, min(6, most)), label="count") for most in room]
        self.append_to(rows, counts, data, prompts={})

    def append_to(self, rows, counts, data, prompts):
        holders = {block: self.holders(block) for block in range(self.kv.num_blocks)}
        needed = 0
        for row, count in zip(rows, counts, strict=True):
            needed += self.blocks(self.lengths[row] + count) - self.blocks(self.lengths[row])
            if count and self.lengths[row] % self.kv.block_size:
                tail = int(self.kv.block_table(row)[-1])
                needed += holders[tail] > 1
                holders[tail] -= holders[tail] > 1
        free, before = self.kv.num_free(), self.snapshot()
        if needed > free:
            with pytest.raises(OutOfBlocks):
                self.kv.append_slots(rows, counts)
            assert self.snapshot() == before
            return
        copies = self.kv.append_slots(rows, counts)
        assert self.kv.num_free() == free - needed
        sources, targets = {src for src, _ in copies}, [dst for _, dst in copies]
        assert len(set(targets)) == len(targets)
        assert not sources & set(targets)
        for src, dst in copies:
            for slot in range(self.kv.block_size):
                self.content[dst, slot] = self.content.get((src, slot))
        for row, count in zip(rows, counts, strict=True):
            self.lengths[row] += count
        for row in rows:
            self.compute(row, data, prompts.get(row, []))

    def compute(self, row, data, prompt):
        """Writes all reserved slots and accepts the first few of the tokens."""
        namespace, tokens = self.rows[row]
        reserved = self.lengths[row] - len(tokens)
        drafts = prompt or data.draw(st.lists(st.integers(0, 1), min_size=reserved, max_size=reserved), label="drafts")
        for i in range(reserved):
            position = len(tokens) + i
            block = int(self.kv.block_table(row)[position // self.kv.block_size])
            assert self.holders(block) == self.kv.refcount(block) == 1
            slot = position % self.kv.block_size
            self.content[block, slot] = namespace, tokens + drafts[: i + 1]
        accepted = data.draw(st.integers(0, reserved), label="accepted")
        self.kv.commit(row, drafts[:accepted])
        self.rows[row] = namespace, tokens + drafts[:accepted]

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def truncate(self, data):
        row = self.pick(data)
        length = data.draw(st.integers(0, self.lengths[row]), label="length")
        self.kv.truncate(row, length)
        self.rows[row] = self.rows[row][0], self.rows[row][1][:length]
        self.lengths[row] = length

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def free(self, data):
        row = self.pick(data)
        self.kv.free(row)
        del self.rows[row], self.lengths[row]

    @invariant()
    def each_row_sees_its_own_tokens(self):
        for row, (namespace, tokens) in self.rows.items():
            assert self.kv.length(row) == self.lengths[row] == self.kv.lengths[row]
            assert self.kv.committed(row) == len(tokens)
            table = self.kv.block_table(row)
            assert len(table) == self.blocks(self.lengths[row])
            for position in range(len(tokens)):
                seen = self.content[int(table[position // self.kv.block_size]), position % self.kv.block_size]
                assert seen == (namespace, tokens[: position + 1])

    @invariant()
    def no_block_is_lost(self):
        self.kv.check()
        held = {int(block) for row in self.rows for block in self.kv.block_table(row)}
        stats = self.kv.stats()
        assert stats["used"] == len(held)
        assert stats["used"] + stats["cached"] + stats["free"] == self.kv.num_blocks
        assert all(self.kv.refcount(block) == self.holders(block) for block in range(self.kv.num_blocks))


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
