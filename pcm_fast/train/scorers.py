"""Scorers: what an answer is worth on one dimension, as a number. They are proxies, and each can be fooled.

Each takes N prompts and their N answers, and gives N numbers; greater is better. Their scales differ: ``rewards.py``
puts them on one.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pcm_fast.train.dimensions import DATA
from pcm_fast.train.embedding import embed
from pcm_fast.train.humor import humor_score
from pcm_fast.train.toml import read_toml

Numbers = npt.NDArray[np.float64]
Scorer = Callable[[Sequence[str], Sequence[str]], Any]

_WORD = re.compile(r"[a-z]+(?:['’][a-z]+)?", re.IGNORECASE)
_SENTENCE = re.compile(r"[.!?]+(?:\s|$)")
_LINKS = re.compile(
    r"\b(?:because|since|for example|for instance|such as|which means|in other words|including|therefore|due to|"
    r"that is why|as a result|known as|consists? of|made of|called)\b",
    re.IGNORECASE,
)


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return [word.lower().replace("’", "'") for word in _WORD.findall(text)]


def sentence_count(text: str) -> int:
    """Sentences of a text, at least 1."""
    return max(1, len(_SENTENCE.findall(text)))


def helpful(prompts: Sequence[str], answers: Sequence[str]) -> Numbers:
    """Cosine of MiniLM's embeddings of prompt and answer; less for answers under 12 words, which can hardly help."""
    cosine = (embed(prompts) * embed(answers)).sum(axis=1).astype(np.float64)
    length = np.array([len(words(answer)) for answer in answers])
    return np.asarray(cosine - 0.3 * np.maximum(0, 1 - length / 12))


def concise(prompts: Sequence[str], answers: Sequence[str]) -> Numbers:
    """Minus the logarithm of the number of words; 12 are short enough, and 3 or fewer say nothing and count as 80."""
    length = np.array([len(words(answer)) for answer in answers])
    return -np.log(np.where(length < 4, 80, np.maximum(length, 12)))


def informative(prompts: Sequence[str], answers: Sequence[str]) -> Numbers:
    """Different words with content (4 letters and more), with numbers and explanatory links counted twice."""
    values, common = [], _lexicon()["common"]
    for answer in answers:
        content = {word for word in words(answer) if len(word) > 3 and word not in common}
        links = len({match.lower() for match in _LINKS.findall(answer)})
        numbers = len(set(re.findall(r"\d+(?:[.,]\d+)*", re.sub(r"(?m)^\s*\d+[.)]", "", answer))))
        values.append(len(content) + 2 * links + 2 * min(numbers, 4))
    return np.array(values, dtype=np.float64)


def friendly(prompts: Sequence[str], answers: Sequence[str]) -> Numbers:
    """Mean sentiment of the sentences (VADER), how often the reader is spoken to, and warm words."""
    analyser, lexicon = _sentiment(), _lexicon()
    values = []
    for answer in answers:
        sentences = [part for part in re.split(r"(?<=[.!?])\s+", answer) if part.strip()] or [""]
        mood = np.mean([analyser.polarity_scores(sentence)["compound"] for sentence in sentences])
        tokens = words(answer) or [""]
        spoken_to = min(0.15, sum(word in lexicon["you"] for word in tokens) / len(tokens)) / 0.15
        warmth = min(0.1, sum(word in lexicon["warm"] for word in tokens) / len(tokens)) / 0.1
        cheer = min(3, answer.count("!")) / 3
        values.append(mood + 0.7 * spoken_to + 0.7 * warmth + 0.4 * cheer)
    return np.array(values, dtype=np.float64)


def humorous(prompts: Sequence[str], answers: Sequence[str]) -> Numbers:
    """Log-odds of a classifier that tells jokes from sober answers, see ``humor.py``."""
    return humor_score(answers)


def elementary(prompts: Sequence[str], answers: Sequence[str]) -> Numbers:
    """Minus the Flesch-Kincaid grade (0.39 words/sentence + 11.8 syllables/word - 15.59), between -20 and 2."""
    values = []
    for answer in answers:
        tokens = words(answer)
        if len(tokens) < 4:
            values.append(-20.0)
            continue
        syllables = sum(syllable_count(word) for word in tokens)
        grade = 0.39 * len(tokens) / sentence_count(answer) + 11.8 * syllables / len(tokens) - 15.59
        values.append(-float(np.clip(grade, -2, 20)))
    return np.array(values, dtype=np.float64)


@functools.lru_cache(maxsize=65536)
def syllable_count(word: str) -> int:
    """Syllables of a word: places where it may be hyphenated, or groups of vowels if there are more."""
    groups = len(re.findall(r"[aeiouy]+", word))
    if word.endswith("e") and not word.endswith("le") and groups > 1:
        groups -= 1
    return max(1, len(_hyphenator().positions(word)) + 1, groups)


BUILT_IN: dict[str, Scorer] = {
    "helpful": helpful,
    "concise": concise,
    "informative": informative,
    "friendly": friendly,
    "humorous": humorous,
    "elementary": elementary,
}


def load_scorer(reward: str) -> Scorer:
    """The scorer that a dimension names: one of ours, or "path.py:function".

    Raises:
        ValueError: there is none of that name, or the file has no such function.
    """
    if ".py:" not in reward:
        if reward not in BUILT_IN:
            known = ", ".join(map(repr, BUILT_IN))
            raise ValueError(f"reward: expected one of {known}, or 'file.py:function', got {reward!r}")
        return BUILT_IN[reward]
    path, _, name = reward.rpartition(":")
    if not Path(path).is_file():
        raise ValueError(f"reward: {path}: expected a Python file, and it does not exist")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"reward: {path}: expected a function {name!r}, got {function!r}")
    return checked(reward, function)


def checked(reward: str, function: Scorer) -> Scorer:
    """A scorer of the user's, its answer held against what was asked for."""

    def scorer(prompts: Sequence[str], answers: Sequence[str]) -> Numbers:
        values = np.asarray(function(list(prompts), list(answers)), dtype=np.float64)
        if values.shape != (len(answers),) or not np.isfinite(values).all():
            raise ValueError(f"reward: {reward}: expected {len(answers)} finite numbers, got shape {values.shape}")
        return values

    return scorer


@functools.cache
def _lexicon() -> dict[str, frozenset[str]]:
    table = read_toml(DATA / "lexicon.toml")
    return {name: frozenset(text.split()) for name, text in table.items()}


@functools.cache
def _hyphenator() -> Any:
    import pyphen

    return pyphen.Pyphen(lang="en_US")


@functools.cache
def _sentiment() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()
