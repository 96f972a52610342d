"""What ``train-experts``, ``train-pcm`` and ``evaluate`` are told: one TOML file, and one with the dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pcm_fast.train.dimensions import DATA, Dimension, read_dimensions
from pcm_fast.train.toml import none_left, read_toml, section, take


@dataclass(frozen=True)
class AnswerConfig:
    """The answers the experts learn from, drawn from the base.

    Attributes:
        prompts: how many of the training prompts; 0: all.
        plain: answers to each prompt as the base gives them.
        styled: answers to each prompt for each dimension, under one of its styles in turn.
        own: answers to each prompt by an expert that goes on to learn from its own.
        max_new_tokens, temperature, top_p: how they are drawn.
        max_batch: sequences that run at once.
    """

    prompts: int = 0
    plain: int = 4
    styled: int = 1
    own: int = 4
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 0.95
    max_batch: int = 48


@dataclass(frozen=True)
class ExpertConfig:
    """Direct preference optimisation of one LoRA adapter for each dimension (trl's DPOTrainer).

    Attributes:
        rank, alpha: of the adapter.
        modules: the sites it acts on.
        pairs: prompts to learn from at most, those with the greatest difference of reward first.
        rejected: the worse answer is the worst of "any" that were drawn in full; of those of them that are as fluent
            and as near to the prompt as the better one has to be ("alike"), so that nothing but the reward sets the two
            apart; or of the base's own ("plain").
        cut_short: whether the better answer may be one that was cut short on purpose, for another dimension.
        relevance: what a chosen answer loses for every standard deviation by which it is further from the prompt, by
            MiniLM, than the base's answers are.
        fluency: what a nat a token of an answer's likelihood under the base is worth, in standard deviations of the
            reward.
        learning_rate, beta, epochs, batch_size, warmup: of the optimiser and the loss.
        sft_weight: weight of the chosen answer's own likelihood in the loss.
        scale: what the trained update is multiplied by at the end; below 1, some of the reward is given up for answers
            that stay more fluent and nearer to the question.
    """

    rank: int = 8
    alpha: int = 16
    modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    pairs: int = 200
    rejected: str = "alike"
    cut_short: bool = True
    relevance: float = 0.5
    fluency: float = 0.0
    learning_rate: float = 2e-4
    beta: float = 0.1
    epochs: float = 1.0
    batch_size: int = 4
    warmup: float = 0.1
    sft_weight: float = 0.2
    scale: float = 1.0


@dataclass(frozen=True)
class PCMConfig:
    """REBEL for the Preference Control Model.

    Attributes:
        kind: "shared" (an adapter on the base) or "separate" (the model at ``model``).
        model: of a separate PCM, a Hugging Face directory with the base's vocabulary.
        rank, alpha, modules: of a shared PCM's adapter.
        layers: how many layers, counted from the last, the adapter acts on; 0: all. Layers below need no gradient.
        warm_start, warm_start_batch: steps, and answers in each, of learning what preferences name, before REBEL.
        warm_start_rate: the learning rates are so many times higher meanwhile, at first; they fall to nothing.
        iterations: rounds of rollouts and updates.
        prompts, answers: prompts with a preference each in every round, and answers that are drawn to each, two or
            more.
        others: experts beside those that the preference names that take part in an answer, drawn at random; the PCM has
            to learn not to listen to them.
        batch_size: prompts, with all their answers, in an update.
        epochs: passes over the answers of a round.
        learning_rate, head_learning_rate: of the adapter (or model) and of the head.
        eta: REBEL's: the loss is (difference of log-ratios - eta * difference of rewards)^2.
        naming: weight, beside this loss, of that of the warm start on single wishes and on no wish: what REBEL learns
            of wishes that compete shall not make the PCM deaf to one that is alone. 0: none.
        bradley_terry: normalise rewards against the base's answer; False takes their plain standard scores.
        max_new_tokens, temperature, max_batch: of the rollouts.
        fixed_prompts: prompts in each round of the search for the best fixed weights.
        template: the system turn of the PCM.
    """

    kind: str = "shared"
    model: str = ""
    rank: int = 8
    alpha: int = 16
    modules: tuple[str, ...] = ("q_proj", "v_proj")
    layers: int = 10
    warm_start: int = 300
    warm_start_batch: int = 16
    warm_start_rate: float = 12.0
    iterations: int = 20
    prompts: int = 16
    answers: int = 4
    others: int = 1
    batch_size: int = 4
    epochs: int = 2
    learning_rate: float = 1e-4
    head_learning_rate: float = 1e-3
    eta: float = 5.0
    naming: float = 1.0
    bradley_terry: bool = True
    max_new_tokens: int = 64
    temperature: float = 1.0
    max_batch: int = 32
    fixed_prompts: int = 24
    template: str = "The answer should be: {preference}"


@dataclass(frozen=True)
class EvaluateConfig:
    """The comparison with other ways to merge preferences.

    Attributes:
        prompts: file of the held-out prompts.
        num_prompts: how many of them; 0: all.
        preferences: composites of dimensions, two or more each.
        max_new_tokens, temperature, top_p, max_batch: how answers are drawn.
    """

    prompts: Path = DATA / "prompts_eval.jsonl"
    num_prompts: int = 0
    preferences: tuple[tuple[str, ...], ...] = ()
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    max_batch: int = 32


@dataclass(frozen=True)
class Config:
    """All of it.

    Attributes:
        path: the file this was read from.
        base: what ``MixtureModel.from_pretrained`` takes.
        prompts: file of the training prompts.
        dimensions: by name, in the order of the experts.
        compatible: pairs of dimensions that are asked for together.
        joins: sentences around a preference, with "{}".
        seed: of everything that is drawn.
        activations: "float32", or "int8" for a base in blocks, as ``MixtureModel`` takes it: faster, and less exact.
        fluency_margin: nats a token by which an answer may be less likely under the base than the base's own are on
            average; what is further off is not chosen to learn from, and loses reward.
        answers, pcm, evaluate: see there.
        experts: by dimension; what the file says under [experts], and for one of them under [experts.<dimension>].
        again: by dimension, for experts that go on to learn from answers of their own; what the file says under
            [experts.<dimension>.again], the rest as the first time.
    """

    path: Path
    base: str
    prompts: Path
    dimensions: Mapping[str, Dimension]
    compatible: tuple[tuple[str, str], ...]
    joins: tuple[str, ...]
    seed: int = 0
    activations: str = "float32"
    fluency_margin: float = 0.5
    experts: Mapping[str, ExpertConfig] = field(default_factory=dict)
    again: Mapping[str, ExpertConfig] = field(default_factory=dict)
    answers: AnswerConfig = field(default_factory=AnswerConfig)
    pcm: PCMConfig = field(default_factory=PCMConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


def load_config(path: str | Path | None = None) -> Config:
    """Read a configuration; None is the package's own, for six dimensions.

    Paths in it are relative to the file. ``dimensions`` names a TOML file with a table for each dimension (see
    ``Dimension``), ``compatible`` (default: every pair) and ``joins``.

    Raises:
        ValueError: a key that is missing, unknown or of the wrong kind; names file and key.
    """
    path = DATA / "default.toml" if path is None else Path(path)
    table = read_toml(path)
    here = path.parent
    dimensions_path = here / take(path, table, "dimensions", str, "dimensions.toml")
    dimensions, compatible, joins = read_dimensions(dimensions_path)
    prompts = here / take(path, table, "prompts", str, "prompts_train.jsonl")
    base = take(path, table, "base", str, "smollm2-135m-instruct")
    if (here / base).exists():
        base = str(here / base)
    seed = take(path, table, "seed", int, 0)
    activations = take(path, table, "activations", str, "float32")
    if activations not in ("float32", "int8"):
        raise ValueError(f"{path}: activations: expected 'float32' or 'int8', got {activations!r}")
    margin = float(take(path, table, "fluency_margin", (int, float), 0.5))
    evaluate = table.pop("evaluate", {})
    if isinstance(evaluate, dict) and "prompts" in evaluate:
        evaluate["prompts"] = here / str(evaluate["prompts"])
    experts, again = _experts(path, table.pop("experts", {}), dimensions)
    config = Config(
        path=path,
        base=base,
        prompts=prompts,
        dimensions=dimensions,
        compatible=compatible,
        joins=joins,
        seed=seed,
        activations=activations,
        fluency_margin=margin,
        answers=section(path, "answers", AnswerConfig, table.pop("answers", {})),
        experts=experts,
        again=again,
        pcm=section(path, "pcm", PCMConfig, table.pop("pcm", {})),
        evaluate=section(path, "evaluate", EvaluateConfig, evaluate),
    )
    none_left(path, table)
    for preference in config.evaluate.preferences:
        for name in preference:
            if name not in dimensions:
                raise ValueError(f"{path}: evaluate.preferences: expected names of dimensions, got {name!r}")
    if config.pcm.kind not in ("shared", "separate"):
        raise ValueError(f"{path}: pcm.kind: expected 'shared' or 'separate', got {config.pcm.kind!r}")
    if config.pcm.answers < 2:
        raise ValueError(f"{path}: pcm.answers: expected two or more, which are compared, got {config.pcm.answers}")
    if config.pcm.kind == "separate" and not config.pcm.model:
        raise ValueError(f"{path}: pcm.model: expected the directory of a model for a separate PCM, got none")
    return config


def _experts(
    path: Path, table: Any, dimensions: Mapping[str, Dimension]
) -> tuple[dict[str, ExpertConfig], dict[str, ExpertConfig]]:
    """How each expert is trained, and how those are that are trained again."""
    own = {name: table.pop(name) for name in dimensions if isinstance(table, dict) and name in table}
    common = _expert(path, "experts", ExpertConfig(), table)
    experts, again = {}, {}
    for name in dimensions:
        mine = own.get(name, {})
        later = mine.pop("again", None) if isinstance(mine, dict) else None
        experts[name] = _expert(path, f"experts.{name}", common, mine)
        if later is not None:
            again[name] = _expert(path, f"experts.{name}.again", experts[name], later)
            fixed = ("rank", "alpha", "modules")
            if any(getattr(again[name], key) != getattr(experts[name], key) for key in fixed):
                raise ValueError(f"{path}: experts.{name}.again: expected the adapter as it was, without {fixed}")
    return experts, again


def _expert(path: Path, where: str, common: ExpertConfig, table: Any) -> ExpertConfig:
    """What a table says, the rest as it is in common."""
    if not isinstance(table, dict):
        raise ValueError(f"{path}: {where}: expected a table, got {table!r}")
    values = {**asdict(common), "modules": list(common.modules), **table}
    expert: ExpertConfig = section(path, where, ExpertConfig, values)
    if expert.rejected not in ("alike", "any", "plain"):
        raise ValueError(f"{path}: {where}.rejected: expected 'alike', 'any' or 'plain', got {expert.rejected!r}")
    return expert
