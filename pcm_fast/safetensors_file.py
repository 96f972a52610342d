"""Reading safetensors files through a memory map; bfloat16 too, which numpy lacks."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pcm_fast.checkpoint import LoadError, StoredTensor

ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"), 1),
}
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


def map_file(path: Path) -> npt.NDArray[np.uint8]:
    """The file as a read-only array of bytes, read page by page when it is used."""
    try:
        mapped = np.memmap(path, dtype=np.uint8, mode="r")
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise LoadError(f"{path}: cannot be read: {error}") from error
    return mapped.view(np.ndarray)


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file, by its name.

    Raises:
        LoadError: not a safetensors file, a truncated one, or one whose header contradicts itself.
    """
    data = map_file(path)
    header_bytes = int.from_bytes(data[:8].tobytes(), "little")
    if len(data) < 8 or header_bytes > MAX_HEADER_BYTES or data[8:9].tobytes() != b"{":
        raise LoadError(
            f"{path}: not a safetensors file: expected a header length and '{{', got {data[:9].tobytes()!r}"
        )
    start = 8 + header_bytes
    if start > len(data):
        raise LoadError(f"{path}: truncated: expected a header of {header_bytes} bytes, got {len(data) - 8}")
    try:
        header = json.loads(data[8:start].tobytes())
    except ValueError as error:
        raise LoadError(f"{path}: the safetensors header is not valid JSON: {error}") from error
    return {
        name: stored_tensor(path, name, entry, data[start:]) for name, entry in header.items() if name != "__metadata__"
    }


def stored_tensor(path: Path, name: str, entry: Any, data: npt.NDArray[np.uint8]) -> StoredTensor:
    """One entry of the header, checked against the bytes that follow it."""
    try:
        dtype, shape = str(entry["dtype"]), tuple(int(length) for length in entry["shape"])
        begin, end = (int(offset) for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise LoadError(f"{path}: tensor {name}: the header entry is malformed: {error!r}") from error
    if end > len(data):
        raise LoadError(f"{path}: tensor {name}: truncated: expected {end} bytes of data, got {len(data)}")
    expected = prod(shape) * ITEM_BYTES.get(dtype, 0)
    if begin < 0 or end < begin or min(shape, default=0) < 0 or (dtype in ITEM_BYTES and end - begin != expected):
        raise LoadError(
            f"{path}: tensor {name}: expected {expected} bytes for {dtype} {list(shape)}, got [{begin}, {end})"
        )
    return StoredTensor(name=name, shape=shape, dtype=dtype, file=path, data=data[begin:end])
