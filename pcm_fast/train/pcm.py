"""Training of a Preference Control Model: what it names first, then by REBEL what serves."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from safetensors.torch import load_file, save_file

from pcm_fast.adapter import WEIGHTS_NAME
from pcm_fast.loader import load_checkpoint
from pcm_fast.model import MixtureModel
from pcm_fast.pcm_file import save_pcm
from pcm_fast.train.config import Config
from pcm_fast.train.fixed_weights import find_fixed_weights, gains
from pcm_fast.train.policy import Policy
from pcm_fast.train.pool import Pool, draw_pool, pool_size
from pcm_fast.train.preferences import Stated, composites, state
from pcm_fast.train.rebel import Contest, update
from pcm_fast.train.reward import answer_rewards
from pcm_fast.train.rewards import Rewards
from pcm_fast.train.rollouts import Wish, draw_rollouts
from pcm_fast.train.warm_start import drawn_naming_loss, warm_start

CURVE = "curve.json"


def train_pcm(config: Config, directory: Path, name: str, progress: Progress) -> None:
    """Train a PCM for the experts in a directory, and write it there under a name; a run that was cut off goes on.

    First look for the best weights without a PCM (``fixed_weights.json``). The evaluation holds the PCM against them,
    and it starts from them: while it learns what preferences name, experts that have to be louder than their share are
    asked for as such. REBEL goes on from there.

    Args:
        config: the configuration.
        directory: what ``train_experts`` wrote, ``work/`` included.
        name: of the PCM's directory in it.
        progress: shows how far this is.

    Raises:
        ValueError: an expert is missing.
    """
    experts = {dimension: directory / "experts" / dimension for dimension in config.dimensions}
    for dimension, path in experts.items():
        if not (path / WEIGHTS_NAME).exists():
            raise ValueError(f"{path}: expected the expert for {dimension!r}; run train-experts with the same --out")
    task = progress.add_task("answers of the base", total=pool_size(config))
    pool, rewards = draw_pool(config, directory / "work", lambda count: progress.advance(task, count))
    torch.manual_seed(config.seed)
    policy = Policy(load_checkpoint(config.base), list(experts), config.pcm)
    training = Training(policy, directory / "work" / name)
    start = MixtureModel.from_pretrained(
        config.base, experts, policy.learned(training.directory), activations=config.activations
    )
    task = progress.add_task("best fixed weights", total=len(config.evaluate.preferences))
    known = find_fixed_weights(config, experts, pool, rewards, directory, lambda count: progress.advance(task, count))
    louder = gains(known, policy.experts)
    if training.iteration < 0:
        task = progress.add_task("what preferences name", total=config.pcm.warm_start)
        losses: list[float] = []

        def noted(loss: float, task: Any = task) -> None:
            losses.append(loss)
            progress.advance(task)

        warm_start(policy, start, pool, config, louder, noted)
        training.save(0, {"naming_loss": losses})
    alone = [(), *composites(config, (1,))]

    def named(chance: random.Random) -> torch.Tensor:
        return config.pcm.naming * drawn_naming_loss(policy, start, pool, config, louder, alone, chance)

    anchor = named if config.pcm.naming else None
    task = progress.add_task("REBEL", total=config.pcm.iterations, completed=training.iteration)
    while training.iteration < config.pcm.iterations:
        iteration = training.iteration + 1
        learned = policy.learned(training.directory)
        model = MixtureModel(replace(start.spec, pcm=learned), activations=config.activations)
        contests, figures = collect(config, model, pool, rewards, iteration)
        for epoch in range(config.pcm.epochs):
            seed = config.seed + 1000 * iteration + epoch
            loss = update(policy, training.optimizer, contests, config.pcm.eta, config.pcm.batch_size, seed, anchor)
            figures[f"loss_{epoch}"] = loss
        training.save(iteration, figures)
        progress.advance(task)
    save_pcm(policy.learned(training.directory), directory / name)
    (directory / name / CURVE).write_text(json.dumps(training.curve, indent=0) + "\n")
    (directory / name / "README.md").write_text(_card(config))


def collect(
    config: Config, model: MixtureModel, pool: Pool, rewards: Rewards, iteration: int
) -> tuple[list[Contest], dict[str, Any]]:
    """Draw answers to each of the round's prompts and preferences, and reward them."""
    chance = random.Random((config.seed, iteration).__repr__())
    sets = composites(config, (2, 3))
    prompts = list(dict.fromkeys(pool.prompt_ids))
    asked: list[tuple[str, Stated, tuple[int, ...]]] = []
    for _ in range(config.pcm.prompts):
        prompt, stated = chance.choice(prompts), state(config, chance.choice(sets), chance)
        others = [name for name in model.expert_names if name not in stated.strengths]
        taking_part = {*stated.strengths, *chance.sample(others, min(config.pcm.others, len(others)))}
        active = tuple(k for k, name in enumerate(model.expert_names) if name in taking_part)
        asked.append((prompt, stated, active))
    count = config.pcm.answers
    wishes = [
        Wish(
            pool.prompts[prompt].text,
            stated.text,
            tuple(model.expert_names[k] for k in active),
            chance.getrandbits(60),
        )
        for prompt, stated, active in asked
        for _ in range(count)
    ]
    rollouts = draw_rollouts(
        model,
        wishes,
        config.pcm.max_batch,
        max_new_tokens=config.pcm.max_new_tokens,
        temperature=config.pcm.temperature,
    )
    values = answer_rewards(
        pool,
        rewards,
        [prompt for prompt, _, _ in asked for _ in range(count)],
        [stated for _, stated, _ in asked for _ in range(count)],
        [rollout.text for rollout in rollouts],
        config.pcm.bradley_terry,
    )
    contests = []
    for i, (_, _, active) in enumerate(asked):
        mine = slice(i * count, (i + 1) * count)
        contests.append(Contest(tuple(rollouts[mine]), tuple(values[mine].tolist()), active))
    lengths = [len(rollout.tokens) for rollout in rollouts]
    return contests, {"reward": float(values.mean()), "tokens": float(np.mean(lengths))}


class Training:
    """A policy, its optimiser and how far they are, kept in a directory.

    Attributes:
        directory: where.
        policy: the PCM.
        optimizer: of its parameters.
        iteration: rounds done; 0 after the warm start, -1 before it.
        curve: the figures of each round.
    """

    def __init__(self, policy: Policy, directory: Path) -> None:
        self.directory, self.policy = directory, policy
        directory.mkdir(parents=True, exist_ok=True)
        self.optimizer = torch.optim.AdamW(policy.parameter_groups(), weight_decay=0.0)
        self.iteration, self.curve = -1, list[dict[str, Any]]()
        self._parameters = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        if (directory / "state.json").exists():
            self._load()

    def save(self, iteration: int, figures: dict[str, Any]) -> None:
        """Note that a round is done."""
        self.iteration = iteration
        self.curve.append({"iteration": iteration, **figures})
        tensors = {f"parameter/{name}": p.detach().contiguous() for name, p in self._parameters.items()}
        for name, p in self._parameters.items():
            for kind, value in self.optimizer.state[p].items():
                tensors[f"{kind}/{name}"] = value.detach().contiguous()
        save_file(tensors, self.directory / f"state-{iteration}.safetensors")
        new = {"iteration": iteration, "curve": self.curve}
        (self.directory / "state.json.part").write_text(json.dumps(new))
        (self.directory / "state.json.part").replace(self.directory / "state.json")
        for old in self.directory.glob("state-*.safetensors"):
            if old.name != f"state-{iteration}.safetensors":
                old.unlink()

    def _load(self) -> None:
        stored = json.loads((self.directory / "state.json").read_text())
        self.iteration, self.curve = stored["iteration"], stored["curve"]
        tensors = load_file(self.directory / f"state-{self.iteration}.safetensors")
        for name, p in self._parameters.items():
            p.data.copy_(tensors[f"parameter/{name}"])
            kinds = [key.partition("/")[0] for key in tensors if key.partition("/")[2] == name]
            self.optimizer.state[p] = {kind: tensors[f"{kind}/{name}"] for kind in kinds if kind != "parameter"}


def _card(config: Config) -> str:
    pcm = config.pcm
    anchored = f", naming kept at weight {pcm.naming:g}" if pcm.naming else ""
    return f"""---
base_model: {Path(config.base).name}
license: apache-2.0
---

# Preference Control Model

It reads a preference in words and the text so far, and gives a weight to each of the experts
{", ".join(config.dimensions)}. Kind: {pcm.kind}.

Trained by `pcm-fast train-pcm`: first to weigh the experts that a wording names, with gains that fit the best fixed
weights ({pcm.warm_start} steps), then by REBEL ({pcm.iterations} rounds of {pcm.prompts} prompts with {pcm.answers}
answers each, eta {pcm.eta:g}{anchored}). Rewards are proxies (`pcm_fast/train/scorers.py`).
`curve.json` has the mean reward of every round.
"""
