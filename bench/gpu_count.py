"""Counts what mix_sample reads, writes and launches, beside the minimum and the same in torch. Counted, not timed.

    python bench/gpu_count.py             fails if the table in docs/gpu.md is not what is counted
    python bench/gpu_count.py --update    writes it

One row runs in triton's interpreter while every load, store and atomic is counted; rows do not depend on each other, so
a batch is that many times as much. torch's operators are counted under a dispatch mode: what goes in and comes out of
each, which is less than a sort really moves.
"""

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
from pcm_fast.kernels.mix_sample import mix_sample, num_splits
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

PAGE = Path(__file__).parents[1] / "docs" / "gpu.md"
BEGIN, END = "<!-- count:begin -->\n", "<!-- count:end -->\n"
CASES = [(k, 49_152, 1) for k in (1, 2, 4, 8)] + [(4, v, b) for v in (128_256, 262_144) for b in (1, 8, 64)]
PROCESSORS = 132  # of the chip for which the launch shape is chosen: an H100
BANDWIDTH = {"A100": 2.04e12, "H100": 3.35e12, "B200": 8.0e12}  # bytes a second, from the data sheets
VIEWS = ("view", "expand", "slice", "unsqueeze", "squeeze", "select", "alias", "detach", "t", "transpose", "permute")


class Traffic:
    """Bytes that programs ask for, and launches, while it is entered."""

    def __init__(self, logits: torch.Tensor):
        self.logits = range(logits.data_ptr(), logits.data_ptr() + logits.numel() * logits.element_size())
        self.of_logits = self.other = self.launches = 0

    def _count(self, pointers: Any, mask: Any, size: int) -> None:
        asked = (
            np.broadcast_to(mask.data, pointers.data.shape) if mask is not None else np.ones(pointers.data.shape, bool)
        )
        if not asked.any():
            return
        first = int(pointers.data[asked].min())
        if first in self.logits:
            self.of_logits += int(asked.sum()) * size
        else:
            self.other += int(asked.sum()) * size

    def __enter__(self) -> "Traffic":
        builder = interpreter.InterpreterBuilder
        self.saved = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw
        load, store, atomic = self.saved
        self.launch = interpreter.GridExecutor.__call__

        def counted_load(self_: Any, pointers: Any, mask: Any, *more: Any) -> Any:
            self._count(pointers, mask, pointers.get_element_ty().primitive_bitwidth // 8)
            return load(self_, pointers, mask, *more)

        def counted_store(self_: Any, pointers: Any, value: Any, mask: Any, *more: Any) -> Any:
            self._count(pointers, mask, pointers.get_element_ty().primitive_bitwidth // 8)
            return store(self_, pointers, value, mask, *more)

        def counted_atomic(self_: Any, operation: Any, pointers: Any, value: Any, mask: Any, *more: Any) -> Any:
            self._count(pointers, mask, pointers.get_element_ty().primitive_bitwidth // 8)
            return atomic(self_, operation, pointers, value, mask, *more)

        def counted_launch(executor: Any, *values: Any, **named: Any) -> Any:
            self.launches += 1
            return self.launch(executor, *values, **named)

        builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
        builder.create_atomic_rmw = counted_atomic
        interpreter.GridExecutor.__call__ = counted_launch
        return self

    def __exit__(self, *_: object) -> None:
        builder = interpreter.InterpreterBuilder
        builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw = self.saved
        interpreter.GridExecutor.__call__ = self.launch


class Operators(TorchDispatchMode):
    """Bytes in and out of every operator that is not a view, and how many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one operator."""
        result = func(*args, **(kwargs or {}))
        if func._schema.name.split("::")[1].split(".")[0] not in VIEWS:
            tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
            self.bytes += sum(x.numel() * x.element_size() for x in tensors)
            self.launches += 1
        return result


def in_torch(logits: torch.Tensor, weights: torch.Tensor, top_p: float) -> torch.Tensor:
    """The same rule, composed: merge, sort, cut, draw."""
    log_p = torch.log_softmax(logits.float(), -1)
    merged = torch.logsumexp(log_p + weights.log()[:, :, None], 1)
    probabilities, order = torch.sort(torch.softmax(merged, -1), -1, descending=True)
    outside = probabilities.cumsum(-1) - probabilities >= top_p
    drawn = torch.multinomial(probabilities.masked_fill(outside, 0), 1)
    return order.gather(-1, drawn)


def count_row(experts: int, vocabulary: int, splits: int) -> Traffic:
    """One row of bfloat16 logits under top-p 0.9."""
    random = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(1, experts, vocabulary, generator=random)).bfloat16()
    whole = partial(torch.zeros, 1, dtype=torch.int64)
    with np.errstate(all="ignore"), Traffic(logits) as traffic:
        mix_sample(
            logits,
            torch.full((1, experts), 1 / experts),
            seeds=whole(),
            sequences=whole(),
            positions=whole(),
            temperature=torch.ones(1),
            top_p=torch.full((1,), 0.9, dtype=torch.float64),
            splits=splits,
            block=1 << 14,
        )
    return traffic


def table() -> str:
    """The table of docs/gpu.md."""
    chips = " | ".join(f"{chip} (us)" for chip in BANDWIDTH)
    lines = [
        "| K | V | rows | launches | logits, once (MB) | asked for: logits, other (MB) | torch: operators, MB | "
        f"computed: {chips} |",
        "|" + " ---: |" * (7 + len(BANDWIDTH)),
    ]
    for experts, vocabulary, batch in CASES:
        splits = num_splits(batch, vocabulary, PROCESSORS)
        row = count_row(experts, vocabulary, splits)
        once = batch * experts * vocabulary * 2
        with Operators() as operators:
            meta: Callable[..., torch.Tensor] = partial(torch.empty, device="meta")
            in_torch(meta(batch, experts, vocabulary, dtype=torch.bfloat16), meta(batch, experts), 0.9)
        megabytes = [f"{size / 1e6:.1f}" for size in (once, batch * row.of_logits, batch * row.other, operators.bytes)]
        times = [f"{once / speed * 1e6:.2f}" for speed in BANDWIDTH.values()]
        cells = [
            *map(str, (experts, f"{vocabulary:,}", batch, row.launches)),
            megabytes[0],
            f"{megabytes[1]}, {megabytes[2]}",
            f"{operators.launches}, {megabytes[3]}",
            *times,
        ]
        lines.append("| " + " | ".join(cells) + " |")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines) + "\n"


def main() -> int:
    """Count, and compare with the page or write it; 1 if they differ."""
    parser = argparse.ArgumentParser(description="Bytes and launches of mix_sample.")
    parser.add_argument("--update", action="store_true", help="write the table into docs/gpu.md")
    update = parser.parse_args().update
    counted, page = table(), PAGE.read_text()
    before, rest = page.split(BEGIN)
    new = before + BEGIN + counted + END + rest.split(END)[1]
    if update:
        PAGE.write_text(new)
    elif new != page:
        print("BREACH the table in docs/gpu.md is not what is counted (--update)")
        return 1
    print(f"gpu_count: {len(CASES)} cases")
    return 0


if __name__ == "__main__":
    sys.exit(main())
