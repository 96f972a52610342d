"""The methods under comparison: each turns a question into a request to a mixture."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pcm_fast.evaluate.mixtures import BASE, Mixtures, Preference
from pcm_fast.spec import ModelSpec
from pcm_fast.train.config import Config

Kind = Literal["baseline", "expert", "pcm", "ablation"]


@dataclass(frozen=True)
class Question:
    """One prompt under one preference.

    Attributes:
        prompt_id, prompt: the user message.
        preference: the dimensions it is to be judged by; () for methods that know of none.
        wording: the preference in words that no PCM was trained on; "" likewise.
        number: on which, with the seed, the draws depend.
    """

    prompt_id: str
    prompt: str
    preference: Preference
    wording: str
    number: int

    @property
    def key(self) -> tuple[str, str]:
        """Which question it is, in a file of answers."""
        return self.prompt_id, "+".join(self.preference)


@dataclass(frozen=True)
class Request:
    """What a method asks of its mixture: keywords of ``MixtureModel.chat_inputs`` and of ``Engine.add_request``."""

    messages: Sequence[Mapping[str, str]]
    preference: str | Mapping[str, float] | None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """One way to answer under a preference.

    Attributes:
        name: on the command line and in files.
        label: in tables and figures.
        about: what it does, in a sentence.
        kind: what it is in the comparison.
        mixture: the mixture for a preference, () where it knows of none.
        request: what it asks of that.
        per_preference: False for a method that knows of no preference: its one answer to a prompt serves them all.
        one_mixture: whether all preferences have the same mixture.
    """

    name: str
    label: str
    about: str
    kind: Kind
    mixture: Callable[[Preference], ModelSpec]
    request: Callable[[Question], Request]
    per_preference: bool = True
    one_mixture: bool = True


def user(question: Question) -> list[dict[str, str]]:
    """The question as a conversation."""
    return [{"role": "user", "content": question.prompt}]


def all_methods(mixtures: Mixtures, without_bt: Path | None) -> tuple[list[Method], dict[str, str]]:
    """The methods that the artefacts allow, baselines first; and why others are missing, by name.

    Args:
        mixtures: of the artefacts.
        without_bt: directory of a PCM that was trained without Bradley-Terry normalisation; None: there is none.
    """
    config, pcm = mixtures.config, mixtures.directory / "pcm"
    learned = _pcm_methods(config, lambda _: mixtures.learned(pcm))
    methods = [*_baselines(mixtures), *_single_experts(mixtures), *learned]
    missing: dict[str, str] = {}
    if not pcm.is_dir():
        missing |= {method.name: f"there is no {pcm}" for method in learned}
    lacking = [p for p in config.evaluate.preferences if frozenset(p) not in mixtures.fixed_weights]
    if lacking:
        missing["fixed"] = f"there are no fixed weights for {'+'.join(lacking[0])} in {mixtures.directory}"
    if without_bt is None:
        missing["pcm-no-bt"] = "no PCM trained without Bradley-Terry normalisation was given"
    else:
        directory = without_bt
        methods.append(
            Method(
                name="pcm-no-bt",
                label="PCM, no Bradley-Terry",
                about="A PCM trained on plain rewards in place of the probability of beating the base.",
                kind="ablation",
                mixture=lambda _: mixtures.learned(directory),
                request=_alike,
            )
        )
    return [method for method in methods if method.name not in missing], missing


def _baselines(mixtures: Mixtures) -> list[Method]:
    return [
        Method(
            name=BASE,
            label="base",
            about="The base model as it is; it knows of no preference.",
            kind="baseline",
            mixture=lambda _: mixtures.plain(),
            request=partial(_weighed, {BASE: 1.0}),
            per_preference=False,
        ),
        Method(
            name="prompting",
            label="preference prompting",
            about="The base under the system prompts of the stated dimensions.",
            kind="baseline",
            mixture=lambda _: mixtures.plain(),
            request=partial(_prompted, mixtures.config),
        ),
        Method(
            name="soup",
            label="Personalized Soup",
            about="One adapter: the mean of the adapters of the stated dimensions.",
            kind="baseline",
            mixture=mixtures.soup,
            request=partial(_weighed, {"soup": 1.0}),
            one_mixture=False,
        ),
        Method(
            name="uniform",
            label="uniform mixture",
            about="The distributions of the experts of the stated dimensions, in equal parts.",
            kind="baseline",
            mixture=lambda _: mixtures.plain(),
            request=_alike,
        ),
        Method(
            name="fixed",
            label="best fixed weights",
            about="A mixture with weights that were learned for the preference, but are blind to the text.",
            kind="baseline",
            mixture=lambda _: mixtures.plain(),
            request=partial(_fixed, mixtures),
        ),
        Method(
            name="mod",
            label="MOD",
            about="The experts of the stated dimensions in equal parts, in log space (multi-objective decoding).",
            kind="baseline",
            mixture=lambda _: mixtures.plain(),
            request=partial(_alike, merge="log_linear"),
        ),
    ]


def _single_experts(mixtures: Mixtures) -> list[Method]:
    return [
        Method(
            name=f"expert-{name}",
            label=f"{name} expert",
            about=f"The {name} expert alone, whatever the preference.",
            kind="expert",
            mixture=lambda _: mixtures.plain(),
            request=partial(_weighed, {name: 1.0}),
            per_preference=False,
        )
        for name in mixtures.config.dimensions
    ]


def _pcm_methods(config: Config, mixture: Callable[[Preference], ModelSpec]) -> list[Method]:
    return [
        Method(
            name="pcm",
            label="PCM",
            about="The experts of the stated dimensions under the trained PCM, which is told the dimensions by name.",
            kind="pcm",
            mixture=mixture,
            request=_alike,
        ),
        Method(
            name="pcm-free-text",
            label="PCM, free text",
            about="All experts under the PCM, which has to find out from wordings it was not trained on what is meant.",
            kind="ablation",
            mixture=mixture,
            request=lambda question: Request(user(question), question.wording),
        ),
        Method(
            name="pcm-log",
            label="PCM, log space",
            about="The PCM's weights, but the experts are merged in log space.",
            kind="ablation",
            mixture=mixture,
            request=partial(_alike, merge="log_linear"),
        ),
        Method(
            name="pcm-per-prompt",
            label="PCM, weighed once",
            about="The PCM's weights for the first token, kept for the whole answer.",
            kind="ablation",
            mixture=mixture,
            request=partial(_alike, pcm_interval=config.evaluate.max_new_tokens),
        ),
    ]


def _prompted(config: Config, question: Question) -> Request:
    system = "\n".join(config.dimensions[name].system for name in question.preference)
    return Request([{"role": "system", "content": system}, *user(question)], {BASE: 1.0})


def _weighed(weights: Mapping[str, float], question: Question) -> Request:
    return Request(user(question), weights)


def _fixed(mixtures: Mixtures, question: Question) -> Request:
    return Request(user(question), mixtures.fixed_weights[frozenset(question.preference)])


def _alike(question: Question, **options: Any) -> Request:
    """The stated dimensions by name, none of them more than another."""
    return Request(user(question), dict.fromkeys(question.preference, 1.0), options=options)


def choose_methods(methods: Sequence[Method], missing: Mapping[str, str], patterns: Sequence[str]) -> list[Method]:
    """The methods that any of the patterns names, and the base; all if there is no pattern.

    Args:
        methods: those that there are.
        missing: why others are missing, by name.
        patterns: names, with "*" and "?" as in file names.

    Raises:
        ValueError: a pattern that names none.
    """
    names = [method.name for method in methods]
    chosen = {BASE}
    for pattern in patterns:
        matched = fnmatch.filter(names, pattern)
        if not matched:
            reason = f": {missing[pattern]}" if pattern in missing else f", and there are {', '.join(names)}"
            raise ValueError(f"methods: expected names of methods, got {pattern!r}{reason}")
        chosen |= set(matched)
    return [method for method in methods if not patterns or method.name in chosen]
