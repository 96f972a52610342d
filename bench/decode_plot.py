"""Draws bench/results/decode.json: cost against experts, cost against requests, and the parts of a step.

`python bench/decode_plot.py` draws docs/decode.png anew from the results that are there.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

OURS, REFERENCE, FLOOR = "#c0392b", "#7f8c8d", "#2c6fbb"
PARTS = plt.get_cmap("tab20").colors


def draw(result: Mapping[str, Any], target: Path) -> None:
    """The panels that there are numbers for, side by side."""
    panels = [("experts", by_experts), ("batch", by_requests), ("parts", by_parts)]
    panels = [(name, panel) for name, panel in panels if result[name]]
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 4.2), layout="constrained", squeeze=False)
    for axis, (name, panel) in zip(axes[0], panels, strict=True):
        panel(axis, result[name])
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, dpi=110, metadata={"Software": None})
    plt.close(figure)


def by_experts(axis: Axes, rows: list[dict[str, Any]]) -> None:
    """Milliseconds a token against K."""
    for name in dict.fromkeys(row["decoder"] for row in rows):
        mine = [row for row in rows if row["decoder"] == name]
        costs = [row["ms a token"] for row in mine]
        if mine[0]["experts"] is None:
            axis.axhline(costs[0], color=FLOOR, linestyle="--", label=name)
            continue
        below = [row["ms a token"] - row["lowest"] for row in mine]
        above = [row["highest"] - row["ms a token"] for row in mine]
        colour = OURS if name.startswith("pcm-fast") else REFERENCE
        counts = [row["experts"] for row in mine]
        axis.errorbar(counts, costs, [below, above], marker="o", markersize=4, color=colour, capsize=2, label=name)
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.legend(fontsize=8, frameon=False)
    axis.set(xlabel="experts (and a PCM)", ylabel="ms a token", title="Cost against the number of experts")


def by_requests(axis: Axes, rows: list[dict[str, Any]]) -> None:
    """Milliseconds a token against the number of requests in the batch."""
    sizes, costs = [row["requests"] for row in rows], [row["ms a token"] for row in rows]
    axis.plot(sizes, costs, marker="o", markersize=4, color=OURS)
    for size, cost in zip(sizes, costs, strict=True):
        axis.annotate(f"{cost:.3g}", (size, cost), (0, 6), textcoords="offset points", ha="center", fontsize=8)
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.set_ylim(0, max(costs) * 1.15)
    axis.set(xlabel="requests at once (3 experts and a PCM each)", ylabel="ms a token", title="Cost against batch")


def by_parts(axis: Axes, rows: list[dict[str, Any]]) -> None:
    """A stacked bar for each candidate."""
    parts = list(dict.fromkeys(part for row in rows for part in row["parts (ms)"]))
    places = range(len(rows))
    bottom = [0.0] * len(rows)
    for part, colour in zip(parts, PARTS, strict=False):
        heights = [row["parts (ms)"].get(part, 0.0) for row in rows]
        axis.bar(places, heights, 0.7, bottom, color=colour, label=part)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    labels = [row["decoder"].removeprefix("pcm-fast, ").replace(", ", ",\n") for row in rows]
    axis.set_xticks(places, labels, rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
    axis.legend(fontsize=8, frameon=False, reverse=True, loc="upper left", bbox_to_anchor=(1, 1))
    axis.set(ylabel="ms a token", title="Parts of a step")


if __name__ == "__main__":
    here = Path(__file__).parent
    draw(json.loads((here / "results" / "decode.json").read_text("utf-8")), here.parent / "docs" / "decode.png")
