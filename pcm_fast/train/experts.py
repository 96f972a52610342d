"""Expert adapters: one for each dimension, each by preference optimisation on one pool of answers of the base."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.progress import Progress

from pcm_fast._version import __version__
from pcm_fast.loader import load_checkpoint
from pcm_fast.train.config import Config
from pcm_fast.train.pairs import Pair, choose_pairs
from pcm_fast.train.pool import draw_pool, pool_size

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
    checkpoint = load_checkpoint(config.base)
    assert checkpoint.tokenizer is not None  # the pool was drawn with it
    from pcm_fast.train.dpo import train_adapter

    for index, name in enumerate(config.dimensions):
        output = directory / "experts" / name
        if (only and name not in only) or (output / "adapter_model.safetensors").exists():
            continue
        expert = config.experts[name]
        pairs = choose_pairs(pool, rewards, name, expert)
        steps = max(1, round(len(pairs) * expert.epochs / expert.batch_size))
        task = progress.add_task(name, total=steps)

        def advance(step: int, figures: dict[str, float], task: int = task) -> None:
            progress.update(task, completed=step)  # type: ignore[arg-type]

        seed = config.seed + index
        where = work / "dpo" / name
        curve = train_adapter(checkpoint, checkpoint.tokenizer, pairs, expert, seed, where, output, advance)
        (output / "README.md").write_text(_card(config, name, pairs))
        (output / CURVE).write_text(json.dumps(curve, indent=0) + "\n")


def _card(config: Config, name: str, pairs: Sequence[Pair]) -> str:
    """The model card of an expert."""
    expert = config.experts[name]
    gap = np.mean([pair.gap for pair in pairs])
    counted = f", a nat a token of likelihood under the base counted as {expert.fluency:g} of them"
    return f"""---
base_model: {Path(config.base).name}
license: apache-2.0
library_name: peft
---

# {name}

A LoRA adapter (rank {expert.rank}, on {", ".join(expert.modules)}) that moves the base's answers towards *{name}*.
Trained by pcm-fast {__version__} with `pcm-fast train-experts`: direct preference optimisation on {len(pairs)} pairs of
answers that the base itself gave to our own prompts (CC0), plainly or under a system prompt (beta {expert.beta:g},
passes {expert.epochs:g}, learning rate {expert.learning_rate:g}, {expert.sft_weight:g} on the likelihood of the
chosen answers; the update times {expert.scale:g}).
In each pair the chosen answer scores higher on {name}: by {gap:.1f} standard deviations of the base's answers, on
average{counted if expert.fluency else ""}.

The reward is a proxy, a formula or a small classifier (`pcm_fast/train/scorers.py`), not a person's judgement. The base
is a small model: what it says may be wrong. How far the reward moved on held-out prompts, and what that cost in fluency
and in the other dimensions, is in the evaluation report.
"""
