"""Merge the next-token distributions of K experts and draw a token for each row: one pass over the logits, no sort.

The rules are those of `pcm_fast.sampling`, to the last integer. Two launch shapes give the same answer:

* one program a row, in one launch (`mix_sample_row`), for batches that fill the chip;
* the vocabulary split over many programs a row, in 6 to 12 launches (`mix_sample_split`, `mix_sample_search`).

Nothing waits for the host, nothing is sorted, and what is added concurrently are integers, so both can be captured in a
CUDA graph, and a row's token depends neither on the launch shape nor on what else is in the batch.

The logits come from memory once. Their second and third look (normalisers, merge) find them in L2, of which a row needs
K * V numbers for one program and a batch B * K * V: 8 MB for 4 experts of 262,144 bfloat16 logits and 4 rows.
"""

from typing import NamedTuple

import torch

from .mix_sample_row import mix_sample_row
from .mix_sample_search import split_draw, split_first_digit, split_kept, split_top_k, split_top_p
from .mix_sample_split import INTEGERS, LANES, NUMBERS, split_masses, split_merge, split_temper, split_tops, split_total

MERGES = {"linear": 0, "log_linear": 1, "power": 2}
MAX_EXPERTS = 16
MAX_VOCABULARY = 1 << 20  # sums of masses stay under 2^62
MAX_SPLITS = LANES.value
BLOCK = 2048  # tokens that a program looks at together
WARPS = 8
NO_FUSION = {"enable_fp_fusion": False}  # a fused multiply-add would change the last bit, and so a token
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class MixSampled(NamedTuple):
    """What `mix_sample` gives. A row whose status is not 0 has token -1, and NaN elsewhere."""

    tokens: torch.Tensor  # [B] int64
    logprobs: torch.Tensor  # [B] float32: log p of the token, before temperature and truncation
    status: torch.Tensor  # [B] int32: 0; 1 for a NaN or +inf among the logits; 2 if no token is left
    expert_logprobs: torch.Tensor  # [B, K] float32: log p_i of the token, NaN for experts of weight 0; or [B, 0]


class Workspace(NamedTuple):
    """Memory that one call needs, and that the next may use again. It need not be set to anything."""

    numbers: torch.Tensor  # [B, NUMBERS] float32
    integers: torch.Tensor  # [B, INTEGERS] int64: histograms, and what each split found
    scratch: torch.Tensor  # [B, V] float32: merged log-probabilities, then masses

    @staticmethod
    def of(batch: int, vocabulary: int, device: torch.device | str) -> "Workspace":
        """Room for a batch of this many rows."""
        return Workspace(
            torch.empty(batch, NUMBERS.value, dtype=torch.float32, device=device),
            torch.empty(batch, INTEGERS.value, dtype=torch.int64, device=device),
            torch.empty(batch, vocabulary, dtype=torch.float32, device=device),
        )


def num_splits(batch: int, vocabulary: int, processors: int) -> int:
    """Programs a row: as many as the chip has room for, at least one block each; 1 is the launch shape by rows."""
    blocks = -(-vocabulary // BLOCK)
    return max(1, min(MAX_SPLITS, blocks, processors // max(batch, 1)))


def mix_sample(
    expert_logits: torch.Tensor,
    mixture_weights: torch.Tensor,
    *,
    seeds: torch.Tensor,
    sequences: torch.Tensor,
    positions: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
    merge: str = "linear",
    exponent: float = 1.0,
    return_expert_logprobs: bool = False,
    splits: int | None = None,
    block: int = BLOCK,
    workspace: Workspace | None = None,
) -> MixSampled:
    """Merge and draw one token for each row. All tensors are on one device; nothing is read back from it.

    Args:
        expert_logits: [B, K, V] float32, bfloat16 or float16, any strides; K <= 16, V <= 2^20.
        mixture_weights: [B, K] float32. The logits of an expert of weight 0 are not read.
        seeds, sequences, positions: [B] int64, the bits of the unsigned numbers of the specification.
        temperature: [B] float32; 0 takes the most likely token.
        top_k: [B] int32 or int64, 0 for no limit; None if no row has one.
        top_p, min_p: [B] float64 in [0, 1]; None if no row has one.
        merge: ``"linear"``, ``"log_linear"`` or ``"power"``, the last with its exponent.
        return_expert_logprobs: whether to give log p_i of the token.
        splits: programs a row; by default what fills the device. 1 is one launch with one program a row.
        block: tokens a program looks at together, a power of two.
        workspace: room of at least B rows, V wide; by default allocated here.
    """
    batch, experts, vocabulary = expert_logits.shape
    _check(expert_logits, mixture_weights, merge)
    device = expert_logits.device
    columns = {"temperature": (temperature, torch.float32), "top_p": (top_p, torch.float64)}
    columns |= {"min_p": (min_p, torch.float64), "seeds": (seeds, torch.int64)}
    columns |= {"sequences": (sequences, torch.int64), "positions": (positions, torch.int64)}
    for name, (column, dtype) in columns.items():
        if column is not None and (column.dtype != dtype or column.shape != (batch,) or not column.is_contiguous()):
            raise ValueError(
                f"{name}: expected a contiguous {dtype} [{batch}], got {column.dtype} {list(column.shape)}"
            )
    if splits is None:
        processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
        splits = num_splits(batch, vocabulary, processors)
    if not 1 <= splits <= MAX_SPLITS:
        raise ValueError(f"splits: expected 1 to {MAX_SPLITS}, got {splits}")
    room = workspace or Workspace.of(batch, vocabulary, device)
    results = MixSampled(
        torch.empty(batch, dtype=torch.int64, device=device),
        torch.empty(batch, dtype=torch.float32, device=device),
        torch.empty(batch, dtype=torch.int32, device=device),
        torch.empty(batch, experts if return_expert_logprobs else 0, dtype=torch.float32, device=device),
    )
    if batch == 0:
        return results

    logits = (expert_logits, *expert_logits.stride(), mixture_weights, *mixture_weights.stride())
    limits = (temperature, top_k, top_p, min_p)
    draws = (seeds, sequences, positions)
    numbers = (room.numbers, room.numbers.stride(0))
    integers = (room.integers, room.integers.stride(0))
    scratch = (room.scratch, room.scratch.stride(0))
    outputs = (results.tokens, results.logprobs, results.expert_logprobs, results.status)
    rule = {"K": experts, "MERGE": MERGES[merge]}
    by_k, by_p, by_min = {"TOP_K": top_k is not None}, {"TOP_P": top_p is not None}, {"MIN_P": min_p is not None}
    final = {**by_k, **by_p, **by_min}
    report = {"EXPERT_LOGPROBS": return_expert_logprobs}
    if splits == 1:
        how = {"BLOCK": block, "num_warps": WARPS, **NO_FUSION}
        mix_sample_row[(batch,)](
            *logits, exponent, *limits, *draws, *numbers, *integers, *scratch, *outputs, vocabulary,
            **rule, **final, **report, **how,
        )  # fmt: skip
        return results

    how = {"BLOCK": block, "num_warps": WARPS, **NO_FUSION}
    chunk = -(-vocabulary // (splits * block)) * block
    splits = -(-vocabulary // chunk)
    size = (vocabulary, chunk)
    grid = (batch, splits)
    split_tops[grid](*logits, *numbers, *integers, *size, K=experts, **how)
    split_masses[grid](*logits, *numbers, *integers, *size, K=experts, **how)
    split_merge[grid](*logits, exponent, *numbers, *integers, *scratch, *size, **rule, **how)
    if merge != "linear":
        split_total[grid](*numbers, *integers, *scratch, *size, **how)
    split_temper[grid](
        temperature, min_p, *numbers, *integers, *scratch, *size, MERGE=MERGES[merge], **by_min, **how
    )  # fmt: skip
    search = (*limits, *integers, *scratch, *size)
    if top_k is not None or top_p is not None:
        split_first_digit[grid](*search, **final, **how)
    if top_k is not None:
        for third in (False, True):
            split_top_k[grid](*search, **by_p, **by_min, THIRD=third, **how)
    if top_p is not None:
        for third in (False, True):
            split_top_p[grid](*search, **by_k, **by_min, THIRD=third, **how)
    split_kept[grid](*search, **final, **how)
    split_draw[(batch,)](
        *logits, exponent, *limits, *draws, *numbers, *integers, *scratch, *outputs, *size, splits,
        **rule, **final, **report, **how,
    )  # fmt: skip
    return results


def _check(expert_logits: torch.Tensor, mixture_weights: torch.Tensor, merge: str) -> None:
    batch, experts, vocabulary = expert_logits.shape
    if expert_logits.dtype not in DTYPES:
        raise TypeError(f"expert_logits: expected float32, bfloat16 or float16, got {expert_logits.dtype}")
    if not 1 <= experts <= MAX_EXPERTS:
        raise ValueError(f"expert_logits: expected 1 to {MAX_EXPERTS} experts, got {experts}")
    if not 1 <= vocabulary <= MAX_VOCABULARY:
        raise ValueError(f"expert_logits: expected a vocabulary of 1 to {MAX_VOCABULARY}, got {vocabulary}")
    if mixture_weights.shape != (batch, experts) or mixture_weights.dtype != torch.float32:
        raise ValueError(
            f"mixture_weights: expected float32 {[batch, experts]}, "
            f"got {mixture_weights.dtype} {list(mixture_weights.shape)}"
        )
    if merge not in MERGES:
        raise ValueError(f"merge: expected one of {', '.join(MERGES)}, got {merge!r}")
