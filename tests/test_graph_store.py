"""Captured graphs by (batch bucket, draft length): csrc/graph_store.h, with Python's functions."""

import gc
import weakref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pcm_fast._native import GraphStore

BUCKETS = [1, 2, 4, 8]


class Graph:
    """What capture makes here; it knows what it was captured for."""

    def __init__(self, key):
        self.key = key


class Capturer:
    """Captures graphs of foretold sizes, and notes what is captured, launched and alive."""

    def __init__(self, budget, size_of=lambda key: 10):
        self.size_of = size_of
        self.captured, self.launched = [], []
        self.alive = weakref.WeakSet()
        self.store = GraphStore(self.capture, self.launch, BUCKETS, budget)

    def capture(self, bucket, draft):
        size = self.size_of((bucket, draft))
        if size is None:
            raise RuntimeError("the device is out of memory")
        graph = Graph((bucket, draft))
        self.alive.add(graph)
        self.captured.append(graph.key)
        return graph, size

    def launch(self, graph):
        self.launched.append(graph.key)


def test_a_graph_is_captured_once_and_then_replayed():
    some = Capturer(budget=100)
    assert [some.store.run(batch, 0) for batch in (3, 4, 1, 3)] == [False, True, False, True]
    assert some.store.run(3, draft=2) is False
    assert some.captured == [(4, 0), (1, 0), (4, 2)]
    assert some.launched == [(4, 0), (4, 0), (1, 0), (4, 0), (4, 2)]
    assert some.store.stats() == {"graphs": 3, "bytes": 30, "captures": 3, "replays": 2, "evictions": 0}


def test_the_bucket_is_the_smallest_that_holds_the_batch():
    store = Capturer(budget=100).store
    assert [store.bucket(batch) for batch in range(1, 9)] == [1, 2, 4, 4, 8, 8, 8, 8]


def test_the_graph_not_run_for_the_longest_time_goes_first():
    some = Capturer(budget=30)
    for batch in (1, 2, 4, 1, 8):
        some.store.run(batch, 0)
    assert {graph.key for graph in some.alive} == {(1, 0), (4, 0), (8, 0)}
    assert some.store.stats() == {"graphs": 3, "bytes": 30, "captures": 4, "replays": 1, "evictions": 1}


@pytest.mark.parametrize(
    ("size", "error", "message"),
    [
        (None, RuntimeError, "out of memory"),
        (31, ValueError, "batch 8 and draft length 0 takes 31 bytes, the budget is 30"),
        (-1, ValueError, "bytes of a captured graph: expected 0 or more, got -1"),
        ("many", TypeError, r"capture: expected to be given \(graph, bytes\), got tuple"),
    ],
)
def test_a_failed_capture_leaves_nothing_behind(size, error, message):
    some = Capturer(budget=30, size_of=lambda key: size if key == (8, 0) else 10)
    for batch in (1, 2, 4):
        some.store.run(batch, 0)
    before = some.store.stats()
    with pytest.raises(error, match=message):
        some.store.run(8, 0)
    assert some.store.stats() == before
    assert {graph.key for graph in some.alive} == {(1, 0), (2, 0), (4, 0)}
    assert [some.store.run(batch, 0) for batch in (1, 2, 4)] == [True] * 3


def test_a_failed_launch_keeps_the_graph():
    failing = [True]

    def launch(graph):
        if failing[0]:
            raise RuntimeError("launch failed")

    store = GraphStore(lambda bucket, draft: (object(), 1), launch, [1], 10)
    with pytest.raises(RuntimeError, match="launch failed"):
        store.run(1)
    failing[0] = False
    assert store.run(1) is True
    assert store.stats() == {"graphs": 1, "bytes": 1, "captures": 1, "replays": 1, "evictions": 0}


def test_clear_drops_every_graph():
    some = Capturer(budget=100)
    some.store.run(1, 0)
    some.store.clear()
    assert not some.alive
    assert some.store.stats() == {"graphs": 0, "bytes": 0, "captures": 1, "replays": 0, "evictions": 0}
    assert some.store.run(1, 0) is False


@pytest.mark.parametrize("inside", ["capture", "launch"])
@pytest.mark.parametrize("call", ["run", "clear"])
def test_no_call_from_within_a_call(inside, call):
    def again():
        store.run(1) if call == "run" else store.clear()

    def capture(bucket, draft):
        if inside == "capture":
            again()
        return object(), 1

    store = GraphStore(capture, lambda graph: again() if inside == "launch" else None, [1], 10)
    with pytest.raises(RuntimeError, match=f"{call} called from within capture or launch"):
        store.run(1)


def test_a_store_in_a_cycle_is_collected():
    some = Capturer(budget=100)
    some.store.run(1, 0)
    graph, owner = weakref.ref(next(iter(some.alive))), weakref.ref(some)
    del some
    gc.collect()
    assert owner() is None
    assert graph() is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"buckets": []}, ValueError, "buckets: expected at least one batch size"),
        ({"buckets": [1, 4, 4]}, ValueError, "buckets: expected a batch size above 4, got 4"),
        ({"buckets": [0, 4]}, ValueError, "buckets: expected a batch size above 0, got 0"),
        ({"budget_bytes": -1}, ValueError, "budget_bytes: expected a number of bytes, got -1"),
        ({"capture": None}, TypeError, "capture: expected a callable, got NoneType"),
        ({"launch": 3}, TypeError, "launch: expected a callable, got int"),
    ],
)
def test_bad_arguments(arguments, error, message):
    usual = {"capture": lambda bucket, draft: (None, 0), "launch": print, "buckets": BUCKETS, "budget_bytes": 10}
    with pytest.raises(error, match=message):
        GraphStore(**{**usual, **arguments})


@pytest.mark.parametrize("batch", [-1, 0, 9])
def test_bad_batch(batch):
    store = Capturer(budget=100).store
    with pytest.raises(ValueError, match=f"batch: expected 1 to 8, the largest bucket, got {batch}"):
        store.bucket(batch)
    with pytest.raises(ValueError, match=f"batch: expected 1 to 8, the largest bucket, got {batch}"):
        store.run(batch, 0)
    with pytest.raises(ValueError, match="draft: expected a number of tokens, got -1"):
        store.run(1, -1)


RUNS = st.lists(st.tuples(st.integers(1, 8), st.integers(0, 2)) | st.none(), max_size=60)
SIZES = st.fixed_dictionaries({(b, d): st.none() | st.integers(0, 40) for b in BUCKETS for d in range(3)})


@settings(max_examples=300, deadline=None)
@given(RUNS, SIZES, st.integers(0, 60))
def test_equals_a_list_in_order_of_use(runs, sizes, budget):
    """None among the runs clears the store; a size of None makes the capture fail."""
    some = Capturer(budget, sizes.__getitem__)
    kept: list[tuple[int, int]] = []
    counts = {"captures": 0, "replays": 0, "evictions": 0}
    for run in runs:
        if run is None:
            some.store.clear()
            kept = []
            continue
        key = (next(bucket for bucket in BUCKETS if bucket >= run[0]), run[1])
        if key in kept:
            assert some.store.run(*run) is True
            kept.remove(key)
            counts["replays"] += 1
        elif sizes[key] is None or sizes[key] > budget:
            with pytest.raises((RuntimeError, ValueError)):
                some.store.run(*run)
            continue
        else:
            assert some.store.run(*run) is False
            counts["captures"] += 1
            while sum(sizes[k] for k in kept) + sizes[key] > budget:
                kept.pop(0)
                counts["evictions"] += 1
        kept.append(key)
        assert some.launched[-1] == key
        assert {graph.key for graph in some.alive} == set(kept)
        expected = {"graphs": len(kept), "bytes": sum(sizes[k] for k in kept), **counts}
        assert some.store.stats() == expected
