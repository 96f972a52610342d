"""The commands that train, for ``cli.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigArgument = Annotated[
    Path | None,
    typer.Argument(help="A TOML file; without one, the package's own, for six dimensions.", show_default=False),
]
OutOption = Annotated[
    Path, typer.Option("--out", help="Directory for what is trained; a run that was cut off goes on.")
]


def train_experts(
    config: ConfigArgument = None,
    out: OutOption = Path("experts-out"),
    only: Annotated[list[str] | None, typer.Option("--only", help="A dimension; again for more. Default: all.")] = None,
) -> None:
    """Train an adapter for each dimension: draw answers, score them, prefer the better ones (DPO)."""
    from pcm_fast.commands import terminal

    with terminal.errors():
        from pcm_fast.train.config import load_config
        from pcm_fast.train.experts import train_experts as run

        chosen = load_config(config)
        with terminal.long_progress() as progress:
            run(chosen, out, only or [], progress)
    typer.echo(f"experts: {out / 'experts'}")


def train_pcm(
    config: ConfigArgument = None,
    out: OutOption = Path("experts-out"),
    name: Annotated[str, typer.Option("--name", help="Directory of the PCM inside of --out.")] = "pcm",
) -> None:
    """Train the PCM that weighs the experts (REBEL); they are read from --out, where train-experts left them."""
    from pcm_fast.commands import terminal

    with terminal.errors():
        from pcm_fast.train.config import load_config
        from pcm_fast.train.pcm import train_pcm as run

        chosen = load_config(config)
        with terminal.long_progress() as progress:
            run(chosen, out, name, progress)
    typer.echo(f"PCM: {out / name}")
