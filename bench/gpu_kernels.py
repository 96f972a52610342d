"""The kernels on a device: what they compute against the oracle and torch, and how long they take for their bytes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from gpu_clock import Clock
from pcm_fast.kernels import adapters as adapter_kernels
from pcm_fast.kernels.attention import attention
from pcm_fast.kernels.mix_sample import Workspace, mix_sample, num_splits

from pcm_fast import sampling
from pcm_fast.backends.torch_kv import store_kv
from pcm_fast.sampling import SamplingParams

BLOCK_SIZE = 16
RULES = (("linear", 1.0), ("log_linear", 1.0), ("power", 0.5))


@dataclass(frozen=True)
class Call:
    """A kernel on data of a size.

    Attributes:
        name: of the kernel and the size.
        run: calls it.
        bytes: what it has to read and write at least.
    """

    name: str
    run: Callable[[], Any]
    bytes: int


def copy_bandwidth(clock: Clock, device: torch.device, megabytes: int) -> float:
    """Bytes a second, read and written, of a copy larger than any cache: what the kernels are held against."""
    source = torch.empty(megabytes << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / clock.seconds(lambda: target.copy_(source))


def correctness(device: torch.device, dry: bool) -> list[dict[str, Any]]:
    """A row for each kernel: cases, greatest difference, and whether that is well."""
    rows = [_mix_sample_against_oracle(device, dry, splits) for splits in (1, 3)]
    rows.append(_adapters_against_torch(device, dry))
    rows.append(_attention_against_torch(device, dry))
    return rows


def times(clock: Clock, device: torch.device, copied: float, dry: bool) -> list[dict[str, Any]]:
    """A row for each kernel and size; copied: bytes a second of a copy."""
    rows = []
    for call in _calls(device, dry):
        seconds = clock.seconds(call.run)
        rows.append(
            {
                "kernel": call.name,
                "us": seconds * 1e6,
                "MB at least": call.bytes / 1e6,
                "GB/s": call.bytes / seconds / 1e9,
                "share of copy bandwidth": call.bytes / seconds / copied,
            }
        )
    return rows


def _mix_sample_against_oracle(device: torch.device, dry: bool, splits: int) -> dict[str, Any]:
    """Tokens and log-probabilities must be the oracle's, bit by bit."""
    random = np.random.default_rng(splits)
    cases = tokens = bits = 0
    for vocabulary in (300, 1000) if dry else (1000, 49_152, 128_256):
        for rule, exponent in RULES:
            batch, experts = 2 if dry else 8, 4
            logits = (random.standard_normal((batch, experts, vocabulary)) * 4).astype(np.float32)
            weights = random.dirichlet(np.ones(experts), batch).astype(np.float32)
            params = [SamplingParams(top_k=k, top_p=p, seed=s) for s, (k, p) in enumerate([(0, 0.9), (40, 0.95)] * 4)]
            columns = draw_columns(params[:batch], device)
            drawn = mix_sample(
                torch.from_numpy(logits).to(device),
                torch.from_numpy(weights).to(device),
                merge=rule,
                exponent=exponent,
                splits=splits,
                block=256 if dry else 2048,
                **columns,
            )
            name = rule if rule != "power" else f"power({exponent})"
            for b in range(batch):
                expected = sampling.mix_sample(logits[b], weights[b], params[b], merge=name, sequence=b, position=7)
                cases += 1
                tokens += int(drawn.tokens[b]) == expected[0]
                bits += float(drawn.logprobs[b]) == expected[1]
    return _verdict(
        f"mix_sample, {splits} programs a row", cases, f"{tokens} tokens, {bits} log p", tokens == bits == cases
    )


def draw_columns(params: list[SamplingParams], device: torch.device) -> dict[str, torch.Tensor]:
    """Sampling parameters as mix_sample takes them; token 7 of sequences 0, 1, ..."""
    whole = partial(torch.tensor, dtype=torch.int64, device=device)
    limits = {"top_k": whole([p.top_k for p in params])} if any(p.top_k for p in params) else {}
    return {
        **limits,
        "seeds": whole([p.seed for p in params]),
        "sequences": whole(list(range(len(params)))),
        "positions": whole([7] * len(params)),
        "temperature": torch.tensor([p.temperature for p in params], dtype=torch.float32, device=device),
        "top_p": torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device),
    }


def _adapters_against_torch(device: torch.device, dry: bool) -> dict[str, Any]:
    random = torch.Generator().manual_seed(1)
    rows, width = (3, 100) if dry else (37, 4096)
    x, y = torch.randn(2, rows, width, generator=random).to(device).unbind()
    A, B = torch.randn(3, 16, width, generator=random), torch.randn(3, width, 16, generator=random)
    A, B = A.to(device) / width**0.5, B.to(device)
    adapter = (torch.arange(rows) % 4 - 1).to(device, torch.int32)
    expected = y.double()
    for n in range(3):
        mine = adapter == n
        expected[mine] += x[mine].double() @ A[n].double().T @ B[n].double().T
    adapter_kernels.expand(adapter_kernels.shrink(x, A, adapter, splits=2), B, adapter, y)
    greatest = float((y.double() - expected).abs().max() / expected.abs().max())
    return _verdict("shrink and expand", rows, f"{greatest:.1e} of the greatest", greatest < 2e-5)


def _attention_against_torch(device: torch.device, dry: bool) -> dict[str, Any]:
    lengths = [5, 33, 1, 16] if dry else [1000, 1, 16, 4097]
    queries, caches, tables, sizes = _context(lengths, 8, 2, 64, torch.float32, device)
    out = attention(queries, *caches, tables, sizes, scale=0.125, splits=3)
    greatest = 0.0
    for t, length in enumerate(lengths):
        keys, values = (
            cache[tables[t].long()].transpose(1, 2).flatten(0, 1)[:length].double().repeat_interleave(4, 1)
            for cache in caches
        )
        weights = torch.softmax(torch.einsum("hd,nhd->hn", queries[t].double(), keys) * 0.125, -1)
        expected = torch.einsum("hn,nhd->hd", weights, values)
        greatest = max(greatest, float((out[t].double() - expected).abs().max()))
    return _verdict("attention and store_kv", len(lengths), f"{greatest:.1e}", greatest < 1e-4)


def _context(
    lengths: list[int], heads: int, kv_heads: int, size: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Queries, filled caches, scattered block tables and lengths."""
    random = torch.Generator().manual_seed(2)
    width = -(-max(lengths) // BLOCK_SIZE)
    blocks = len(lengths) * width
    tables = torch.randperm(blocks, generator=random).view(len(lengths), width)
    caches = [torch.zeros(blocks + 1, kv_heads, BLOCK_SIZE, size, dtype=dtype, device=device) for _ in range(2)]
    places = torch.arange(width * BLOCK_SIZE)
    for table, length in zip(tables, lengths, strict=True):
        new = torch.randn(2, length, kv_heads, size, generator=random).to(device)
        slots = table[places[:length] // BLOCK_SIZE] * BLOCK_SIZE + places[:length] % BLOCK_SIZE
        store_kv(*new.unbind(), slots.to(device), *caches)
    queries = torch.randn(len(lengths), heads, size, generator=random).to(device, dtype)
    return queries, caches, tables.to(device, torch.int32), torch.tensor(lengths, dtype=torch.int32, device=device)


def _calls(device: torch.device, dry: bool) -> list[Call]:
    """Decode steps of a small and of a large model, batch 1 and more."""
    processors = 1 if dry else torch.cuda.get_device_properties(device).multi_processor_count
    dtype = torch.float32 if dry else torch.bfloat16
    calls = []
    for batch, experts, vocabulary in [(1, 2, 300)] if dry else [(1, 4, 49_152), (1, 4, 128_256), (32, 4, 128_256)]:
        logits = torch.randn(batch, experts, vocabulary, device=device)
        run = partial(
            mix_sample, logits, torch.full((batch, experts), 1 / experts, device=device),
            **draw_columns([SamplingParams(top_p=0.9)] * batch, device),
            splits=num_splits(batch, vocabulary, processors), block=128 if dry else 2048,
            workspace=Workspace.of(batch, vocabulary, device),
        )  # fmt: skip
        calls.append(Call(f"mix_sample, B={batch} K={experts} V={vocabulary:,}", run, logits.nbytes))
    for rows, width, rank in [(2, 64, 4)] if dry else [(5, 4096, 16), (160, 4096, 16)]:
        x = torch.randn(rows, width, device=device)
        A, B = (torch.randn(5, *shape, device=device, dtype=dtype) for shape in ((rank, width), (width, rank)))
        adapter = (torch.arange(rows) % 5).to(device, torch.int32)
        splits = max(1, min(adapter_kernels.MAX_SPLITS, processors // rows))
        y = torch.zeros_like(x)
        run = partial(_lora, x, A, B, adapter, y, splits)
        least = min(rows, 5) * (A[0].nbytes + B[0].nbytes) + 3 * x.nbytes
        calls.append(Call(f"shrink and expand, {rows} rows, {width}, rank {rank}", run, least))
    for rows, context in [(2, 20)] if dry else [(5, 4096), (160, 1024)]:
        queries, caches, tables, lengths = _context([context] * rows, 32, 8, 128, dtype, device)
        splits = max(1, min(64, 2 * processors // (rows * 8)))
        run = partial(attention, queries, *caches, tables, lengths, scale=0.1, splits=splits)
        least = 2 * rows * context * 8 * 128 * queries.element_size()
        calls.append(Call(f"attention, {rows} rows of {context} tokens", run, least))
    return calls


def _lora(
    x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, adapter: torch.Tensor, y: torch.Tensor, splits: int
) -> None:
    adapter_kernels.expand(adapter_kernels.shrink(x, A, adapter, splits=splits), B, adapter, y)


def _verdict(kernel: str, cases: int, found: str, well: bool) -> dict[str, Any]:
    return {"kernel": kernel, "cases": cases, "equal, or the greatest difference": found, "well": bool(well)}
