"""Draws docs/mixture.png: one answer, token by token, with the mixture weights and each expert's share of every token.

Needs matplotlib (``pip install -e .[evaluate]``). Run it by its path, from anywhere.
"""

import argparse
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from pcm_fast.commands.explain import Explanation, visible
from pcm_fast.model import MixtureModel
from pcm_fast.pcm import PCMContext
from pcm_fast.presets import prompted_experts

QUESTION = "Tell me about dogs."
EXPERTS = ("friendly", "elementary", "humorous")
COLOURS = ("#c06c9b", "#3a9bbf", "#e0b13a")
TOKENS = 44


def crossfade(context: PCMContext) -> dict[str, float]:
    """A PCM written by hand: friendly to begin with, elementary in the middle, humorous at the end."""
    at = context.step / (TOKENS - 1)
    raw = np.array([np.exp(-(((at - centre) / 0.22) ** 2)) for centre in (0.0, 0.5, 1.0)]) + 0.02
    return dict(zip(EXPERTS, (raw / raw.sum()).tolist(), strict=True))


def explain(model: MixtureModel) -> Explanation:
    output = model.generate(
        **model.chat_inputs(QUESTION),
        max_new_tokens=TOKENS,
        temperature=0.5,
        top_p=0.9,
        repetition_penalty=1.15,
        seed=3,
        return_dict_in_generate=True,
    )
    return Explanation.of(output, model.tokenizer)


def draw(explanation: Explanation, target: Path) -> None:
    places = np.arange(len(explanation.pieces))
    figure, axes = plt.subplots(2, 1, figsize=(12, 4.6), sharex=True, sharey=True, layout="constrained")
    panels = (
        ("weight of the expert,\nfrom the PCM", explanation.weights),
        ("share of the token\nthat came from the expert", explanation.shares),
    )
    for axis, (label, values) in zip(axes, panels, strict=True):
        bottom = np.zeros(len(places))
        for i, name in enumerate(explanation.names):
            axis.bar(places, values[:, i], 1.0, bottom, color=COLOURS[i], label=name, edgecolor="white", linewidth=0.4)
            bottom += values[:, i]
        axis.set_ylabel(label)
        axis.set_ylim(0, 1)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(ncols=len(EXPERTS), loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    axes[0].set_title(f"“{QUESTION}”", loc="right", fontsize=11)
    axes[1].set_xlim(-0.5, len(places) - 0.5)
    axes[1].set_xticks(
        places,
        [visible(piece).strip("·") for piece in explanation.pieces],
        rotation=60,
        ha="right",
        rotation_mode="anchor",
        fontsize=8,
    )
    figure.savefig(target, dpi=110, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", nargs="?", type=Path, default=Path(__file__).with_name("mixture.png"))
    target = parser.parse_args().target
    matplotlib.use("Agg")
    model = MixtureModel.from_pretrained(experts=prompted_experts(*EXPERTS), pcm=crossfade)
    explanation = explain(model)
    draw(explanation, target)
    print(explanation.text)


if __name__ == "__main__":
    main()
