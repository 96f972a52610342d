"""What a checkpoint says about its tokens, whether its architecture is one of ours or not."""

from __future__ import annotations

import json
from typing import Any

from pcm_fast.checkpoint import Checkpoint


def vocab_size(checkpoint: Checkpoint) -> int:
    """Number of token ids its distributions range over."""
    if checkpoint.config is not None:
        return checkpoint.config.vocab_size
    return int(_config_file(checkpoint)["vocab_size"])


def max_positions(checkpoint: Checkpoint) -> int | None:
    """Longest context it was made for, None if it does not say."""
    if checkpoint.config is not None:
        return checkpoint.config.max_position_embeddings
    value = _config_file(checkpoint).get("max_position_embeddings")
    return None if value is None else int(value)


def eos_token_ids(checkpoint: Checkpoint) -> tuple[int, ...]:
    """The tokens that end a text, none if the checkpoint names none."""
    if checkpoint.config is not None:
        return tuple(checkpoint.config.eos_token_ids)
    value = _config_file(checkpoint).get("eos_token_id")
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (int(value),)


def pad_token_id(checkpoint: Checkpoint) -> int:
    """The token written after the end of a text: its pad token, else the first that ends a text, else 0."""
    if checkpoint.config is not None:
        pad = checkpoint.config.pad_token_id
    else:
        pad = _config_file(checkpoint).get("pad_token_id")
    if pad is not None and 0 <= pad < vocab_size(checkpoint):
        return int(pad)
    return next(iter(eos_token_ids(checkpoint)), 0)


def _config_file(checkpoint: Checkpoint) -> dict[str, Any]:
    """``config.json`` of an architecture that only transformers knows; the text part of a multimodal one."""
    directory = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    config: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return {**config, **config.get("text_config", {})}
