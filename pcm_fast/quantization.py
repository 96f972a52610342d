"""Block formats of stored tensors: how many bytes they take, and how they become float32."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

# The types whose tensors can become float32; anything else is refused, by name, when a checkpoint is loaded.
READABLE_DTYPES = (
    *("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"),
)
CHUNK_BLOCKS = 1024  # blocks decoded at a time, so that the temporaries stay in the second-level cache


def block_layout(dtype: str) -> tuple[int, int]:
    """``(elements, bytes)`` of one block of this type; a plain type has blocks of one element."""
    if dtype not in READABLE_DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(READABLE_DTYPES)}, got {dtype!r}")
    block_size, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[dtype]]
    return int(block_size), int(block_bytes)


def dequantize(blocks: npt.NDArray[np.uint8], dtype: str) -> npt.NDArray[np.float32]:
    """Decode rows of blocks, uint8 [rows, bytes_per_row], into a new float32 [rows, elements_per_row]."""
    block_size, block_bytes = block_layout(dtype)
    rows, bytes_per_row = blocks.shape
    columns = bytes_per_row // block_bytes * block_size
    # A copy where the slice of the file does not start on a multiple of four bytes costs nothing next to decoding.
    stored = np.ascontiguousarray(blocks)
    if dtype == "F32":
        return stored.view("<f4").astype(np.float32)
    if dtype == "F16":
        return stored.view("<f2").astype(np.float32)
    if dtype == "BF16":
        return (stored.view("<u2").astype(np.uint32) << 16).view(np.float32)
    if dtype not in ("Q8_0", "Q4_0", "Q4_1"):
        decoded: npt.NDArray[np.float32] = quants.dequantize(stored, GGMLQuantizationType[dtype])
        return decoded.reshape(rows, columns)
    stored = stored.reshape(-1, block_bytes)
    out = np.empty((len(stored), block_size), dtype=np.float32)
    for start in range(0, len(stored), CHUNK_BLOCKS):
        chunk = slice(start, start + CHUNK_BLOCKS)
        decode_chunk(stored[chunk], dtype, out[chunk])
    return out.reshape(rows, columns)


def decode_chunk(stored: npt.NDArray[np.uint8], dtype: str, out: npt.NDArray[np.float32]) -> None:
    """Decode blocks of 32 weights, uint8 [blocks, block_bytes], into ``out`` [blocks, 32].

    Each block starts with its scale (and, in Q4_1, its minimum) in float16. A byte of a 4-bit block holds weight i in
    its low half and weight i + 16 in its high half.
    """
    scale = stored[:, 0:2].copy().view("<f2").astype(np.float32)
    if dtype == "Q8_0":
        out[:] = stored[:, 2:].view(np.int8)
        out *= scale
        return
    nibbles = stored[:, 4:] if dtype == "Q4_1" else stored[:, 2:]
    out[:, :16] = nibbles & 0x0F
    out[:, 16:] = nibbles >> 4
    if dtype == "Q4_0":
        out -= 8.0
    out *= scale
    if dtype == "Q4_1":
        out += stored[:, 2:4].copy().view("<f2").astype(np.float32)
