"""Prompts in a file: one JSON object on each line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Prompt:
    """One user message.

    Attributes:
        id: unique within its file.
        topic: a word or two.
        text: the message.
    """

    id: str
    topic: str
    text: str


def load_prompts(path: Path, count: int = 0) -> list[Prompt]:
    """Count prompts of a file, evenly spread over it; all if count is 0.

    Raises:
        ValueError: a line that is no object with the texts "id", "topic" and "text"; two of one id; fewer than count.
    """
    if not path.is_file():
        raise ValueError(f"{path}: expected a file of prompts, and it does not exist")
    prompts = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            entry = json.loads(line)
            prompt = Prompt(entry["id"], entry["topic"], entry["text"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f'{path}: line {number}: expected {{"id", "topic", "text"}}, got {line!r}') from None
        if not all(isinstance(value, str) and value for value in (prompt.id, prompt.topic, prompt.text)):
            raise ValueError(f"{path}: line {number}: expected texts, got {line!r}")
        prompts.append(prompt)
    if len({prompt.id for prompt in prompts}) != len(prompts):
        raise ValueError(f"{path}: expected every id once")
    if count > len(prompts):
        raise ValueError(f"{path}: expected {count} prompts, got {len(prompts)}")
    return [prompts[i * len(prompts) // count] for i in range(count)] if count else prompts
