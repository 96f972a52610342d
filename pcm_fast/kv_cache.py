"""The KV cache: which block holds which token (KvCacheManager), the memory on the CPU (KvStorage), names for prefixes.

The two classes are native; csrc/kv_cache.h and csrc/kv_storage.h say what they promise.
"""

import hashlib

from pcm_fast._native import KvCacheManager, KvStorage, OutOfBlocks, OutOfRows

__all__ = ["KvCacheManager", "KvStorage", "OutOfBlocks", "OutOfRows", "namespace_id"]


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
