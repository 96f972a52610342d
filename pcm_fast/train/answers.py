"""Many answers at once, through the engine, kept in a file as they come."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pcm_fast.model import MixtureModel


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer that was drawn.

    Attributes:
        key: what it is an answer to, and how: unique in its file.
        text: the answer, without special tokens.
        tokens: its ids, the end of sequence included.
        finished: whether it ended by itself.
        fluency: mean log-likelihood of its tokens under the expert "base", nats.
    """

    key: str
    text: str
    tokens: list[int]
    finished: bool
    fluency: float


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
    engine = model.engine(max_batch=max_batch)
    base = model.expert_names.index("base")
    waiting = list(reversed(missing))
    running: dict[int, Question] = {}
    with path.open("a") as file:
        while waiting or running:
            while waiting and len(running) < max_batch:
                question = waiting.pop()
                running[engine.add_request(**question.request, expert_logprobs=True)] = question
            for output in engine.step():
                if output.finish_reason is None:
                    continue
                question = running.pop(output.request_id)
                result = engine.result(output.request_id)
                ids = result.sequences[0, -len(result.logprobs[0]) :].tolist()
                answer = Answer(
                    key=question.key,
                    text=model.tokenizer.decode(ids).strip(),
                    tokens=ids,
                    finished=output.finish_reason != "length",
                    fluency=round(float(result.expert_logprobs[0, :, base].mean()), 4),
                )
                answers[answer.key] = answer
                file.write(json.dumps(asdict(answer)) + "\n")
                file.flush()
                advance(1)
    return answers
