"""Calls of every launcher as a decode step makes them, for what is compiled and counted without a GPU."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from pcm_fast.kernels.mix_sample import Workspace, mix_sample

META = torch.device("meta")


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor without memory."""
    return torch.empty(*shape, dtype=dtype, device=META)


def mix_sample_call(
    batch: int,
    experts: int,
    vocabulary: int,
    splits: int,
    merge: str = "linear",
    limits: tuple[str, ...] = ("top_p",),
    dtype: torch.dtype = torch.bfloat16,
    expert_logprobs: bool = False,
) -> Callable[[], Any]:
    """A call of mix_sample."""
    column = partial(tensor, batch)
    dtypes = {"top_k": torch.int64, "top_p": torch.float64, "min_p": torch.float64}
    return partial(
        mix_sample,
        tensor(batch, experts, vocabulary, dtype=dtype),
        tensor(batch, experts, dtype=torch.float32),
        merge=merge,
        exponent=0.5,
        temperature=column(dtype=torch.float32),
        **{name: column(dtype=torch.int64) for name in ("seeds", "sequences", "positions")},
        **{name: column(dtype=dtypes[name]) for name in limits},
        return_expert_logprobs=expert_logprobs,
        splits=splits,
        workspace=Workspace.of(batch, vocabulary, META),
    )


EVERY_LIMIT = ("top_k", "top_p", "min_p")
CASES: dict[str, Callable[[], Any]] = {
    "mix_sample, rows, linear, top-p": mix_sample_call(64, 4, 128_256, 1),
    "mix_sample, rows, power, K=16, all limits": mix_sample_call(
        64, 16, 49_152, 1, "power", EVERY_LIMIT, torch.float32, True
    ),
    "mix_sample, split, linear, top-p": mix_sample_call(1, 4, 128_256, 63),
    "mix_sample, split, log_linear, all limits": mix_sample_call(4, 8, 151_936, 33, "log_linear", EVERY_LIMIT),
    "mix_sample, split, power, K=16, all limits": mix_sample_call(
        1, 16, 49_152, 24, "power", EVERY_LIMIT, torch.float32, True
    ),
}
