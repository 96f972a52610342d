"""The KV cache: which block holds which token (KvCacheManager), the memory on the CPU (KvStorage), names for prefixes.

The two classes are native; csrc/kv_cache.h and csrc/kv_storage.h say what they promise.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable

from pcm_fast._native import KvCacheManager, KvStorage, OutOfBlocks, OutOfRows

__all__ = [
    "BLOCK_SIZE",
    "KvCacheManager",
    "KvStorage",
    "OutOfBlocks",
    "OutOfRows",
    "host_memory",
    "managers",
    "namespace_id",
]

BLOCK_SIZE = 16  # tokens of a block


def namespace_id(*identities: str) -> int:
    """64 bits that stand for everything but the tokens that keys and values depend on.

    identities: say of the base checkpoint, the adapter ("" if there is none), the weight format and the storage dtype.
    Rows share cached prefixes iff their namespace is the same.
    """
    digest = hashlib.blake2b(digest_size=8)
    for identity in identities:
        data = identity.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return int.from_bytes(digest.digest(), "little")


def managers(shapes: Iterable[tuple[int, int, int]]) -> list[KvCacheManager]:
    """A manager for each model, from (blocks, rows at once, positions that the model was made for)."""
    return [
        KvCacheManager(
            num_blocks=blocks,
            block_size=BLOCK_SIZE,
            max_rows=max(1, rows),
            max_blocks_per_row=min(blocks, -(-positions // BLOCK_SIZE)),
        )
        for blocks, rows, positions in shapes
    ]


def host_memory() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
