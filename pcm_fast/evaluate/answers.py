"""Answers of a method, drawn through the engine and kept in a file as they come."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from pcm_fast.evaluate.log import JsonLog
from pcm_fast.evaluate.methods import Method, Question
from pcm_fast.evaluate.mixtures import identity
from pcm_fast.generation import GenerateOutput
from pcm_fast.model import MixtureModel
from pcm_fast.pcm import LearnedPCM
from pcm_fast.preference import in_words
from pcm_fast.spec import ModelSpec
from pcm_fast.train.config import Config
from pcm_fast.train.drawing import answer_tokens, draw

Key = tuple[str, str]


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        prompt_id, preference: which question it answers; see ``Question.key``.
        wording: the preference as a PCM read it, "" for other methods.
        text: the answer.
        tokens: how many it took, the end-of-sequence token included.
        finished: whether it ended by itself, before max_new_tokens.
        weights: [T][K] the weights of a PCM at every token; None for other methods.
        request: digest of what was asked.
    """

    prompt_id: str
    preference: str
    wording: str
    text: str
    tokens: int
    finished: bool
    weights: list[list[float]] | None
    request: str

    @property
    def key(self) -> Key:
        """Which question it answers."""
        return self.prompt_id, self.preference


@dataclass(frozen=True)
class Answers:
    """All answers of a method.

    Attributes:
        by_key: the answers.
        expert_names: in the order of the weights of a PCM; () for other methods.
        tokens, seconds: what was drawn, in how much time, over all runs that drew into the file.
    """

    by_key: dict[Key, Answer]
    expert_names: tuple[str, ...]
    tokens: int
    seconds: float


def collect_answers(
    method: Method,
    questions: Sequence[Question],
    config: Config,
    path: Path,
    num_threads: int | None,
    advance: Callable[[int], None],
) -> Answers:
    """Draw the answers that are not in the file yet.

    Args:
        method: who answers.
        questions: what is asked; for a method that knows of no preference, once for each prompt.
        config: says how answers are drawn.
        path: the file, JSON lines; begun if it is not there.
        num_threads: threads to compute on; None leaves it to the backend.
        advance: called with the number of questions that have got their answers.

    Raises:
        ValueError: the file holds answers of another mixture, to other questions, or drawn otherwise.
    """
    groups = {"": list(questions)}
    if not method.one_mixture:
        ordered = sorted(questions, key=lambda question: question.key[1])
        groups = {preference: list(group) for preference, group in groupby(ordered, lambda question: question.key[1])}
    specs = {preference: method.mixture(group[0].preference) for preference, group in groups.items()}
    evaluate = config.evaluate
    conditions = {
        "method": method.name,
        "mixtures": {
            key: identity(specs[key], used_experts(method, specs[key], group)) for key, group in groups.items()
        },
        "seed": config.seed,
        "activations": config.activations,
        "max_new_tokens": evaluate.max_new_tokens,
        "temperature": evaluate.temperature,
        "top_p": evaluate.top_p,
    }
    log = JsonLog(path, conditions)
    found = {answer.key: answer.request for answer in _answers(log)}
    for question in questions:
        if found.get(question.key, request_digest(method, question)) != request_digest(method, question):
            raise ValueError(
                f"{path}: expected answers to the same requests, and that of {' under '.join(question.key)} has "
                "changed; move the file away to draw them again, or choose another directory"
            )
    with log:
        for preference, group in groups.items():
            missing = [question for question in group if question.key not in found]
            advance(len(group) - len(missing))
            if not missing:
                continue
            spec = specs[preference]
            model = MixtureModel(spec, backend="native", num_threads=num_threads, activations=config.activations)
            _draw_into(log, model, method, missing, config, advance)
    learned = [spec for spec in specs.values() if isinstance(spec.pcm, LearnedPCM)]
    drawn = [record["drawn"] for record in log.records if "drawn" in record]
    return Answers(
        by_key={answer.key: answer for answer in _answers(log)},
        expert_names=learned[0].expert_names if learned else (),
        tokens=sum(entry["tokens"] for entry in drawn),
        seconds=sum(entry["seconds"] for entry in drawn),
    )


def _answers(log: JsonLog) -> Iterator[Answer]:
    return (Answer(**record) for record in log.records if "text" in record)


def _draw_into(
    log: JsonLog,
    model: MixtureModel,
    method: Method,
    questions: Sequence[Question],
    config: Config,
    advance: Callable[[int], None],
) -> None:
    """Draw, append answers one by one, and at the end what was drawn in how much time, also if it is cut short."""
    requests = ((question, request_options(model, method, question, config)) for question in questions)
    engine = model.engine(max_batch=config.evaluate.max_batch)
    tokens, started = 0, time.perf_counter()
    try:
        with closing(draw(engine, requests, 2 * config.evaluate.max_batch)) as outputs:
            for question, output, finished in outputs:
                answer = read_answer(model, method, question, output, finished)
                log.append(asdict(answer))
                tokens += answer.tokens
                advance(1)
    finally:
        if tokens:
            log.append({"drawn": {"tokens": tokens, "seconds": time.perf_counter() - started}})


def used_experts(method: Method, spec: ModelSpec, questions: Sequence[Question]) -> set[str]:
    """Names of the experts that take part in any of the answers."""
    used: set[str] = set()
    for question in questions:
        preference = method.request(question).preference
        used.update(preference if isinstance(preference, Mapping) else spec.expert_names)
    return used


def request_digest(method: Method, question: Question) -> str:
    """Names what a method asks of its mixture for a question."""
    return hashlib.sha256(json.dumps(asdict(method.request(question))).encode()).hexdigest()[:16]


def request_options(model: MixtureModel, method: Method, question: Question, config: Config) -> dict[str, Any]:
    """The keywords of ``Engine.add_request`` for a question."""
    request = method.request(question)
    return {
        **model.chat_inputs(request.messages, preference=request.preference),
        "preference": request.preference,
        "max_new_tokens": config.evaluate.max_new_tokens,
        "temperature": config.evaluate.temperature,
        "top_p": config.evaluate.top_p,
        "seed": config.seed,
        "first_sequence": question.number,
        **request.options,
    }


def read_answer(
    model: MixtureModel, method: Method, question: Question, output: GenerateOutput, finished: bool
) -> Answer:
    """An answer as it is kept."""
    tokens = answer_tokens(output)
    preference = method.request(question).preference
    words = in_words(preference) if isinstance(preference, Mapping) else preference or ""
    learned = isinstance(model.spec.pcm, LearnedPCM)
    return Answer(
        *question.key,
        wording=words if learned else "",
        text=model.tokenizer.decode(tokens).strip(),
        tokens=len(tokens),
        finished=finished,
        weights=output.mixture_weights[0].astype(np.float64).round(4).tolist() if learned else None,
        request=request_digest(method, question),
    )
