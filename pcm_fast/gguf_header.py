"""The header of a GGUF file: its metadata, and where each tensor lies.

``gguf.GGUFReader`` makes several array views for every string of the vocabulary and takes over two seconds for 50,000
tokens. This walk takes a few hundredths, says where a broken file breaks, and leaves long lists of strings unread until
they are asked for; the constants come from the ``gguf`` package, and a test holds the two readers equal.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType

from pcm_fast.checkpoint import LoadError
from pcm_fast.safetensors_file import map_file

VERSIONS = (2, 3)
MAX_DIMENSIONS = 4
SCALAR_FORMATS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}


@dataclass(frozen=True)
class TensorEntry:
    """A tensor's line in the header; ``shape`` in Hugging Face order, the last dimension contiguous."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    data: npt.NDArray[np.uint8] = field(repr=False)


@dataclass(frozen=True)
class StringList:
    """A list of strings that stays in the file until it is read."""

    data: npt.NDArray[np.uint8] = field(repr=False)
    length: int

    def read(self) -> list[str]:
        """The strings, decoded."""
        raw, strings, position = self.data.tobytes(), [], 0
        for _ in range(self.length):
            end = position + 8 + int.from_bytes(raw[position : position + 8], "little")
            strings.append(raw[position + 8 : end].decode("utf-8"))
            position = end
        return strings


@dataclass(frozen=True)
class GGUFHeader:
    """Metadata by key (numbers, strings, lists; lists of strings as StringList) and the tensors by GGUF name."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorEntry]
    data: npt.NDArray[np.uint8] = field(repr=False)  # the header's own bytes


class Cursor:
    """Reads little-endian values one after the other; running past the end of the file is a LoadError."""

    def __init__(self, path: Path, data: npt.NDArray[np.uint8]) -> None:
        self.path, self.data, self.view, self.position = path, data, data.data, 0
        self.reading = "the header"

    def unpack(self, layout: str) -> tuple[Any, ...]:
        """Values in the layout of the struct module."""
        values = struct.Struct(f"<{layout}")
        start = self.advance(values.size)
        return values.unpack_from(self.view, start)

    def advance(self, size: int) -> int:
        """Step over ``size`` bytes; where they start."""
        start, end = self.position, self.position + size
        if end > len(self.data):
            raise LoadError(
                f"{self.path}: truncated or corrupt in {self.reading}: expected {size} bytes at {start}, "
                f"got {len(self.data) - start}"
            )
        self.position = end
        return start

    def string(self) -> str:
        """A length and that many bytes of UTF-8."""
        (length,) = self.unpack("Q")
        start = self.advance(length)
        try:
            return self.data[start : start + length].tobytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise LoadError(
                f"{self.path}: corrupt in {self.reading}: expected UTF-8 at byte {start}: {error}"
            ) from error

    def value(self, kind: int) -> Any:
        """A metadata value of this type."""
        if kind in SCALAR_FORMATS:
            return self.unpack(SCALAR_FORMATS[GGUFValueType(kind)])[0]
        if kind == GGUFValueType.STRING:
            return self.string()
        if kind != GGUFValueType.ARRAY:
            raise LoadError(f"{self.path}: corrupt in {self.reading}: expected a metadata type up to 12, got {kind}")
        item, length = self.unpack("IQ")
        if item == GGUFValueType.STRING:
            return self.string_list(length)
        if item in SCALAR_FORMATS:
            dtype = np.dtype(f"<{SCALAR_FORMATS[GGUFValueType(item)]}")
            start = self.advance(length * dtype.itemsize)
            return self.data[start : self.position].view(dtype).tolist()
        raise LoadError(f"{self.path}: {self.reading}: expected a list of numbers or strings, got type {item}")

    def string_list(self, length: int) -> StringList:
        """Step over a list of strings."""
        start = end = self.position
        unpack, view = struct.Struct("<Q").unpack_from, self.view
        try:
            for _ in range(length):
                end += 8 + unpack(view, end)[0]
        except (struct.error, OverflowError):  # the next length lies beyond the end
            end = len(self.data) + 1
        self.advance(end - start)
        return StringList(self.data[start:end], length)


def read_header(path: Path) -> GGUFHeader:
    """The header of a GGUF file, with every tensor's bytes checked to lie within the file.

    Raises:
        LoadError: not a little-endian GGUF file of version 2 or 3, truncated, or corrupt.
    """
    cursor = Cursor(path, map_file(path))
    magic = cursor.data[:4].tobytes()
    if magic != b"GGUF":
        raise LoadError(f"{path}: wrong magic: expected b'GGUF', got {magic!r}")
    cursor.advance(4)
    version, num_tensors, num_keys = cursor.unpack("IQQ")
    if version not in VERSIONS:
        kind = " (a big-endian file)" if version & 0xFFFF == 0 else ""
        raise LoadError(f"{path}: expected GGUF version 2 or 3, got {version}{kind}")
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        cursor.reading = f"the metadata after {next(reversed(metadata), 'the start')}"
        key = cursor.string()
        cursor.reading = f"the metadata {key}"
        metadata[key] = cursor.value(cursor.unpack("I")[0])
    entries = read_entries(cursor, num_tensors)
    alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise LoadError(f"{path}: general.alignment: expected a power of two, got {alignment!r}")
    start = -(-cursor.position // alignment) * alignment
    tensors = {entry[0]: locate(path, cursor.data, start, *entry) for entry in entries}
    return GGUFHeader(path, metadata, tensors, cursor.data[: cursor.position])


def read_entries(cursor: Cursor, count: int) -> list[tuple[str, tuple[int, ...], str, int]]:
    """Name, shape, type and offset of each tensor, as the header states them."""
    entries: dict[str, tuple[str, tuple[int, ...], str, int]] = {}
    for _ in range(count):
        cursor.reading = f"the tensor list after {next(reversed(entries), 'the start')}"
        name = cursor.string()
        cursor.reading = f"the tensor list at {name}"
        (dimensions,) = cursor.unpack("I")
        if dimensions > MAX_DIMENSIONS:
            raise LoadError(
                f"{cursor.path}: tensor {name}: expected at most {MAX_DIMENSIONS} dimensions, got {dimensions}"
            )
        shape = tuple(reversed(cursor.unpack(f"{dimensions}Q")))
        kind, offset = cursor.unpack("IQ")
        if name in entries:
            raise LoadError(f"{cursor.path}: tensor {name}: listed twice")
        try:
            entries[name] = (name, shape, GGMLQuantizationType(kind).name, offset)
        except ValueError as error:
            raise LoadError(f"{cursor.path}: tensor {name}: type {kind} is not supported: unknown to gguf") from error
    return list(entries.values())


def locate(
    path: Path, data: npt.NDArray[np.uint8], start: int, name: str, shape: tuple[int, ...], dtype: str, offset: int
) -> TensorEntry:
    """One tensor's bytes; LoadError where they would end after the file does."""
    block_size, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[dtype]]
    columns = shape[-1] if shape else 1
    if columns % block_size:
        raise LoadError(
            f"{path}: tensor {name}: expected rows of a multiple of {block_size} for {dtype}, got {columns}"
        )
    begin = start + offset
    end = begin + prod(shape) // block_size * block_bytes
    if end > len(data):
        raise LoadError(
            f"{path}: tensor {name}: truncated: expected {dtype} {list(shape)} at bytes [{begin}, {end}), "
            f"got a file of {len(data)}"
        )
    return TensorEntry(name, shape, dtype, data[begin:end])
