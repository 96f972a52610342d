"""pcm_fast/backends/cuda_kv.py and the kernels behind it, with threads of the CPU in place of a GPU's.

tests/cuda/kv_ops_driver.cpp tries the kernels on many more shapes; this is about the way to them from Python.
"""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pcm_fast
from pcm_fast._native import ordered_moves
from pcm_fast.backends import cuda_kv

ROOT = Path(__file__).parents[2]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GOING, STOPPED, NO_ROOM, FAILED = range(4)


@pytest.fixture(scope="module")
def emulated():
    """csrc/cuda as a module, made with tests/cuda/emulation.h."""
    module = "build/emulated/_cuda.so"
    subprocess.run(["make", "--silent", module], cwd=ROOT, check=True)
    spec = importlib.util.spec_from_file_location("pcm_fast._cuda", ROOT / module)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(autouse=True)
def on_the_cpu(emulated, monkeypatch):
    monkeypatch.setitem(sys.modules, "pcm_fast._cuda", emulated)
    monkeypatch.setattr(pcm_fast, "_cuda", emulated, raising=False)


def caches(blocks, heads, block_size, size, dtype, layout):
    """Keys and values [blocks, heads, block_size, size] of one layer among others."""
    memory = torch.full((blocks, 3, 2, heads, block_size * size), 7.0, dtype=dtype)
    keys, values = memory[:, 1, 0], memory[:, 1, 1].view(blocks, heads, block_size, size)
    if layout == "keys by slot":
        return keys.view(blocks, heads, size, block_size).transpose(2, 3), values
    return keys.view(blocks, heads, block_size, size), values


@pytest.mark.parametrize("layout", ["by token", "keys by slot"])
@pytest.mark.parametrize("to", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_store_writes_its_slots_and_no_others(dtype, to, layout):
    key_cache, value_cache = caches(5, 3, 4, 24, to, layout)
    fused = torch.randn(4, 3 * 2 * 24 + 8).to(dtype)  # as one product gives queries, keys and values
    keys, values = fused[:, :72].view(4, 3, 24), fused[:, 72:144].view(4, 3, 24)
    wanted = [key_cache.clone(), value_cache.clone()]
    for cache, new in zip(wanted, (keys, values), strict=True):
        cache[1, :, 3], cache[4, :, 2], cache[0, :, 0] = (new[t].to(to) for t in (0, 2, 3))
    cuda_kv.store_kv(keys, values, torch.tensor([7, -1, 18, 0]), key_cache, value_cache)
    assert torch.equal(key_cache, wanted[0])
    assert torch.equal(value_cache, wanted[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_copies_take_all_layers_of_a_block(dtype):
    cache = torch.randn(6, 3, 2, 2, 4, 8).to(dtype)
    wanted = cache.clone()
    wanted[[1, 5]] = cache[[0, 3]]
    cuda_kv.copy_blocks(cache, torch.tensor([[0, 1], [-1, 2], [3, 5]]))
    assert torch.equal(cache, wanted)


def test_moves_in_a_circle_and_tables_that_follow():
    cache = torch.randn(7, 3, 2, 2, 4, 8)
    before = cache.clone()
    tables = torch.tensor([[0, 1, 2, 99], [5, -1, 3, 99]], dtype=torch.int32)
    moves = ordered_moves([(0, 1), (1, 2), (2, 0), (5, 4)], spare=6)
    cuda_kv.gather_blocks(cache, torch.tensor(moves), tables[:, :3])
    assert torch.equal(cache[:5], before[[2, 0, 1, 3, 5]])
    assert tables.tolist() == [[1, 2, 0, 99], [4, -1, 3, 99]]


def step(**changes):
    """Two sequences of two rows each, a third without rows, and a row that fills up a bucket."""
    whole = {
        "drawn": [11, 12, 13], "draw_positions": [5, 6, 7], "stop_tokens": [[2, -1], [2, 3], [2, -1]],
        "input_ids": [1, 1, 1, 1, 0], "positions": [3, 7, 4, 2, 0], "slots": [0, 0, 0, 0, 0],
    }  # fmt: skip
    small = {
        "state": [GOING, GOING, STOPPED], "sequence_of": [0, 1, 1, 0, -1], "capacities": [12, 12, 12, 12, 0],
        "lengths": [4, 8, 5, 3, 1], "tables": [[4, 9, 1]] * 4 + [[-1] * 3], "going": [0],
    }  # fmt: skip
    made = {name: torch.tensor(changes.get(name, values)) for name, values in whole.items()}
    return made | {n: torch.tensor(changes.get(n, values), dtype=torch.int32) for n, values in small.items()}


@pytest.mark.parametrize(
    ("changes", "state", "draw_positions", "positions", "slots"),
    [
        ({}, [GOING, GOING, STOPPED], [6, 7, 7], [4, 8, 5, 3, 0], [36, 4, 37, 19, -1]),
        ({"drawn": [11, 3, 13]}, [GOING, STOPPED, STOPPED], [6, 6, 7], [4, 7, 4, 3, 0], [36, -1, -1, 19, -1]),
        ({"drawn": [-1, 12, -1]}, [FAILED, GOING, STOPPED], [5, 7, 7], [3, 8, 5, 2, 0], [-1, 4, 37, -1, -1]),
        (
            {"capacities": [12, 8, 12, 12, 0]},
            *([GOING, NO_ROOM, STOPPED], [6, 6, 7], [4, 7, 4, 3, 0], [36, -1, -1, 19, -1]),
        ),
        ({"state": [NO_ROOM, FAILED, 0]}, [GOING, FAILED, GOING], [6, 6, 8], [4, 7, 4, 3, 0], [36, -1, -1, 19, -1]),
    ],
)
def test_a_step_advances_those_that_go_on(changes, state, draw_positions, positions, slots):
    now = step(**changes)
    before = {name: tensor.clone() for name, tensor in now.items()}
    cuda_kv.advance(**now, block_size=4)
    assert now["state"].tolist() == state
    assert now["draw_positions"].tolist() == draw_positions
    assert now["positions"].tolist() == positions
    assert now["slots"].tolist() == slots
    assert now["lengths"].tolist() == [position + 1 for position in positions]
    assert now["going"].tolist() == [state.count(GOING)]
    moved = now["slots"] >= 0
    drawn = before["drawn"][before["sequence_of"].long()]
    assert torch.equal(now["input_ids"], torch.where(moved, drawn, before["input_ids"]))
    for name in ("drawn", "stop_tokens", "sequence_of", "capacities", "tables"):
        assert torch.equal(now[name], before[name])


def store_arguments(**changes):
    cache = torch.zeros(2, 5, 2, 4, 8).unbind()
    whole = {"keys": torch.zeros(3, 2, 8), "values": torch.zeros(3, 2, 8), "slots": torch.arange(3)}
    return {**whole, "key_cache": cache[0], "value_cache": cache[1], **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": torch.zeros(3, 2, 8, device="meta")}, "keys: expected a tensor on a cpu device, got one on meta"),
        ({"keys": torch.zeros(3, 16)}, r"keys: expected float32 or bfloat16 or float16 \[any, any, any\] on cpu"),
        ({"values": torch.zeros(3, 2, 9)}, r"values: expected float32 \[3, 2, 8\] on cpu, got float32 \[3, 2, 9\]"),
        ({"values": torch.zeros(3, 2, 8).half()}, r"values: expected float32 \[3, 2, 8\] on cpu, got float16"),
        ({"keys": torch.zeros(3, 2, 16)[..., ::2]}, r"keys: expected items side by side, got strides \[32, 16, 2\]"),
        ({"slots": torch.zeros(3).int()}, r"slots: expected contiguous int64 \[3\] on cpu, got int32"),
        ({"key_cache": torch.zeros(5, 3, 4, 8)}, r"key_cache: expected .* \[any, 2, any, 8\] on cpu"),
        ({"value_cache": torch.zeros(5, 2, 4, 8).half()}, r"value_cache: expected float32 \[5, 2, 4, 8\] on cpu"),
    ],
)
def test_bad_arguments_of_store_kv(changes, message):
    with pytest.raises(ValueError, match=message):
        cuda_kv.store_kv(**store_arguments(**changes))


def test_bad_arguments_of_moves():
    cache, tables = torch.zeros(4, 6), torch.zeros(2, 3, dtype=torch.int32)
    for moves in (torch.zeros(3, 3, dtype=torch.int64), torch.zeros(3, 2)):
        with pytest.raises(ValueError, match=r"moves: expected contiguous int64 \[any, 2\] on cpu"):
            cuda_kv.copy_blocks(cache, moves)
        with pytest.raises(ValueError, match=r"moves: expected contiguous int64 \[any, 2\] on cpu"):
            cuda_kv.gather_blocks(cache, moves, tables)
    moves = torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="cache: expected contiguous float32, bfloat16 or float16"):
        cuda_kv.copy_blocks(cache.T, moves)
    with pytest.raises(ValueError, match="tables: expected the blocks of a row side by side"):
        cuda_kv.gather_blocks(cache, moves, tables.T)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("drawn", torch.zeros(2), r"drawn: expected contiguous int64 \[any\]"),
        ("stop_tokens", torch.zeros(2, 2, dtype=torch.int64), r"stop_tokens: expected contiguous int64 \[3, any\]"),
        ("state", torch.zeros(3, dtype=torch.int64), r"state: expected contiguous int32 \[3\] on cpu, got int64"),
        ("positions", torch.zeros(4, dtype=torch.int64), r"positions: expected contiguous int64 \[5\] on cpu"),
        ("tables", torch.zeros(4, 3, dtype=torch.int32), r"tables: expected int32 \[5, any\]"),
        ("going", torch.zeros(2, dtype=torch.int32), r"going: expected contiguous int32 \[1\]"),
        ("block_size", 0, "block_size: expected a positive number, got 0"),
    ],
)
def test_bad_arguments_of_advance(name, value, message):
    with pytest.raises(ValueError, match=message):
        cuda_kv.advance(**{**step(), "block_size": 4, name: value})


NO_DRIVER = """
import torch
from pcm_fast import _cuda
from pcm_fast.backends import cuda_kv
assert cuda_kv.available() and _cuda.device_type == "cuda" and _cuda.architectures() == [80, 90, 100, 120]
try:
    _cuda.store_kv((0, 0, 8, 8), (0, 0, 8, 8), 0, (1, 1, 8, 4), (0, 0, 32, 32, 8, 1), (0, 0, 32, 32, 8, 1), 0)
except RuntimeError as error:
    print(error)
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="built without CUDA")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which would be given bad addresses")
def test_the_extension_is_built_and_needs_no_driver_until_it_launches():
    done = subprocess.run([sys.executable, "-c", NO_DRIVER], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("store_kv: "), done.stdout


def test_a_build_without_cuda_says_so(monkeypatch):
    monkeypatch.delattr(pcm_fast, "_cuda")
    monkeypatch.setitem(sys.modules, "pcm_fast._cuda", None)
    assert not cuda_kv.available()
    with pytest.raises(RuntimeError, match="built without CUDA: build it with PCM_FAST_CUDA=1"):
        cuda_kv.store_kv(**store_arguments())
