"""What experts learn from: answers of the base, plain and in style, each with its likelihood and its rewards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pcm_fast.model import MixtureModel
from pcm_fast.train.answers import Answer, Question, draw_answers
from pcm_fast.train.config import Config
from pcm_fast.train.prompts import Prompt, load_prompts
from pcm_fast.train.rewards import Rewards
from pcm_fast.train.scorers import helpful

Floats = npt.NDArray[np.float64]
Advance = Callable[[int], None]
OWN = 5_000_000  # from here on the seeds of experts' own answers; the base's are lower


@dataclass(frozen=True)
class Pool:
    """All answers to all prompts; N of them.

    Attributes:
        prompts: by id.
        prompt_ids: of each answer.
        styles: of each answer the dimension in whose style it was drawn; "" for a plain one.
        answers: the answers.
        fluency: [N] nats a token under the base.
        rewards: [N] by dimension.
        relevance: [N] how near each is to its prompt, in standard deviations of the plain answers, whose mean is 0.
        shortened: styles whose answers were drawn with a bias to the end of the sequence.
    """

    prompts: Mapping[str, Prompt]
    prompt_ids: list[str]
    styles: list[str]
    answers: list[Answer]
    fluency: Floats
    rewards: Mapping[str, Floats]
    relevance: Floats
    shortened: frozenset[str]

    def plain(self, prompt_id: str) -> list[int]:
        """The base's own answers to a prompt: their places in the pool."""
        places = enumerate(zip(self.prompt_ids, self.styles, strict=True))
        return [i for i, (other, style) in places if other == prompt_id and not style]


def draw_pool(config: Config, directory: Path, advance: Advance) -> tuple[Pool, Rewards]:
    """Draw all answers, going on from what the directory holds, and set the rewards' scales by the plain ones.

    Args:
        config: the configuration.
        directory: for answers.jsonl.
        advance: called with the number of answers that were drawn.
    """
    model = _beside_base(config, None)
    wanted = questions(config, model)
    found = draw_answers(model, wanted, directory / "answers.jsonl", config.answers.max_batch, advance)
    keys = [question.key for question in wanted]
    prompts = {prompt.id: prompt for prompt in load_prompts(config.prompts)}
    ids, styles = [key.split("/")[0] for key in keys], [key.split("/")[1] for key in keys]
    texts = [prompts[i].text for i in ids]
    answers = [found[key] for key in keys]
    fluency = np.array([answer.fluency for answer in answers])
    plain = [i for i, style in enumerate(styles) if not style]
    written = [answer.text for answer in answers]
    rewards, scores = Rewards.calibrate(config, texts, written, fluency, plain)
    relevance = helpful(texts, written)
    relevance = (relevance - relevance[plain].mean()) / relevance[plain].std()
    shortened = frozenset(name for name, dimension in config.dimensions.items() if dimension.ending)
    return Pool(prompts, ids, styles, answers, fluency, scores, relevance, shortened), rewards


def draw_own(config: Config, base: Pool, rewards: Rewards, adapter: Path, path: Path, advance: Advance) -> Pool:
    """Draw answers of an expert itself, going on from what the file holds.

    Args:
        config: the configuration.
        base: the answers of the base, to whose prompts the expert answers too.
        rewards: their scales.
        adapter: directory of the expert.
        path: the file.
        advance: called with the number of answers that were drawn.
    """
    model = _beside_base(config, adapter)
    ids = [prompt_id for prompt_id in dict.fromkeys(base.prompt_ids) for _ in range(config.answers.own)]
    wanted = []
    for i, prompt_id in enumerate(ids):
        read = model.chat_inputs(base.prompts[prompt_id].text)["input_ids"]
        request = {"input_ids": read, **_how(config), "seed": config.seed * 1_000_003 + OWN + i}
        wanted.append(Question(f"{prompt_id}//{i % config.answers.own}", request))
    found = draw_answers(model, wanted, path, config.answers.max_batch, advance)
    answers = [found[question.key] for question in wanted]
    fluency = np.array([answer.fluency for answer in answers])
    texts, written = [base.prompts[i].text for i in ids], [answer.text for answer in answers]
    plain = [i for i, style in enumerate(base.styles) if not style]
    before = helpful([base.prompts[base.prompt_ids[i]].text for i in plain], [base.answers[i].text for i in plain])
    relevance = (helpful(texts, written) - before.mean()) / before.std()
    scores = rewards.score(texts, written, fluency)
    return Pool(base.prompts, ids, [""] * len(ids), answers, fluency, scores, relevance, frozenset())


def pool_size(config: Config) -> int:
    """How many answers ``draw_pool`` draws."""
    styled = sum(config.answers.styled for dimension in config.dimensions.values() if dimension.styles)
    return len(load_prompts(config.prompts, config.answers.prompts)) * (config.answers.plain + styled)


def own_size(config: Config, base: Pool) -> int:
    """How many answers ``draw_own`` draws."""
    return config.answers.own * len(set(base.prompt_ids))


def questions(config: Config, model: MixtureModel) -> list[Question]:
    """Everything to be drawn: config.answers.plain + styled * dimensions answers to each prompt."""
    drawn: list[tuple[str, dict[str, Any]]] = []
    for p, prompt in enumerate(load_prompts(config.prompts, config.answers.prompts)):
        turn = {"role": "user", "content": prompt.text}
        plain = model.chat_inputs([turn])["input_ids"]
        for i in range(config.answers.plain):
            drawn.append((f"{prompt.id}//{i}", {"input_ids": plain, "active": ["base"]}))
        for dimension in config.dimensions.values():
            for i in range(config.answers.styled if dimension.styles else 0):
                style = dimension.styles[(p + i) % len(dimension.styles)]
                read = model.chat_inputs([{"role": "system", "content": style}, turn])["input_ids"]
                request: dict[str, Any] = {"input_ids": plain, "expert_input_ids": {"writer": read}}
                if dimension.ending:
                    request["logit_bias"] = {model.tokenizer.eos_token_id: dimension.ending}
                drawn.append((f"{prompt.id}/{dimension.name}/{i}", request))
    start = config.seed * 1_000_003
    return [Question(key, {**request, **_how(config), "seed": start + i}) for i, (key, request) in enumerate(drawn)]


def _beside_base(config: Config, writer: Path | None) -> MixtureModel:
    """A writer (an adapter, or the base) and the base, whose weight changes nothing: so its likelihoods are known."""
    writers = {"base": None, "writer": writer}
    return MixtureModel.from_pretrained(
        config.base, writers, {"base": 1e-7, "writer": 1.0}, activations=config.activations
    )


def _how(config: Config) -> dict[str, Any]:
    """How answers are drawn, as keywords of ``add_request``."""
    drawn = config.answers
    return {"max_new_tokens": drawn.max_new_tokens, "temperature": drawn.temperature, "top_p": drawn.top_p}
