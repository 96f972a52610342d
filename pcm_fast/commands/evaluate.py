"""``pcm-fast evaluate``: the PCM against other ways to merge preferences, on held-out prompts."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from contextlib import closing, nullcontext
from pathlib import Path

from rich.table import Table

from pcm_fast.commands import terminal

PACKAGES = ("httpx2", "matplotlib")


def run_evaluate(
    config: Path | None,
    artefacts: Path,
    out: Path,
    methods: Sequence[str],
    limit: int | None,
    without_bt: Path | None,
    threads: int | None,
    judge_url: str | None,
    judge_model: str | None,
    judge_key: str,
    judge_limit: int,
) -> None:
    """Evaluate, print who wins, and say where the report is.

    Args:
        config: a configuration; None: the shipped one.
        artefacts: directory of the trained artefacts.
        out: directory for all that is written.
        methods: names of methods, with "*" and "?"; none: all.
        limit: prompts at most.
        without_bt: a PCM trained without Bradley-Terry normalisation.
        threads: threads to compute on.
        judge_url, judge_model: endpoint and model of a judge; None: no judge.
        judge_key: name of the environment variable with the key of the endpoint; without a value none is sent.
        judge_limit: pairs of answers for each baseline.

    Raises:
        RuntimeError: the extra is not installed.
        ValueError: bad arguments, or files.
    """
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise RuntimeError(f"evaluate: {package} is not installed; expected pip install 'pcm-fast[train,evaluate]'")
    if (judge_url is None) != (judge_model is None):
        raise ValueError("judge-url, judge-model: expected both or neither, got one of them")
    from pcm_fast.evaluate.judge import Judge
    from pcm_fast.evaluate.run import evaluate
    from pcm_fast.train.config import load_config

    judge = None
    if judge_url is not None and judge_model is not None:
        judge = Judge(judge_url, judge_model, os.environ.get(judge_key) or None)
    with nullcontext() if judge is None else closing(judge), terminal.long_progress() as progress:
        results = evaluate(
            load_config(config),
            artefacts,
            out,
            progress,
            methods=methods,
            limit=limit,
            without_bt=without_bt,
            num_threads=threads,
            judge=judge,
            judge_limit=judge_limit,
        )
    console = terminal.output()
    table = Table(box=None, pad_edge=False, show_edge=False)
    table.add_column("method", no_wrap=True)
    for heading in ("wins, %", "95 % interval", "composite", "fluency", "tokens/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for method in results["methods"]:
        wins = method["average_win_rate"]
        table.add_row(
            method["label"],
            _number(wins["value"], 100, 1),
            f"{_number(wins['low'], 100, 1)} to {_number(wins['high'], 100, 1)}",
            _number(method["composite"]["value"], 1, 3),
            _number(method["fluency"]["value"], 1, 2),
            _number(method["tokens_per_second"], 1, 0),
        )
    console.print(table)
    for sentence in results["shortfalls"]:
        console.print(f"- {sentence}")
    console.print(f"Report: {out / 'report.html'}")


def _number(value: float | None, scale: float, digits: int) -> str:
    return "-" if value is None else f"{scale * value:.{digits}f}"
