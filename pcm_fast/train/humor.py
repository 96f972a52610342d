"""A classifier of humour: logistic regression on MiniLM embeddings, trained here and shipped with its accuracy."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pcm_fast.train.dimensions import DATA
from pcm_fast.train.embedding import embed

MODEL = DATA / "humor.json"
Floats = npt.NDArray[np.float64]


def humor_score(texts: Sequence[str]) -> Floats:
    """Log-odds [N] that a text is meant to be funny."""
    weight, bias = _model()
    return embed(texts).astype(np.float64) @ weight + bias


def read_pairs(path: Path = DATA / "humor_pairs.jsonl") -> tuple[list[str], list[int], list[str]]:
    """Texts, labels (1: humorous) and topics of our own pairs of a sober and a humorous answer to one prompt."""
    texts, labels, topics = [], [], []
    for line in path.read_text().splitlines():
        pair = json.loads(line)
        for label, kind in enumerate(("plain", "humorous")):
            texts.append(pair[kind])
            labels.append(label)
            topics.append(pair["topic"])
    return texts, labels, topics


def train(strength: float = 1.0, folds: int = 10) -> dict[str, Any]:
    """Fit on all pairs, and say how well the same fit does on topics that it has not seen.

    Args:
        strength: inverse of the L2 penalty.
        folds: of the cross-validation; a topic is in one fold only.

    Returns:
        What ``humor.json`` holds: weight [384], bias, accuracy and AUC over the folds, and how often the humorous
        answer of a pair scores higher.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import GroupKFold, cross_val_predict

    texts, labels, topics = read_pairs()
    vectors = embed(texts)
    model = LogisticRegression(C=strength, max_iter=1000)
    scores = cross_val_predict(
        model,
        vectors,
        labels,
        groups=topics,
        cv=GroupKFold(folds, shuffle=True, random_state=0),
        method="decision_function",
    )
    model.fit(vectors, labels)
    truth = np.asarray(labels)
    return {
        "weight": [round(float(value), 5) for value in model.coef_[0]],
        "bias": round(float(model.intercept_[0]), 5),
        "texts": len(texts),
        "folds": folds,
        "accuracy": round(float(((scores > 0) == truth).mean()), 4),
        "auc": round(float(roc_auc_score(truth, scores)), 4),
        "pairs_in_order": round(float((scores[1::2] > scores[0::2]).mean()), 4),
    }


@functools.cache
def _model() -> tuple[Floats, float]:
    stored = json.loads(MODEL.read_text())
    return np.asarray(stored["weight"]), float(stored["bias"])
