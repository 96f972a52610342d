"""An evaluation from beginning to end: answers, scores, statistics, verdicts of a judge, report."""

from __future__ import annotations

import json
import platform
import random
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from pcm_fast import ops
from pcm_fast._version import __version__
from pcm_fast.evaluate import statistics
from pcm_fast.evaluate.answers import collect_answers
from pcm_fast.evaluate.judge import Comparison, Judge, judge_all
from pcm_fast.evaluate.methods import all_methods, choose_methods
from pcm_fast.evaluate.mixtures import BASE, Mixtures, Preference
from pcm_fast.evaluate.questions import ask, check_preferences
from pcm_fast.evaluate.report import write_report
from pcm_fast.evaluate.scores import lay_out, score_texts
from pcm_fast.evaluate.shortfalls import shortfalls
from pcm_fast.evaluate.summary import RESAMPLES, Result, estimate, plain, summarise
from pcm_fast.evaluate.wordings import count_wordings, read_wordings
from pcm_fast.train.config import Config
from pcm_fast.train.prompts import Prompt, load_prompts
from pcm_fast.train.rewards import FILE, Rewards

JUDGE_WORKERS = 8


def evaluate(
    config: Config,
    artefacts: Path,
    out: Path,
    progress: Progress,
    *,
    methods: Sequence[str] = (),
    limit: int | None = None,
    without_bt: Path | None = None,
    num_threads: int | None = None,
    judge: Judge | None = None,
    judge_limit: int = 200,
) -> dict[str, Any]:
    """Compare the methods, and write ``results.json``, ``report.html``, ``report.md`` and figures.

    Answers, scores and verdicts are kept in ``out`` as they come: a run that was cut off goes on where it stopped, and
    one with more methods or prompts draws only what is new.

    Args:
        config: what the artefacts were trained with.
        artefacts: their directory.
        out: directory for everything that is written; made if need be.
        progress: shows how far this is.
        methods: names of methods, with "*" and "?"; none: all that the artefacts allow. The base is always among them.
        limit: so many prompts at most; None leaves it to the configuration.
        without_bt: directory of a PCM that was trained without Bradley-Terry normalisation, for that ablation.
        num_threads: threads to compute on; None leaves it to the backend.
        judge: a language model that also compares the PCM with the baselines.
        judge_limit: pairs of answers that it compares for each baseline at most.

    Returns:
        What is in ``results.json``.

    Raises:
        ValueError, RuntimeError: something is missing, does not fit, or was drawn under other conditions.
    """
    preferences = check_preferences(config)
    prompts = load_prompts(config.evaluate.prompts, config.evaluate.num_prompts)[:limit]
    mixtures = Mixtures(config, artefacts)
    available, missing = all_methods(mixtures, without_bt)
    chosen = choose_methods(available, missing, methods)
    if judge is not None and not any(method.kind == "pcm" for method in chosen):
        raise ValueError(
            "judge-url: expected the PCM among the methods, since the judge compares it with the baselines"
        )
    rewards = Rewards.load(config, artefacts)
    scale = {
        "rewards": json.loads((artefacts / FILE).read_text(encoding="utf-8")),
        "scorers": {name: Path(dimension.reward).name for name, dimension in config.dimensions.items()},
        "fluency_margin": config.fluency_margin,
        "activations": config.activations,
    }
    results: dict[str, Result] = {}
    for method in chosen:
        questions = ask(method, prompts, preferences, config)
        advance = _bar(progress, method.label, len(questions))
        path = out / "answers" / f"{method.name}.jsonl"
        answers = collect_answers(method, questions, config, path, num_threads, advance)
        texts = [(question.prompt, answers.by_key[question.key].text) for question in questions]
        advance = _bar(progress, f"scoring {method.label}", len(texts))
        scored = score_texts(rewards, scale, texts, out / "scores.jsonl", advance)
        scores = lay_out(method, answers, scored, prompts, preferences, list(config.dimensions))
        results[method.name] = Result(method, answers, scores)
    summary = summarise(results, [prompt.id for prompt in prompts], preferences, list(config.dimensions), config.seed)
    left_out = {} if methods else missing
    wordings = []
    if "pcm-free-text" in results:
        advance = _bar(progress, "held-out wordings", count_wordings(config))
        mixture = results["pcm-free-text"].method.mixture(())
        wordings = read_wordings(config, mixture, prompts, num_threads, advance)
    outcome: dict[str, Any] = {
        "conditions": conditions(config, len(prompts), num_threads),
        **summary,
        "wordings": wordings,
        "judge": None,
        "examples": examples(summary, results, prompts, preferences),
        "shortfalls": shortfalls(summary, wordings, len(prompts), left_out),
    }
    if judge is not None:
        outcome["judge"] = judged(judge, judge_limit, results, prompts, preferences, config.seed, out, progress)
    results_file: dict[str, Any] = plain(outcome)
    write_report(results_file, out)
    return results_file


def _bar(progress: Progress, description: str, total: int) -> Callable[[int], None]:
    task = progress.add_task(description, total=total)
    return lambda count: progress.advance(task, count)


def conditions(config: Config, num_prompts: int, num_threads: int | None) -> dict[str, Any]:
    """Under what everything was measured."""
    evaluate = config.evaluate
    return {
        "pcm-fast": __version__,
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in ("numpy", "torch", "transformers", "tokenizers")},
        "machine": platform.machine(),
        "kernels": ops.isa(),
        "threads": ops.num_threads(num_threads),
        "configuration": config.path.name,
        "base": Path(config.base).name,
        "prompts": num_prompts,
        "prompts file": evaluate.prompts.name,
        "seed": config.seed,
        "activations": config.activations,
        "max_new_tokens": evaluate.max_new_tokens,
        "temperature": evaluate.temperature,
        "top_p": evaluate.top_p,
        "sequences at once": evaluate.max_batch,
        "bootstrap samples": RESAMPLES,
    }


def examples(
    summary: Mapping[str, Any],
    results: Mapping[str, Result],
    prompts: Sequence[Prompt],
    preferences: Sequence[Preference],
) -> list[dict[str, Any]]:
    """For each preference three answers side by side: the base's, the best baseline's and the PCM's.

    The prompt is the one at which the last of them has its median composite reward.
    """
    rates = {method["name"]: method["average_win_rate"]["value"] for method in summary["methods"]}
    baselines = [name for name, result in results.items() if result.method.kind == "baseline" and name != BASE]
    shown = [BASE, *sorted(baselines, key=lambda name: -rates[name])[:1], *(["pcm"] if "pcm" in results else [])]
    found = []
    for p, preference in enumerate(preferences):
        stated = [summary["dimensions"].index(name) for name in preference]
        before = results[BASE].scores.rewards[stated, :, p]
        rewards = {
            name: statistics.composite_reward(results[name].scores.rewards[stated, :, p], before) for name in shown
        }
        order = np.argsort(rewards[shown[-1]], kind="stable")
        n = int(order[len(order) // 2])
        answers = []
        for name in shown:
            result = results[name]
            answer = result.answers.by_key[prompts[n].id, "+".join(preference) if result.method.per_preference else ""]
            answers.append(
                {
                    "label": result.method.label,
                    "text": answer.text,
                    "wording": answer.wording,
                    "composite": float(rewards[name][n]),
                }
            )
        found.append({"preference": list(preference), "prompt": prompts[n].text, "answers": answers})
    return found


def judged(
    judge: Judge,
    limit: int,
    results: Mapping[str, Result],
    prompts: Sequence[Prompt],
    preferences: Sequence[Preference],
    seed: int,
    out: Path,
    progress: Progress,
) -> dict[str, Any]:
    """The PCM against each baseline, as a judge sees it, on questions that are drawn once for all of them."""
    grid = [(n, p) for n in range(len(prompts)) for p in range(len(preferences))]
    chosen = sorted(random.Random(seed).sample(grid, min(limit, len(grid))))
    opponents = [result for result in results.values() if result.method.kind == "baseline"]

    def comparison(opponent: Result, n: int, p: int) -> Comparison:
        prompt, preference = prompts[n], "+".join(preferences[p])
        other = opponent.answers.by_key[prompt.id, preference if opponent.method.per_preference else ""]
        own = results["pcm"].answers.by_key[prompt.id, preference]
        return Comparison("pcm", opponent.method.name, prompt.id, prompt.text, preference, own.text, other.text)

    asked = {opponent.method.name: {(n, p): comparison(opponent, n, p) for n, p in chosen} for opponent in opponents}
    comparisons = [entry for entries in asked.values() for entry in entries.values()]
    advance = _bar(progress, "judging", len(comparisons))
    scores, failures = judge_all(judge, comparisons, out / "verdicts.jsonl", seed, JUDGE_WORKERS, advance)
    shares = statistics.bootstrap_shares(len(prompts), RESAMPLES, seed)
    rows = []
    for opponent in opponents:
        values = np.full((len(prompts), len(preferences)), np.nan)
        for place, entry in asked[opponent.method.name].items():
            values[place] = scores.get(entry.key, np.nan)
        rows.append(
            {
                "name": opponent.method.name,
                "label": opponent.method.label,
                "win_rate": estimate(statistics.mean(values, shares)),
                "verdicts": int(np.isfinite(values).sum()),
                "ties": int((values == 0.5).sum()),
            }
        )
    return {
        "model": judge.model,
        "asked": len(comparisons),
        "failed": len(failures),
        "reasons": sorted(set(failures.values())),
        "rows": rows,
    }
