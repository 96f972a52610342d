"""Ready-made experts: trained ones with their PCM, for the embedded base; prompted ones, for any base."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

TRAINED_BASE = "smollm2-135m-instruct"
"""The base that the trained experts and their PCM are for, as ``MixtureModel.from_pretrained`` takes it."""

TRAINED = Path(__file__).parent / "trained"
"""What ``pcm-fast train-experts`` and ``train-pcm`` wrote: experts, PCM, scales of the rewards, best fixed weights."""

TRAINED_EXPERTS = ("helpful", "concise", "informative", "friendly", "humorous", "elementary")
"""Names of the trained experts."""

PROMPTED_EXPERTS: Mapping[str, str] = {
    "concise": 'You answer in one short sentence and stop. Asked how to sleep better, you say: "Go to bed early."',
    "friendly": (
        "You are a warm and cheerful friend. Asked how to sleep better, you say: "
        '"Oh my dear friend, I\'m so happy you asked! You deserve a good rest!"'
    ),
    "humorous": (
        "You are a comedian who jokes about everything. Asked how to sleep better, you say: "
        '"Ha ha! Count sheep, and if the sheep count you, call a vet!"'
    ),
    "elementary": (
        "You talk to a small child in tiny words. Asked how to sleep better, you say: "
        '"Your body is like a toy. It gets tired. Hug your bear and close your eyes."'
    ),
}
"""The system prompt of every prompted expert, by name. A small model follows an example better than a rule."""


def prompted_experts(*names: str) -> dict[str, dict[str, str]]:
    """Prompted experts for ``MixtureModel.from_pretrained(experts=...)``: those named, or all.

    Raises:
        ValueError: a name that is none of ``PROMPTED_EXPERTS``.

    """
    for name in names:
        if name not in PROMPTED_EXPERTS:
            raise ValueError(f"expert: expected one of {', '.join(map(repr, PROMPTED_EXPERTS))}, got {name!r}")
    return {name: {"system": PROMPTED_EXPERTS[name]} for name in names or PROMPTED_EXPERTS}


def trained_experts(*names: str) -> dict[str, Path]:
    """Trained experts for ``MixtureModel.from_pretrained(experts=...)``: LoRA adapters for ``TRAINED_BASE``.

    Args:
        names: which; none stands for all six.

    Raises:
        ValueError: a name that is none of ``TRAINED_EXPERTS``.
    """
    for name in names:
        if name not in TRAINED_EXPERTS:
            raise ValueError(f"expert: expected one of {', '.join(map(repr, TRAINED_EXPERTS))}, got {name!r}")
    return {name: TRAINED / "experts" / name for name in names or TRAINED_EXPERTS}


def trained_pcm() -> Path:
    """The trained Preference Control Model, for ``from_pretrained(pcm=...)``; it weighs any of the trained experts."""
    return TRAINED / "pcm"
