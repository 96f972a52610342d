"""The command that evaluates, for ``cli.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pcm_fast.presets import TRAINED


def evaluate(
    config: Annotated[
        Path | None,
        typer.Argument(
            help="The TOML file of the training; without one, the package's own.",
            show_default=False,
        ),
    ] = None,
    artefacts: Annotated[
        Path,
        typer.Option(
            "--artefacts",
            help="Directory that train-experts and train-pcm wrote. Default: what comes with the package.",
            show_default=False,
        ),
    ] = TRAINED,
    out: Annotated[
        Path, typer.Option("--out", help="Directory for answers and report; a run that was cut off goes on.")
    ] = Path("evaluation"),
    methods: Annotated[
        str, typer.Option("--methods", help="Names, or patterns such as 'pcm*', with commas. Default: all.")
    ] = "",
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="So many prompts at most.")] = None,
    without_bt: Annotated[
        Path | None,
        typer.Option("--without-bt", help="Directory of a PCM trained without Bradley-Terry, for that ablation."),
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Threads to compute on.")] = None,
    judge_url: Annotated[
        str | None, typer.Option("--judge-url", help="OpenAI-compatible endpoint of a judge, such as http://host/v1.")
    ] = None,
    judge_model: Annotated[str | None, typer.Option("--judge-model", help="Name of the judge's model there.")] = None,
    judge_key: Annotated[
        str, typer.Option("--judge-key", metavar="VARIABLE", help="Environment variable with the endpoint's key.")
    ] = "OPENAI_API_KEY",
    judge_limit: Annotated[
        int, typer.Option("--judge-limit", min=1, help="Pairs of answers to judge for each baseline, at most.")
    ] = 200,
) -> None:
    """Compare the PCM with other ways to merge preferences, on held-out prompts, and write a report."""
    from pcm_fast.commands import terminal
    from pcm_fast.commands.evaluate import run_evaluate

    with terminal.errors():
        patterns = [part.strip() for part in methods.split(",") if part.strip()]
        run_evaluate(
            config=config,
            artefacts=artefacts,
            out=out,
            methods=patterns,
            limit=limit,
            without_bt=without_bt,
            threads=threads,
            judge_url=judge_url,
            judge_model=judge_model,
            judge_key=judge_key,
            judge_limit=judge_limit,
        )
