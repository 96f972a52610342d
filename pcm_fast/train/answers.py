"""Many answers at once, through the engine, kept in a file as they come."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pcm_fast.model import MixtureModel
from pcm_fast.train.drawing import answer_tokens, draw


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer that was drawn.

    Attributes:
        key: what it is an answer to, and how: unique in its file.
        text: the answer, without special tokens.
        tokens: its ids, the end of sequence included.
        finished: whether it ended by itself.
        likelihood: log-likelihood of its tokens under the expert "base", nats.
        ending: the part of that which the end of sequence has; 0 if it did not end by itself.
    """

    key: str
    text: str
    tokens: list[int]
    finished: bool
    likelihood: float
    ending: float

    @property
    def fluency(self) -> float:
        """Mean log-likelihood of a token of the text, nats; an early end is no lack of fluency."""
        return (self.likelihood - self.ending) / max(1, len(self.tokens) - self.finished)


@dataclass(frozen=True, slots=True)
class Question:
    """What to draw: a key, and the keywords of ``add_request``."""

    key: str
    request: dict[str, Any]


def read_answers(path: Path) -> dict[str, Answer]:
    """Answers by key. A last line that was cut off is dropped from the file."""
    if not path.exists():
        return {}
    kept, found = [], {}
    for line in path.read_text().splitlines():
        try:
            answer = Answer(**json.loads(line))
        except ValueError:
            break
        kept.append(line)
        found[answer.key] = answer
    path.write_text("".join(line + "\n" for line in kept))
    return found


def draw_answers(
    model: MixtureModel,
    questions: Iterable[Question],
    path: Path,
    max_batch: int,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, Answer]:
    """Draw an answer to each question that has none in the file, append them to it, and return all by key.

    Args:
        model: with an expert "base", which takes part in every answer.
        questions: what to draw.
        path: the file, one JSON object a line.
        max_batch: answers that are drawn at once.
        advance: called with the number of answers that are there.
    """
    answers = read_answers(path)
    wanted = list(questions)
    missing = [question for question in wanted if question.key not in answers]
    advance(len(wanted) - len(missing))
    base = model.expert_names.index("base")
    requests = ((question, {**question.request, "expert_logprobs": True}) for question in missing)
    with path.open("a") as file:
        for question, output, finished in draw(model.engine(max_batch=max_batch), requests, 2 * max_batch):
            likelihoods = output.expert_logprobs[0, :, base]
            tokens = answer_tokens(output)
            answer = Answer(
                key=question.key,
                text=model.tokenizer.decode(tokens).strip(),
                tokens=tokens,
                finished=finished,
                likelihood=round(float(likelihoods.sum()), 3),
                ending=round(float(likelihoods[-1]), 3) if finished else 0.0,
            )
            answers[answer.key] = answer
            file.write(json.dumps(asdict(answer)) + "\n")
            file.flush()
            advance(1)
    return answers
