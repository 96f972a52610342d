"""Steps in which rows read any number of tokens: prompts in chunks, beside rows that read one. No static buffers."""

from __future__ import annotations

from collections.abc import Sequence as Items

import numpy as np
import torch
from torch.nn import functional

from pcm_fast import ops
from pcm_fast.backends import torch_ops
from pcm_fast.backends.torch_kv import DeviceKv, store_kv
from pcm_fast.backends.torch_model import TorchModel
from pcm_fast.backends.torch_models import TorchModels, pcm_weights
from pcm_fast.kv_cache import BLOCK_SIZE, KvCacheManager
from pcm_fast.step_arrays import StepArrays
from pcm_fast.step_plan import Reading

KINDS = {number: kind for kind, number in ops.MERGES.items()}


def read(
    models: TorchModels,
    caches: Items[KvCacheManager],
    kv: Items[DeviceKv],
    readings: Items[Reading],
    arrays: StepArrays,
) -> None:
    """Run the readings, then weigh, merge and draw as the arrays say, and fill in their results."""
    states = []
    for reading in readings:
        model = models.models[reading.model]
        attention = MixedAttention(model, reading, caches[reading.model], kv[reading.model])
        tokens, positions = (_tensor(x.astype(np.int64), models.device) for x in (reading.tokens, reading.positions))
        adapters = _tensor(reading.adapters, models.device)
        hidden = model.forward(tokens, positions, adapters, attention)
        states.append(model.final(hidden[_tensor(reading.wanted.astype(np.int64), models.device)]))
    if len(arrays.tokens):
        _weigh(models, states, arrays)
        logits = _logits(models, readings, states, arrays)
        _draw(models, logits, arrays)


class MixedAttention:
    """Attention of a reading: its tokens' keys and values are stored, then every row sees its own context."""

    def __init__(self, model: TorchModel, reading: Reading, cache: KvCacheManager, kv: DeviceKv) -> None:
        device = model.device
        tables, positions = cache.block_tables[reading.slots], reading.positions.astype(np.int64)
        blocks = tables[np.arange(len(positions)), positions // BLOCK_SIZE]
        self._model, self._kv = model, kv
        self._slots = _tensor(blocks * np.int64(BLOCK_SIZE) + positions % BLOCK_SIZE, device)
        single = np.array([start for _, start, count in reading.spans if count == 1], np.int64)
        used = -(-int(positions[single].max() + 1) // BLOCK_SIZE) if len(single) else 0
        self._single = _tensor(single, device)
        self._tables = _tensor(np.ascontiguousarray(tables[single, :used]), device)
        self._lengths = _tensor((positions[single] + 1).astype(np.int32), device)
        self._chunks = []
        for _, start, count in reading.spans:
            if count > 1:
                first = int(positions[start])
                row = tables[start, : -(-(first + count) // BLOCK_SIZE)].astype(np.int64)
                self._chunks.append((start, count, first, _tensor(row, device)))

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """[T, H, D] from queries [T, H, D], keys and values [T, Hkv, D]."""
        key_cache, value_cache = self._kv.layer(layer)
        store_kv(k, v, self._slots, key_cache, value_cache)
        scale, window = q.shape[-1] ** -0.5, self._model.window(layer)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        if len(self._single):
            queries = q[self._single].to(key_cache.dtype)
            out[self._single] = torch_ops.attention(
                queries, key_cache, value_cache, self._tables, self._lengths, scale, window
            ).to(q.dtype)
        group = q.shape[1] // k.shape[1]
        for start, count, first, blocks in self._chunks:
            end = first + count
            keys, values = (
                cache[blocks]
                .transpose(1, 2)
                .flatten(0, 1)[:end]
                .to(q.dtype)
                .repeat_interleave(group, 1)
                .transpose(0, 1)
                for cache in (key_cache, value_cache)
            )
            place = torch.arange(end, device=q.device)[None]
            token = torch.arange(first, end, device=q.device)[:, None]
            seen = place <= token
            if window:
                seen = seen & (place > token - window)
            queries = q[start : start + count].transpose(0, 1)
            mixed = functional.scaled_dot_product_attention(
                queries[None], keys[None], values[None], attn_mask=seen, scale=scale
            )
            out[start : start + count] = mixed[0].transpose(0, 1)
        return out


def _weigh(models: TorchModels, states: Items[torch.Tensor], arrays: StepArrays) -> None:
    """Have a learned PCM weigh the experts of the sequences whose state of it is there."""
    asking = np.flatnonzero(arrays.pcm[:, 0] >= 0)
    if len(asking) == 0:
        return
    assert models.head is not None
    reading = int(arrays.pcm[asking[0], 0])  # it reads with one model, so all its states are of one reading
    hidden = states[reading][_tensor(arrays.pcm[asking, 1].astype(np.int64), models.device)]
    rows = _tensor(arrays.head_rows[asking].astype(np.int64), models.device)
    present = _tensor(arrays.hidden[asking, :, 0] >= 0, models.device)
    arrays.weights[asking] = pcm_weights(hidden, models.head, rows, present).cpu().numpy()


def _logits(
    models: TorchModels, readings: Items[Reading], states: Items[torch.Tensor], arrays: StepArrays
) -> torch.Tensor:
    """Logits [S, R, V] of every expert of every sequence; what stands past a sequence's last expert is not set."""
    logits = torch.empty((*arrays.hidden.shape[:2], models.vocab_size), device=models.device)
    for index, reading in enumerate(readings):
        sequences, experts = np.nonzero(arrays.hidden[:, :, 0] == index)
        if len(sequences) == 0:
            continue
        states_of = arrays.hidden[sequences, experts, 1].astype(np.int64)
        rows = models.models[reading.model].logits(
            states[index][_tensor(states_of, models.device)],
            _tensor(reading.adapters[reading.wanted[states_of]], models.device),
        )
        logits[_tensor(sequences, models.device), _tensor(experts, models.device)] = rows
    return logits


def _draw(models: TorchModels, logits: torch.Tensor, arrays: StepArrays) -> None:
    """Draw for all that share a merge rule together, and hand out the logits of those that draw in Python."""
    arrays.statuses = [0] * len(arrays.tokens)
    groups: dict[tuple[int, float], list[int]] = {}
    for s, wanted in enumerate(arrays.logits):
        if wanted is None:
            groups.setdefault((int(arrays.merge[s]), float(arrays.exponent[s])), []).append(s)
        else:
            wanted[...] = logits[s, : len(wanted)].cpu().numpy()
    for (merge, exponent), sequences in groups.items():
        chosen = np.array(sequences)
        columns = draw_columns(arrays, chosen)
        drawn = torch_ops.mix_sample(
            logits if len(chosen) == len(logits) else logits[_tensor(chosen, models.device)],
            _tensor(arrays.weights[chosen], models.device),
            **{name: None if x is None else _tensor(x, models.device) for name, x in columns.items()},
            merge=KINDS[merge],
            exponent=exponent,
        )
        tokens, logprobs, status, expert_logprobs = (result.cpu().numpy() for result in drawn)
        arrays.tokens[chosen], arrays.logprobs[chosen] = tokens, logprobs
        arrays.expert_logprobs[chosen] = expert_logprobs
        for s, code in zip(sequences, status.tolist(), strict=True):
            arrays.statuses[s] = code


def draw_columns(arrays: StepArrays, chosen: np.ndarray) -> dict[str, np.ndarray | None]:
    """How some sequences draw, by the names of ``torch_ops.mix_sample``; None for a limit that none of them has."""
    top_k, top_p, min_p = (column[chosen] for column in (arrays.top_k, arrays.top_p, arrays.min_p))
    return {
        "seeds": arrays.seeds[chosen].view(np.int64),
        "sequences": arrays.sequences[chosen].view(np.int64),
        "positions": arrays.positions[chosen].view(np.int64),
        "temperature": np.where(arrays.greedy[chosen], np.float32(0), arrays.temperature[chosen]),
        "top_k": top_k if top_k.any() else None,
        "top_p": top_p if (top_p < 1).any() else None,
        "min_p": min_p if min_p.any() else None,
    }


def _tensor(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(array).to(device)
