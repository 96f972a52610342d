"""The report: results.json as something to read, in HTML that stands alone and in Markdown."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from pcm_fast.evaluate.plots import draw_figures
from pcm_fast.evaluate.shortfalls import EFFECT, FLUENCY

TITLE = "Which way of merging experts serves a preference best?"


def write_report(results: Mapping[str, Any], directory: Path) -> None:
    """Write ``results.json``, ``figures/``, ``report.html`` and ``report.md``.

    Args:
        results: what ``evaluate`` returns.
        directory: for the files.
    """
    text = json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False)
    (directory / "results.json").write_text(text + "\n", encoding="utf-8")
    paths = draw_figures(results, directory / "figures")
    inlined = {name: base64.b64encode(path.read_bytes()).decode() for name, path in paths.items()}
    linked = {name: path.relative_to(directory).as_posix() for name, path in paths.items()}
    for name, figures in (("report.html", inlined), ("report.md", linked)):
        (directory / name).write_text(render(name, results, figures), encoding="utf-8")


def render(name: str, results: Mapping[str, Any], figures: Mapping[str, str]) -> str:
    """One report as text.

    Args:
        name: "report.html" or "report.md".
        results: what ``evaluate`` returns.
        figures: base64 or path of each figure, by name.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pcm_fast.evaluate", "."),
        autoescape=name.endswith(".html"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    methods = [
        {**method, "first_of_kind": i > 0 and method["kind"] != results["methods"][i - 1]["kind"]}
        for i, method in enumerate(results["methods"])
    ]
    return environment.get_template(f"{name}.j2").render(
        **{**results, "methods": methods},
        title=TITLE,
        headline=headline(results),
        setting=setting(results),
        bars={"effect": EFFECT, "fluency": FLUENCY},
        figures=figures,
    )


def headline(results: Mapping[str, Any]) -> str:
    """The main result, in a sentence or two."""
    rates = [(m["average_win_rate"]["value"], m) for m in results["methods"] if m["kind"] != "ablation"]
    ranked = sorted((entry for entry in rates if entry[0] is not None), key=lambda entry: -entry[0])
    if not ranked:
        return "Only the base was evaluated, so there is nothing to compare."
    own = next((entry for entry in ranked if entry[1]["kind"] == "pcm"), None)
    if own is None:
        return f"The PCM was not among the methods. The best of them, {_won(*ranked[0])}."
    best = next((entry for entry in ranked if entry is not own), None)
    return f"{_won(*own)}; the best other method, {_won(*best)}." if best else f"{_won(*own)}."


def _won(rate: float, method: Mapping[str, Any]) -> str:
    estimate = method["average_win_rate"]
    label = "The PCM" if method["kind"] == "pcm" else f"{method['label']},"
    interval = f"95 % interval {100 * estimate['low']:.1f} to {100 * estimate['high']:.1f}"
    return f"{label} wins {100 * rate:.1f} % of its comparisons on average ({interval})"


def setting(results: Mapping[str, Any]) -> str:
    """What was done, in a sentence or two."""
    conditions = results["conditions"]
    count, methods = len(results["preferences"]), len(results["methods"])
    return (
        f"{conditions['prompts']} held-out prompts under {count} composite preferences each, answered by {methods} "
        f"methods on {conditions['base']}: at most {conditions['max_new_tokens']} tokens, "
        f"temperature {conditions['temperature']:g}, top_p {conditions['top_p']:g}."
    )
