"""Expert adapters: one for each dimension, each by preference optimisation on one pool of answers of the base."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.progress import Progress

from pcm_fast._version import __version__
from pcm_fast.adapter import WEIGHTS_NAME
from pcm_fast.loader import load_checkpoint
from pcm_fast.train.config import Config, ExpertConfig
from pcm_fast.train.pairs import Pair, choose_pairs
from pcm_fast.train.pool import Pool, draw_own, draw_pool, own_size, pool_size
from pcm_fast.train.rewards import Rewards

CURVE = "curve.json"


def train_experts(config: Config, directory: Path, only: Sequence[str], progress: Progress) -> None:
    """Train the experts that are not there yet.

    Writes ``rewards.json`` and ``experts/<dimension>/`` (PEFT adapter, model card, learning curve) into the directory,
    and what a run that was cut off goes on from into ``work/``.

    Args:
        config: the configuration.
        directory: made if it is not there.
        only: names of dimensions; none stands for all.
        progress: shows how far this is.

    Raises:
        ValueError: a name that is no dimension.
    """
    for name in only:
        if name not in config.dimensions:
            raise ValueError(f"only: expected names of dimensions ({', '.join(config.dimensions)}), got {name!r}")
    work = directory / "work"
    work.mkdir(parents=True, exist_ok=True)
    task = progress.add_task("answers of the base", total=pool_size(config))
    pool, rewards = draw_pool(config, work, lambda count: progress.advance(task, count))
    rewards.save(directory)
    for name in config.dimensions:
        if (not only or name in only) and not (directory / "experts" / name / WEIGHTS_NAME).exists():
            _train_expert(config, name, pool, rewards, directory, progress)


def _train_expert(config: Config, name: str, pool: Pool, rewards: Rewards, directory: Path, progress: Progress) -> None:
    """Train one expert on answers of the base and, if the configuration says so, then on its own."""
    from pcm_fast.train.dpo import train_adapter

    checkpoint = load_checkpoint(config.base)
    tokenizer = checkpoint.tokenizer
    assert tokenizer is not None  # the pool was drawn with it
    first_seed = config.seed + list(config.dimensions).index(name)
    work, output = directory / "work", directory / "experts" / name

    def learn(
        source: Pool, expert: ExpertConfig, label: str, seed: int, to: Path, start: Path | None = None
    ) -> list[Pair]:
        """Go through the pairs of a pool, unless that is done; those pairs."""
        pairs = choose_pairs(source, rewards, name, expert)
        if not (to / CURVE).exists():
            task = progress.add_task(label, total=max(1, round(len(pairs) * expert.epochs / expert.batch_size)))
            curve = train_adapter(
                checkpoint,
                tokenizer,
                pairs,
                expert,
                seed,
                work / "dpo" / label,
                to,
                lambda step, figures: progress.update(task, completed=step),
                start,
            )
            before = json.loads((start / CURVE).read_text()) if start else []
            (to / CURVE).write_text(json.dumps([*before, *curve], indent=0) + "\n")
        return pairs

    if name in config.again:
        first = work / "first" / name
        pairs = [learn(pool, config.experts[name], f"{name}-first", first_seed, first)]
        task = progress.add_task(f"answers of {name}", total=own_size(config, pool))
        file = work / f"answers-{name}.jsonl"
        own = draw_own(config, pool, rewards, first, file, lambda count: progress.advance(task, count))
        pairs.append(learn(own, config.again[name], name, first_seed + 10, output, first))
    else:
        pairs = [learn(pool, config.experts[name], name, first_seed, output)]
    (output / "README.md").write_text(_card(config, name, pairs))


def _card(config: Config, name: str, pairs: Sequence[Sequence[Pair]]) -> str:
    """The model card of an expert, given the pairs of each run."""
    first = config.experts[name]
    runs = [_run(first, pairs[0], "that the base itself gave, plainly or under a system prompt")]
    if name in config.again:
        runs.append(_run(config.again[name], pairs[1], "that the adapter itself gave, trained so far"))
    return f"""---
base_model: {Path(config.base).name}
license: apache-2.0
library_name: peft
---

# {name}

A LoRA adapter (rank {first.rank}, on {", ".join(first.modules)}) that moves the base's answers towards *{name}*.
Trained by pcm-fast {__version__} with `pcm-fast train-experts`: direct preference optimisation on pairs of answers to
our own prompts (CC0). The chosen one of each pair scores higher on {name}, by so many standard deviations of the base's
answers on average:

{chr(10).join(runs)}

The reward is a proxy, a formula or a small classifier (`pcm_fast/train/scorers.py`), not a person's judgement. The base
is a small model: what it says may be wrong. How far the reward moved on held-out prompts, and what that cost in fluency
and in the other dimensions, is in the evaluation report.
"""


def _run(expert: ExpertConfig, pairs: Sequence[Pair], whose: str) -> str:
    """One run of preference optimisation, in words."""
    gap = np.mean([pair.gap for pair in pairs])
    counted = f", a nat a token of likelihood under the base counted as {expert.fluency:g}" if expert.fluency else ""
    text = (
        f"- {len(pairs)} pairs of answers {whose}, apart by {gap:.1f}{counted}: beta {expert.beta:g}, passes "
        f"{expert.epochs:g}, learning rate {expert.learning_rate:g}, {expert.sft_weight:g} on the likelihood of the "
        f"chosen answers; the adapter times {expert.scale:g}."
    )
    return textwrap.fill(text, 120, subsequent_indent="  ")
