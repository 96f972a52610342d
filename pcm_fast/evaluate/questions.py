"""What is asked: every held-out prompt under every preference, worded as no PCM has read it."""

from __future__ import annotations

import random
from collections.abc import Sequence

from pcm_fast.evaluate.methods import Method, Question
from pcm_fast.evaluate.mixtures import Preference
from pcm_fast.train.config import Config
from pcm_fast.train.preferences import state
from pcm_fast.train.prompts import Prompt

MOST_PREFERENCES = 1024  # room in the numbers of questions, so that more preferences change no draw


def check_preferences(config: Config) -> tuple[Preference, ...]:
    """The preferences of a configuration, each with held-out wordings for its dimensions.

    Raises:
        ValueError: there are none, one is empty or there twice, or a dimension has no held-out wording.
    """
    preferences = config.evaluate.preferences
    where = f"{config.path}: evaluate.preferences"
    if not 1 <= len(preferences) <= MOST_PREFERENCES:
        raise ValueError(f"{where}: expected 1 to {MOST_PREFERENCES} lists of dimensions, got {len(preferences)}")
    for preference in preferences:
        if not preference or len(set(preference)) != len(preference):
            raise ValueError(f"{where}: expected lists of one or more different dimensions, got {list(preference)}")
        for name in preference:
            if not config.dimensions[name].held_out:
                raise ValueError(f"{config.path}: {name}.held_out: expected at least one wording, got none")
    if len({frozenset(preference) for preference in preferences}) != len(preferences):
        raise ValueError(f"{where}: expected each preference once")
    return preferences


def ask(method: Method, prompts: Sequence[Prompt], preferences: Sequence[Preference], config: Config) -> list[Question]:
    """The questions that a method answers."""
    if not method.per_preference:
        return [Question(p.id, p.text, (), "", n * MOST_PREFERENCES) for n, p in enumerate(prompts)]
    return [
        Question(p.id, p.text, preference, wording(config, p.id, preference), n * MOST_PREFERENCES + i)
        for n, p in enumerate(prompts)
        for i, preference in enumerate(preferences)
    ]


def wording(config: Config, prompt_id: str, preference: Preference) -> str:
    """A preference in held-out words, others for each prompt, and the same for all methods."""
    chance = random.Random(f"{config.seed} {prompt_id} {'+'.join(preference)}")
    return state(config, preference, chance, held_out=True).text
