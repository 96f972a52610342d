"""The figures of the report, from the numbers in ``results.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

INK, PALE = "#222222", "#d8d8d8"
PCM_COLOUR = "#b2182b"
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#999933", "#882255", "#555555")
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "savefig.dpi": 160,
    "savefig.facecolor": "white",
}


def draw_figures(summary: Mapping[str, Any], directory: Path) -> dict[str, Path]:
    """Draw all figures that the numbers allow, as PNG files; their paths by name.

    Args:
        summary: what ``summarise`` gives.
        directory: for the files; made if need be.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figures = {"win_rates": win_rates(summary)}
        if sum(1 for name in summary["dimensions"] if name in _asked(summary["methods"][0])) >= 3:
            figures["rewards"] = reward_radar(summary)
        if "pcm" in summary["weights"]:
            figures["weights"] = mean_weights(summary)
            figures["weights_by_position"] = weights_by_position(summary)
        paths = {}
        for name, figure in figures.items():
            paths[name] = directory / f"{name}.png"
            figure.savefig(paths[name], bbox_inches="tight")
    return paths


def win_rates(summary: Mapping[str, Any]) -> Figure:
    """A matrix: how often the method of a row beats that of a column, with numbers."""
    names = summary["win_rates"]["methods"]
    labels = {method["name"]: method["label"] for method in summary["methods"]}
    values, low, high = (np.array(summary["win_rates"][end], dtype=float) for end in ("value", "low", "high"))
    size = 1.6 + 0.52 * len(names)
    figure = Figure(figsize=(size + 1.2, size))
    axes = figure.add_subplot()
    shown = np.ma.masked_where(np.eye(len(names), dtype=bool), values)
    axes.imshow(shown, cmap="RdBu", vmin=0, vmax=1)
    for i in range(len(names)):
        for j in range(len(names)):
            if i == j:
                continue
            clear = low[i, j] > 0.5 or high[i, j] < 0.5
            colour = "white" if abs(values[i, j] - 0.5) > 0.3 else INK
            weight = "bold" if clear else "normal"
            axes.text(j, i, f"{100 * values[i, j]:.0f}", ha="center", va="center", color=colour, weight=weight, size=8)
    axes.set_xticks(
        range(len(names)), [labels[name] for name in names], rotation=40, ha="right", rotation_mode="anchor"
    )
    axes.set_yticks(range(len(names)), [labels[name] for name in names])
    for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
        for tick, name in zip(ticks, names, strict=True):
            tick.set_fontweight("bold" if name == "pcm" else "normal")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def reward_radar(summary: Mapping[str, Any]) -> Figure:
    """Mean reward of each dimension where it was asked for: a line for each method that knows of preferences."""
    methods = [m for m in summary["methods"] if m["kind"] in ("baseline", "pcm")]
    names = [name for name in summary["dimensions"] if name in _asked(methods[0])]
    angles = np.linspace(0, 2 * np.pi, len(names), endpoint=False)
    figure = Figure(figsize=(6.4, 5.2))
    axes = figure.add_subplot(projection="polar")
    axes.set_theta_offset(np.pi / 2)  # type: ignore[attr-defined]
    axes.set_theta_direction(-1)  # type: ignore[attr-defined]
    for method, colour in zip(methods, _colours(len(methods)), strict=True):
        values = [_asked(method)[name]["mean"] for name in names]
        own = method["kind"] == "pcm"
        axes.plot(
            [*angles, angles[0]],
            [*values, values[0]],
            color=PCM_COLOUR if own else colour,
            linewidth=2.6 if own else 1.2,
            zorder=3 if own else 2,
            label=method["label"],
        )
    axes.set_xticks(angles, names)
    axes.tick_params(axis="x", pad=8)
    axes.grid(color=PALE)
    axes.spines["polar"].set_color(PALE)
    axes.legend(loc="upper left", bbox_to_anchor=(1.12, 1.0))
    return figure


def mean_weights(summary: Mapping[str, Any]) -> Figure:
    """How the PCM shares out its weight under each preference; the stated dimensions are outlined."""
    weights = summary["weights"].get("pcm-free-text", summary["weights"]["pcm"])
    experts, preferences = weights["experts"], summary["preferences"]
    table = np.array([[weights["overall"]["+".join(p)][name] for name in experts] for p in preferences])
    figure = Figure(figsize=(1.8 + 0.85 * len(experts), 1.0 + 0.42 * len(preferences)))
    axes = figure.add_subplot()
    axes.imshow(table, cmap="Greys", vmin=0, vmax=max(1.0, float(table.max())), aspect="auto")
    for i, preference in enumerate(preferences):
        for j, name in enumerate(experts):
            stated = name in preference
            colour = "white" if table[i, j] > 0.55 else INK
            axes.text(j, i, f"{table[i, j]:.2f}", ha="center", va="center", color=colour, size=8)
            if stated:
                frame = Rectangle((j - 0.46, i - 0.44), 0.92, 0.88, fill=False, edgecolor=PCM_COLOUR, linewidth=1.6)
                axes.add_patch(frame)
    axes.set_xticks(range(len(experts)), experts)
    axes.set_yticks(range(len(preferences)), [" + ".join(p) for p in preferences])
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def weights_by_position(summary: Mapping[str, Any]) -> Figure:
    """How the PCM's weights go over an answer: a small panel for each preference."""
    weights, preferences = summary["weights"]["pcm"], summary["preferences"]
    columns = min(4, len(preferences))
    rows = math.ceil(len(preferences) / columns)
    figure = Figure(figsize=(2.5 * columns + 0.4, 1.8 * rows + 0.7), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for panel, preference in zip(panels, preferences, strict=False):
        _panel(panel, weights["experts"], weights["by_position"]["+".join(preference)], preference)
    for panel in panels[len(preferences) :]:
        panel.set_visible(False)
    for panel in panels[::columns]:
        panel.set_ylabel("weight")
    figure.supxlabel("token of the answer", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(8, len(labels)))
    return figure


def _panel(panel: Axes, experts: Sequence[str], curves: Mapping[str, Sequence[float]], stated: Sequence[str]) -> None:
    for name, colour in zip(experts, _colours(len(experts)), strict=True):
        width = 2.0 if name in stated else 0.8
        panel.plot(range(1, len(curves[name]) + 1), curves[name], color=colour, linewidth=width, label=name)
    panel.set_title(" + ".join(stated), fontsize=8)
    panel.set_ylim(0, 1)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _asked(method: Mapping[str, Any]) -> Mapping[str, Any]:
    asked: Mapping[str, Any] = method["rewards_when_asked"]
    return asked
