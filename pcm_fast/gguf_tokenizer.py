"""Tokenizers out of GGUF metadata, built with the ``tokenizers`` library, kept in a cache once built."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import platformdirs
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from pcm_fast.checkpoint import LoadError
from pcm_fast.gguf_header import GGUFHeader, StringList
from pcm_fast.tokenizer import Tokenizer, surround

CACHE_VERSION = 1  # to be raised whenever the tokenizer built from the same metadata changes
CONTROL, USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How tokenizer.ggml.pre says to split a text; None stands for GPT-2's way, which the tokenizers library has built in.
# transformers takes "smollm" for GPT-2, and so do we, to agree with it. The original splits off digits first, which
# differs in two rare cases: several spaces before a digit, and numerals such as "²" after a space.
SPLITS = {
    "default": None,
    "gpt-2": None,
    "smollm": None,
    "llama-bpe": LLAMA3_SPLIT,
    "llama3": LLAMA3_SPLIT,
    "llama-v3": LLAMA3_SPLIT,
    "qwen2": LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}"),
}
SPECIAL_TOKEN_KEYS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def read_gguf_tokenizer(header: GGUFHeader) -> Tokenizer | None:
    """The tokenizer of a GGUF file, from the cache if it was built before; None if the file has none.

    Raises:
        LoadError: a kind of tokenizer that is not supported, or metadata that make no tokenizer.
    """
    metadata, path = header.metadata, header.path
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, StringList):
        return None
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    if model not in ("gpt2", "llama"):
        raise LoadError(f"{path}: tokenizer.ggml.model: expected 'gpt2' or 'llama', got {model!r}")
    if model == "gpt2" and pre not in SPLITS:
        raise LoadError(f"{path}: tokenizer.ggml.pre: expected one of {', '.join(SPLITS)}, got {pre!r}")
    cached = cache_path(header)
    backend = read_cache(cached, tokens.length)
    if backend is None:
        backend = build_backend(header, str(model), str(pre))
        write_cache(cached, backend)
    special_tokens: dict[str, str] = {}
    for name, key in SPECIAL_TOKEN_KEYS.items():
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        token = backend.id_to_token(index) if isinstance(index, int) and 0 <= index < tokens.length else None
        if token is not None:
            special_tokens[name] = token
    template = metadata.get("tokenizer.chat_template")
    # Old files have no flags; a sentencepiece vocabulary then opens every text with bos.
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", model == "llama")
    add_eos = metadata.get("tokenizer.ggml.add_eos_token", False)
    surround(
        backend,
        special_tokens.get("bos_token") if add_bos else None,
        special_tokens.get("eos_token") if add_eos else None,
    )
    return Tokenizer(backend, special_tokens, template if isinstance(template, str) else None)


def build_backend(header: GGUFHeader, model: str, pre: str) -> tokenizers.Tokenizer:
    """The tokenizer that the metadata describe, as transformers converts it."""
    path, metadata = header.path, header.metadata
    try:
        tokens = metadata["tokenizer.ggml.tokens"].read()
        stored = metadata.get("tokenizer.ggml.merges")
        merges = None if stored is None else [split_merge(merge) for merge in stored.read()]
        if model == "gpt2":
            if merges is None:
                raise LoadError(f"{path}: tokenizer.ggml.merges is missing, expected with tokenizer.ggml.model 'gpt2'")
            backend = byte_level(tokens, merges, pre)
        else:
            backend = sentencepiece(tokens, merges, metadata)
        add_tokens(backend, tokens, metadata, byte_level=model == "gpt2")
    except LoadError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception
        raise LoadError(f"{path}: tokenizer.ggml: the metadata make no tokenizer: {error}") from error
    return backend


def split_merge(merge: str) -> tuple[str, str]:
    """A merge rule, "left right"; a piece may itself begin with the space that parts them."""
    left, _, right = merge.partition(" ")
    return left, right


def byte_level(tokens: list[str], merges: list[tuple[str, str]], pre: str) -> tokenizers.Tokenizer:
    """Byte-level BPE with one of the known ways to split a text."""
    spelling = byte_spelling()
    alphabet = set(spelling.values())
    vocabulary = {
        token if set(token) <= alphabet else "".join(spelling[byte] for byte in token.encode()): index
        for index, token in enumerate(tokens)
    }
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, fuse_unk=False))
    backend.decoder = decoders.ByteLevel()
    split = SPLITS[pre]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    if split is None:
        backend.pre_tokenizer = to_bytes
    else:
        first = pre_tokenizers.Split(Regex(split), behavior="isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([first, to_bytes])
    return backend


def byte_spelling() -> dict[int, str]:
    """The character that stands for each byte in a byte-level vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + rank) for rank, byte in enumerate(others)}


def sentencepiece(
    tokens: list[str], merges: list[tuple[str, str]] | None, metadata: Mapping[str, Any]
) -> tokenizers.Tokenizer:
    """BPE over pieces that write a space as U+2581, with single bytes as the last resort."""
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if merges is None:
        scores = metadata.get("tokenizer.ggml.scores")
        if not isinstance(scores, list) or len(scores) != len(tokens):
            raise ValueError("expected tokenizer.ggml.merges, or a score for every token")
        merges = merges_of_scores(vocabulary, dict(zip(tokens, scores, strict=True)))
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges, fuse_unk=True, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    return backend


def merges_of_scores(vocabulary: Mapping[str, int], scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """The merge rules that a scored vocabulary implies: every way to make a token of two, best score first."""
    merges: list[tuple[float, str, str]] = []
    for token, score in scores.items():
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        pairs = [pair for pair in halves if pair[0] in vocabulary and pair[1] in vocabulary]
        pairs.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        merges += [(score, left, right) for left, right in pairs]
    merges.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [(left, right) for _, left, right in merges]


def add_tokens(backend: tokenizers.Tokenizer, tokens: list[str], metadata: Mapping[str, Any], byte_level: bool) -> None:
    """Have control and user-defined tokens matched whole in a text; the former, and bos and the like, as special.

    Every real token of a byte-level vocabulary is spelled in the byte alphabet, so a control token with any other
    character is a mislabelled one.
    """
    alphabet = set(byte_spelling().values())
    kinds = metadata.get("tokenizer.ggml.token_type") or []
    named = {metadata.get(f"tokenizer.ggml.{key}_token_id") for key in SPECIAL_TOKEN_KEYS.values()}
    special = [
        index
        for index, kind in enumerate(kinds[: len(tokens)])
        if kind == CONTROL and (not byte_level or set(tokens[index]) <= alphabet)
    ]
    special += [index for index in named if isinstance(index, int) and 0 <= index < len(tokens)]
    plain = [index for index, kind in enumerate(kinds[: len(tokens)]) if kind == USER_DEFINED]
    backend.add_special_tokens(
        [AddedToken(tokens[index], normalized=False, special=True) for index in sorted(set(special))]
    )
    known = backend.get_vocab()
    backend.add_tokens(
        [AddedToken(tokens[index], normalized=False, special=False) for index in plain if tokens[index] in known]
    )


def cache_path(header: GGUFHeader) -> Path:
    """Where the tokenizer is kept: named by the header's content, so that it cannot be another file's."""
    digest = hashlib.sha256(f"{CACHE_VERSION} {tokenizers.__version__} ".encode())
    digest.update(header.data.data)
    directory = os.environ.get("PCM_FAST_CACHE") or platformdirs.user_cache_path("pcm-fast")
    return Path(directory) / "tokenizers" / f"{digest.hexdigest()[:32]}.json"


def read_cache(path: Path, num_tokens: int) -> tokenizers.Tokenizer | None:
    """A tokenizer from the cache, None if it is not there or not whole."""
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception:  # the tokenizers library raises bare Exception for missing and for broken files
        return None
    return backend if backend.get_vocab_size(with_added_tokens=True) == num_tokens else None


def write_cache(path: Path, backend: tokenizers.Tokenizer) -> None:
    """Keep a tokenizer; readers see all of it or nothing. A cache that cannot be written is no error, just slower."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(backend.to_str())
            os.replace(name, path)
        except OSError:
            os.unlink(name)
            raise
