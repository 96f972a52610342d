"""Keys, values and a step's counters on a CUDA device: csrc/cuda/kv_ops.h behind checked arguments.

Every function launches kernels on the current stream and waits for nothing, so all of them can be captured in a CUDA
graph. Contents of tensors are not looked at: that slots and blocks exist is the caller's promise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from pcm_fast import _cuda

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def available() -> bool:
    """Whether this build of the package has CUDA in it."""
    try:
        from pcm_fast import _cuda  # noqa: F401
    except ImportError:
        return False
    return True


def store_kv(
    keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor
) -> None:
    """Write the keys and values of new tokens into one layer of a paged cache, rounded to its type.

    Args:
        keys, values: [T, heads, size] float32, bfloat16 or float16, contiguous in their last dimension.
        slots: [T] int64, block * block_size + place in the block; negative ones write nothing. No two alike.
        key_cache, value_cache: [blocks, heads, block_size, size] float32, bfloat16 or float16, any strides.

    Raises:
        ValueError: tensors that do not fit together, or are not on a CUDA device.
        RuntimeError: a package built without CUDA, or a launch that CUDA refused.
    """
    device = _device("keys", keys)
    _check("keys", keys, device, (None, None, None), tuple(DTYPES))
    tokens, heads, size = keys.shape
    _check("values", values, device, (tokens, heads, size), (keys.dtype,))
    _check("slots", slots, device, (tokens,), (torch.int64,), contiguous=True)
    _check("key_cache", key_cache, device, (None, heads, None, size), tuple(DTYPES))
    blocks, _, block_size, _ = key_cache.shape
    _check("value_cache", value_cache, device, (blocks, heads, block_size, size), (key_cache.dtype,))
    for name, new in (("keys", keys), ("values", values)):
        if new.stride(2) != 1 and size > 1:
            raise ValueError(f"{name}: expected items side by side, got strides {list(new.stride())}")
    _extension().store_kv(
        (keys.data_ptr(), DTYPES[keys.dtype], *keys.stride()[:2]),
        (values.data_ptr(), DTYPES[values.dtype], *values.stride()[:2]),
        slots.data_ptr(),
        (tokens, heads, size, block_size),
        (key_cache.data_ptr(), DTYPES[key_cache.dtype], *key_cache.stride()),
        (value_cache.data_ptr(), DTYPES[value_cache.dtype], *value_cache.stride()),
        _stream(device),
    )


def copy_blocks(cache: torch.Tensor, moves: torch.Tensor) -> None:
    """Copy blocks of a cache, all at the same time: copy-on-write.

    Args:
        cache: [blocks, ...] contiguous: all that belongs to a block lies together.
        moves: [P, 2] int64, from and to; a negative source copies nothing. No target is a source or another's target.

    Raises:
        ValueError, RuntimeError: see ``store_kv``.
    """
    device = _device("cache", cache)
    _check("moves", moves, device, (None, 2), (torch.int64,), contiguous=True)
    _extension().copy_blocks(_pool(cache), moves.data_ptr(), len(moves), _stream(device))


def gather_blocks(cache: torch.Tensor, moves: torch.Tensor, tables: torch.Tensor) -> None:
    """Move blocks of a cache one after the other, in place, and rewrite the block tables: defragmentation.

    Args:
        cache: [blocks, ...] contiguous.
        moves: [P, 2] int64, from and to, in an order in which no block is overwritten before it has been moved:
            that of ``_native.ordered_moves``, or of ``KvCacheManager.defragment``. Negative sources are skipped.
        tables: [R, width] int32, rows with any stride. Entries that are not moved, or negative, stay.

    Raises:
        ValueError, RuntimeError: see ``store_kv``.
    """
    device = _device("cache", cache)
    _check("moves", moves, device, (None, 2), (torch.int64,), contiguous=True)
    _extension().gather_blocks(
        _pool(cache), moves.data_ptr(), len(moves), _tables(tables, device, None), _stream(device)
    )


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
    block_size: int,
) -> None:
    """Turn the tokens of a step into the inputs of the next, in place: the last thing that a captured step does.

    Args:
        drawn: [B] int64, -1 where the sampler failed.
        stop_tokens: [B, W] int64, filled up with -1.
        state: [B] int32, see ``SequenceState`` in csrc/cuda/kv_ops.h, which also says who advances when.
        draw_positions: [B] int64, the position that keys the next draw.
        sequence_of: [R] int32, whose row it is; -1 for rows that fill up a bucket.
        capacities: [R] int32, tokens that a row has slots for.
        input_ids, positions, slots: [R] int64, what the next step reads.
        lengths: [R] int32, positions + 1.
        tables: [R, width] int32, the blocks of each row, rows with any stride.
        going: [1] int32, how many sequences go on.
        block_size: tokens of a block.

    Raises:
        ValueError, RuntimeError: see ``store_kv``.
    """
    device = _device("drawn", drawn)
    if block_size < 1:
        raise ValueError(f"block_size: expected a positive number, got {block_size}")
    _check("drawn", drawn, device, (None,), (torch.int64,), contiguous=True)
    _check("sequence_of", sequence_of, device, (None,), (torch.int32,), contiguous=True)
    sequences, rows = len(drawn), len(sequence_of)
    _check("stop_tokens", stop_tokens, device, (sequences, None), (torch.int64,), contiguous=True)
    wanted = {
        "state": (state, sequences, torch.int32),
        "draw_positions": (draw_positions, sequences, torch.int64),
        "capacities": (capacities, rows, torch.int32),
        "input_ids": (input_ids, rows, torch.int64),
        "positions": (positions, rows, torch.int64),
        "slots": (slots, rows, torch.int64),
        "lengths": (lengths, rows, torch.int32),
        "going": (going, 1, torch.int32),
    }
    for name, (tensor, size, dtype) in wanted.items():
        _check(name, tensor, device, (size,), (dtype,), contiguous=True)
    step = (
        drawn, stop_tokens, state, draw_positions, sequence_of, capacities, input_ids, positions, slots, lengths, going,
    )  # fmt: skip
    _extension().advance(
        sequences, rows, stop_tokens.shape[1], *(tensor.data_ptr() for tensor in step),
        _tables(tables, device, rows), block_size, _stream(device),
    )  # fmt: skip


def _extension() -> Any:
    try:
        from pcm_fast import _cuda
    except ImportError as error:
        raise RuntimeError("pcm_fast was built without CUDA: build it with PCM_FAST_CUDA=1") from error
    return _cuda


def _device(name: str, tensor: torch.Tensor) -> torch.device:
    wanted = _extension().device_type
    if tensor.device.type != wanted:
        raise ValueError(f"{name}: expected a tensor on a {wanted} device, got one on {tensor.device}")
    return tensor.device


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _check(
    name: str,
    tensor: torch.Tensor,
    device: torch.device,
    shape: tuple[int | None, ...],
    dtypes: tuple[torch.dtype, ...],
    contiguous: bool = False,
) -> None:
    fits = tensor.dim() == len(shape) and all(
        want in (None, got) for want, got in zip(shape, tensor.shape, strict=True)
    )
    if not fits or tensor.dtype not in dtypes or tensor.device != device or (contiguous and not tensor.is_contiguous()):
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"{name}: expected {'contiguous ' if contiguous else ''}{kinds} [{sizes}] on {device}, got "
            f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} with strides {list(tensor.stride())} on "
            f"{tensor.device}"
        )


def _pool(cache: torch.Tensor) -> _cuda.Pool:
    if cache.dtype not in DTYPES or cache.dim() < 2 or not cache.is_contiguous():
        raise ValueError(
            f"cache: expected contiguous float32, bfloat16 or float16 [blocks, ...], got {cache.dtype} "
            f"{list(cache.shape)} with strides {list(cache.stride())}"
        )
    block_bytes = cache[0].numel() * cache.element_size()
    return cache.data_ptr(), block_bytes, 0, block_bytes, 1


def _tables(tables: torch.Tensor, device: torch.device, rows: int | None) -> _cuda.Tables:
    _check("tables", tables, device, (rows, None), (torch.int32,))
    if tables.stride(1) != 1 and tables.shape[1] > 1:
        raise ValueError(f"tables: expected the blocks of a row side by side, got strides {list(tables.stride())}")
    return tables.data_ptr(), *tables.shape, tables.stride(0)
