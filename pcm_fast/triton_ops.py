"""``ops.mix_sample`` and ``ops.sample`` by the Triton kernels: on a GPU, or on the CPU where triton interprets."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from pcm_fast.kernels import mix_sample as kernel
from pcm_fast.ops_arguments import Draws


class Drawn(NamedTuple):
    """What comes of it, on the logits' device, and the status of every row on the host."""

    tokens: torch.Tensor  # [B] int64
    logprobs: torch.Tensor  # [B] float32
    expert_logprobs: torch.Tensor  # [B, K] float32, or [B, 0]
    statuses: list[int]


def mix_sample(
    expert_logits: Any, weights: Any, kind: str, exponent: float, draws: Draws, return_expert_logprobs: bool
) -> Drawn:
    """Merge and draw.

    Args:
        expert_logits: [B, K, V], a tensor or an array.
        weights: [B, K] float32, an array.
        kind, exponent: the merge rule.
        draws: the checked parameters of ``ops``, each one value or [B].
        return_expert_logprobs: whether log p_i of the token are wanted.
    """
    logits = torch.as_tensor(expert_logits)
    batch = len(logits)

    def column(value: Any, dtype: Any, view: Any = None) -> torch.Tensor:
        array = np.ascontiguousarray(np.broadcast_to(np.asarray(value), batch), dtype)
        return torch.from_numpy(array.view(view or dtype).copy()).to(logits.device)

    sequence = np.arange(batch) if draws.sequence is None else draws.sequence
    limits = {"top_k": (np.int64, 0), "top_p": (np.float64, 1), "min_p": (np.float64, 0)}
    columns = {
        name: column(getattr(draws, name), dtype)
        for name, (dtype, none) in limits.items()
        if (np.asarray(getattr(draws, name)) != none).any()
    }
    drawn = kernel.mix_sample(
        logits,
        torch.from_numpy(weights).to(logits.device),
        seeds=column(draws.seed, np.uint64, np.int64),
        sequences=column(sequence, np.uint64, np.int64),
        positions=column(draws.position, np.uint64, np.int64),
        temperature=column(np.where(draws.greedy, 0.0, draws.temperature), np.float32),
        merge=kind,
        exponent=exponent,
        return_expert_logprobs=return_expert_logprobs,
        **columns,
    )
    return Drawn(drawn.tokens, drawn.logprobs, drawn.expert_logprobs, drawn.status.tolist())


def sample(log_probs: Any, draws: Draws) -> Drawn:
    """Draw from rows [B, V] as they are: a mixture of one expert, and the number at the token as it was given."""
    rows = torch.as_tensor(log_probs)
    drawn = mix_sample(rows[:, None], np.ones((len(rows), 1), np.float32), "linear", 1.0, draws, False)
    return drawn._replace(logprobs=rows.gather(1, drawn.tokens.clamp(min=0)[:, None])[:, 0].float())
