"""What the commands share: where they print, what they show while the user waits, and how they fail."""

from __future__ import annotations

import contextlib
import sys
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from pcm_fast.model import MixtureModel

PLAIN_WIDTH = 200


def output() -> Console:
    """The console for results: colours and wrapped lines on a terminal, neither of them elsewhere."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, emoji=False, width=PLAIN_WIDTH, soft_wrap=True)
    return console


def plain(console: Console) -> bool:
    """Whether colours say nothing here."""
    return console.color_system is None or console.no_color


@contextlib.contextmanager
def errors() -> Iterator[None]:
    """What the user can put right becomes one line on stderr and exit code 1."""
    try:
        yield
    except BrokenPipeError:  # typer ends quietly
        raise
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        print(f"pcm-fast: {one_line(error)}", file=sys.stderr)
        raise typer.Exit(1) from None


def one_line(error: BaseException) -> str:
    """The message of an error, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def printable(text: str) -> str:
    """The text without control characters: what a model writes must not steer the user's terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


@contextlib.contextmanager
def progress(description: str, total: int | None) -> Iterator[Callable[[str | None], None]]:
    """A bar on stderr while something runs, gone afterwards; nothing if stderr is no terminal.

    Yields a function that advances the bar by one and, given a text, changes its description. Without a total the bar
    only moves.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text: None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda text: bar.update(task, advance=1, description=text)


def long_progress() -> Progress:
    """Bars on stderr that stay, with what is done and how long the rest will take; for work of minutes and hours."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


class TokenCount:
    """A streamer for ``generate`` that calls a function at every token; text is looked at later."""

    takes_arrays = True

    def __init__(self, advance: Callable[[str | None], None]) -> None:
        self._advance = advance
        self._prompt_seen = False

    def put(self, value: Any) -> None:
        """The prompt at the first call, then one token at each."""
        if self._prompt_seen:
            self._advance("writing")
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing is left to do."""


def load_model(base: str, experts: Any, pcm: Any, backend: str, weights: str, threads: int | None) -> MixtureModel:
    """``MixtureModel.from_pretrained``, with a bar that shows how far it is."""
    with progress("reading the base and its experts", 2) as advance:
        model = MixtureModel.from_pretrained(base, experts, pcm, backend, weights, threads)
        advance(f"starting the {model.backend} backend")
        if model.backend == "reference":
            _ = model.reference
        advance(None)
    return model
