"""What a PCM makes of wordings that it was not trained on: which expert leads, and by how much."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pcm_fast.model import MixtureModel
from pcm_fast.spec import ModelSpec
from pcm_fast.train.config import Config
from pcm_fast.train.drawing import draw
from pcm_fast.train.prompts import Prompt

TOKENS = 16  # of an answer, over which its weights are averaged


def read_wordings(
    config: Config,
    spec: ModelSpec,
    prompts: Sequence[Prompt],
    num_threads: int | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> list[dict[str, Any]]:
    """How often each dimension's expert has the greatest weight, where the preference is a held-out wording of it.

    All experts take part. Every wording comes with a prompt of its own, which is asked without a preference too.

    Args:
        config: for the wordings and how answers are drawn.
        spec: a mixture under a learned PCM.
        prompts: held-out ones; they are used again where there are fewer than wordings.
        num_threads: to compute on.
        advance: called with 1 for every answer.

    Returns:
        By dimension its name, the number of ``wordings``; the shares of them at which its expert ``leads``, and at
        which its weight is ``raised`` over that without a preference; the mean ``weight`` and that ``without`` a
        preference; and ``missed``: pairs of a wording and the expert that leads instead.
    """
    model = MixtureModel(spec, activations=config.activations, num_threads=num_threads)
    drawn = {"max_new_tokens": TOKENS, "temperature": config.evaluate.temperature, "top_p": config.evaluate.top_p}
    places = {
        name: [(i % len(prompts), wording) for i, wording in enumerate(dimension.held_out)]
        for name, dimension in config.dimensions.items()
    }
    wordings = [place for mine in places.values() for place in mine]
    asked = dict.fromkeys([*wordings, *((n, None) for n, _ in wordings)])
    requests = (
        (
            (n, preference),
            {
                **model.chat_inputs(prompts[n].text, preference=preference),
                "preference": preference,
                "seed": config.seed + n,
                **drawn,
            },
        )
        for n, preference in asked
    )
    weights = {}
    most = config.evaluate.max_batch
    for key, output, _ in draw(model.engine(max_batch=most), requests, 2 * most):
        weights[key] = output.mixture_weights[0, : int(output.lengths[0])].mean(axis=0)
        advance(1)
    rows = []
    for name, mine in places.items():
        column = model.expert_names.index(name)
        heard = np.stack([weights[place] for place in mine])
        plain = np.stack([weights[n, None] for n, _ in mine])
        leaders = heard.argmax(axis=1)
        rows.append(
            {
                "dimension": name,
                "wordings": len(mine),
                "leads": float((leaders == column).mean()),
                "raised": float((heard[:, column] > plain[:, column]).mean()),
                "weight": float(heard[:, column].mean()),
                "without": float(plain[:, column].mean()),
                "missed": [
                    [wording, model.expert_names[leader]]
                    for (_, wording), leader in zip(mine, leaders, strict=True)
                    if leader != column
                ],
            }
        )
    return rows


def count_wordings(config: Config) -> int:
    """How many answers ``read_wordings`` draws, if there are prompts enough."""
    held_out = [dimension.held_out for dimension in config.dimensions.values()]
    return sum(map(len, held_out)) + max(map(len, held_out))
