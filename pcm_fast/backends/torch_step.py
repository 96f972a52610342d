"""A decode step on static buffers: every row reads one token, every sequence draws one; what a CUDA graph captures.

The buffers of a batch bucket are allocated once. The host writes a plan into them; from then on the device goes on by
itself: what was drawn is what is read next, and ``torch_kv.advance`` moves the counters. What fills up the bucket reads
token 0, stores nothing, sees nothing and weighs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import NamedTuple

import numpy as np
import torch

from pcm_fast.backends import torch_ops
from pcm_fast.backends.torch_kv import GOING, STOPPED, DeviceKv, advance, store_kv
from pcm_fast.backends.torch_mixed import KINDS, draw_columns
from pcm_fast.backends.torch_model import TorchModel
from pcm_fast.backends.torch_models import TorchModels, pcm_weights
from pcm_fast.kv_cache import BLOCK_SIZE, KvCacheManager
from pcm_fast.step_arrays import StepArrays
from pcm_fast.step_plan import StepPlan


class StepShape(NamedTuple):
    """What a captured step is made for, besides its bucket.

    Attributes:
        columns: for each model, how many experts of a sequence read with it at most.
        merge, exponent: the merge rule.
        limits: those of "top_k", "top_p" and "min_p" that any sequence has.
    """

    columns: tuple[int, ...]
    merge: str
    exponent: float
    limits: tuple[str, ...]

    @staticmethod
    def of(plan: StepPlan, arrays: StepArrays, models: int) -> StepShape:
        """That of a plan whose sequences all merge by one rule."""
        columns = [0] * models
        for sequence in plan.draws:
            for model in range(models):
                count = sum(row.reader.model == model for row in sequence.experts)
                columns[model] = max(columns[model], count)
        drawn = draw_columns(arrays, np.arange(len(plan.draws)))
        limits = tuple(name for name in ("top_k", "top_p", "min_p") if drawn[name] is not None)
        return StepShape(tuple(columns), KINDS[int(arrays.merge[0])], float(arrays.exponent[0]), limits)


class StepBuffers:
    """All that a decode step of one shape and bucket reads and writes; as allocated, nothing goes on.

    The rows of all models stand together. Those of one model: column c of sequence s at s * columns + c, and at the end
    the PCM's of every sequence.

    Attributes:
        rows_of: where the rows of each model are.
        input_ids, positions, slots, lengths, sequence_of, capacities: [R], see ``torch_kv.advance``.
        adapters: [R] int32, -1 for none.
        tables: [R, .] int32, the blocks of each row.
        state, draw_positions, going, stop_tokens: see ``torch_kv.advance``.
        weights, seeds, sequences, temperature, top_k, top_p, min_p: [B], see ``torch_ops.mix_sample``.
        head_rows, present: [B, K], see ``torch_models.pcm_weights``.
        results: [B, 3 + 2 K] int32: token, status, and the bits of logprob, expert_logprobs and weights.
    """

    def __init__(self, shape: StepShape, bucket: int, models: TorchModels, width: int) -> None:
        """width: entries of a block table."""
        device, slots = models.device, sum(shape.columns)
        self.shape, self.bucket = shape, bucket

        def full(*size: int, value: float = 0, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.full(size, value, dtype=dtype, device=device)

        pcm = -1 if models.pcm is None else models.pcm.model
        counts = [bucket * (columns + int(model == pcm)) for model, columns in enumerate(shape.columns)]
        ends = np.cumsum(counts).tolist()
        self.rows_of = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]
        rows = ends[-1]
        self.input_ids, self.positions, self.slots = full(rows), full(rows), full(rows, value=-1)
        self.lengths, self.capacities = full(rows, dtype=torch.int32), full(rows, dtype=torch.int32)
        self.adapters = full(rows, value=-1, dtype=torch.int32)
        self.sequence_of = full(rows, value=-1, dtype=torch.int32)
        self.tables = full(rows, width, dtype=torch.int32)
        self.state = full(bucket, value=STOPPED, dtype=torch.int32)
        self.going = full(1, dtype=torch.int32)
        self.stop_tokens = full(bucket, 1, value=-1)
        self.seeds, self.sequences, self.draw_positions = full(bucket), full(bucket), full(bucket)
        self.temperature = full(bucket, value=1, dtype=torch.float32)
        self.top_k = full(bucket)
        self.top_p, self.min_p = (full(bucket, value=value, dtype=torch.float64) for value in (1, 0))
        self.weights = full(bucket, slots, dtype=torch.float32)
        self.head_rows, self.present = full(bucket, slots), full(bucket, slots, dtype=torch.bool)
        self.results = full(bucket, 3 + 2 * slots, dtype=torch.int32)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All of them by name."""
        return {name: tensor for name, tensor in vars(self).items() if isinstance(tensor, torch.Tensor)}

    def fill(self, plan: StepPlan, arrays: StepArrays, caches: Items[KvCacheManager]) -> None:
        """Write a plan into them: everything, since what was there before is that of other sequences."""
        self._entries = self._place_rows(plan)
        self._fill_draws(plan, arrays)
        size = len(self.input_ids)
        owners = {id(row): s for s, sequence in enumerate(plan.draws) for row in sequence.rows}
        sequence_of, adapters = np.full((2, size), -1, np.int32)
        lengths, capacities = np.zeros((2, size), np.int32)
        ids, positions = np.zeros((2, size), np.int64)
        for reading, entries in zip(plan.readings, self._entries, strict=True):
            sequence_of[entries] = [owners[id(row)] for row, _, _ in reading.spans]
            adapters[entries], ids[entries], positions[entries] = reading.adapters, reading.tokens, reading.positions
            lengths[entries] = reading.positions + 1
            capacities[entries] = self.tables.shape[1] * BLOCK_SIZE
        self._send("sequence_of", sequence_of)
        self._send("adapters", adapters)
        self._send("lengths", lengths)
        self._send("capacities", capacities)
        self._send("input_ids", ids)
        self._send("positions", positions)
        self.update_tables(plan, caches)

    def update_tables(self, plan: StepPlan, caches: Items[KvCacheManager]) -> None:
        """Take over the block tables, and the slots of the tokens that are read next: rows have got new blocks."""
        reserved = max(row.reserved for reading in plan.readings for row, _, _ in reading.spans)
        tables = np.zeros((len(self.slots), -(-reserved // BLOCK_SIZE)), np.int32)
        slots = np.full(len(self.slots), -1, np.int64)
        for reading, entries in zip(plan.readings, self._entries, strict=True):
            mine = caches[reading.model].block_tables[reading.slots, : tables.shape[1]]
            tables[entries, : mine.shape[1]] = mine
            positions = reading.positions.astype(np.int64)
            slots[entries] = tables[entries, positions // BLOCK_SIZE] * np.int64(BLOCK_SIZE) + positions % BLOCK_SIZE
        self.tables[:, : tables.shape[1]] = torch.from_numpy(tables).to(self.tables.device)
        self._send("slots", slots)

    def _place_rows(self, plan: StepPlan) -> list[list[int]]:
        """Where the rows of every reading go; notes which expert of its sequence each of the K slots is."""
        columns = self.shape.columns
        starts = np.cumsum([0, *columns]).tolist()
        self._experts = np.full((len(plan.draws), sum(columns)), -1, np.int64)
        place_of: dict[int, int] = {}
        for s, sequence in enumerate(plan.draws):
            taken = [0] * len(columns)
            for i, row in enumerate(sequence.experts):
                model = row.reader.model
                self._experts[s, starts[model] + taken[model]] = i
                place_of[id(row)] = self.rows_of[model].start + s * columns[model] + taken[model]
                taken[model] += 1
            if sequence.pcm is not None:
                model = sequence.pcm.reader.model
                place_of[id(sequence.pcm)] = self.rows_of[model].start + self.bucket * columns[model] + s
        return [[place_of[id(row)] for row, _, _ in reading.spans] for reading in plan.readings]

    def _fill_draws(self, plan: StepPlan, arrays: StepArrays) -> None:
        count = len(plan.draws)
        sequences, at = np.nonzero(self._experts >= 0)
        experts = self._experts[sequences, at]
        weights, head_rows = np.zeros(self.weights.shape, np.float32), np.zeros(self.weights.shape, np.int64)
        weights[sequences, at] = arrays.weights[sequences, experts]
        head_rows[sequences, at] = arrays.head_rows[sequences, experts]
        present = np.zeros(self.weights.shape, np.bool_)
        present[sequences, at] = True
        self._send("weights", weights)
        self._send("head_rows", head_rows)
        self._send("present", present)
        self._send("state", np.where(np.arange(self.bucket) < count, GOING, STOPPED).astype(np.int32))
        columns = draw_columns(arrays, np.arange(count))
        columns["draw_positions"] = columns.pop("positions")
        for name, values in columns.items():
            if values is not None:
                whole = np.zeros(self.bucket, values.dtype)
                whole[:count] = values
                self._send(name, whole)

    def _send(self, name: str, array: np.ndarray) -> None:
        buffer: torch.Tensor = getattr(self, name)
        sent = torch.from_numpy(array)
        assert sent.dtype == buffer.dtype, name
        buffer.copy_(sent.to(buffer.device))

    def take(self, arrays: StepArrays) -> None:
        """Bring the results of the step to the host, and into the arrays. Waits for the device."""
        count, slots = len(arrays.tokens), sum(self.shape.columns)
        results = self.results.cpu().numpy()[:count]
        arrays.tokens[:], arrays.statuses = results[:, 0], results[:, 1].tolist()
        floats = results.view(np.float32)
        arrays.logprobs[:] = floats[:, 2]
        sequences, at = np.nonzero(self._experts >= 0)
        experts = self._experts[sequences, at]
        arrays.expert_logprobs[sequences, experts] = floats[sequences, 3 + at]
        arrays.weights[sequences, experts] = floats[sequences, 3 + slots + at]


def decode_step(models: TorchModels, kv: Items[DeviceKv], buffers: StepBuffers) -> None:
    """Make the step that the buffers hold, and leave the next one there.

    Nothing is read back, and no shape depends on data, so that it can be captured.
    """
    shape, bucket = buffers.shape, buffers.bucket
    logits, weights = [], buffers.weights
    for index, (model, rows, columns) in enumerate(zip(models.models, buffers.rows_of, shape.columns, strict=True)):
        if rows.start == rows.stop:
            continue
        adapters = buffers.adapters[rows]
        attention = DecodeAttention(buffers, rows, model, kv[index])
        states = model.final(model.forward(buffers.input_ids[rows], buffers.positions[rows], adapters, attention))
        experts = bucket * columns
        if columns:
            logits.append(model.logits(states[:experts], adapters[:experts]).view(bucket, columns, -1))
        if models.pcm is not None and models.pcm.model == index:
            assert models.head is not None
            weights = pcm_weights(states[experts:], models.head, buffers.head_rows, buffers.present)
    limits = {name: getattr(buffers, name) if name in shape.limits else None for name in ("top_k", "top_p", "min_p")}
    tokens, logprobs, status, expert_logprobs = torch_ops.mix_sample(
        logits[0] if len(logits) == 1 else torch.cat(logits, 1),
        weights,
        buffers.seeds,
        buffers.sequences,
        buffers.draw_positions,
        buffers.temperature,
        merge=shape.merge,
        exponent=shape.exponent,
        **limits,
    )
    floats = (logprobs[:, None], expert_logprobs, weights)
    parts = [tokens[:, None].int(), status[:, None], *(x.view(torch.int32) for x in floats)]
    torch.cat(parts, 1, out=buffers.results)
    advance(
        tokens,
        buffers.stop_tokens,
        buffers.state,
        buffers.draw_positions,
        buffers.sequence_of,
        buffers.capacities,
        buffers.input_ids,
        buffers.positions,
        buffers.slots,
        buffers.lengths,
        buffers.tables,
        buffers.going,
    )


class DecodeAttention:
    """Attention of one new token for each of a model's rows."""

    def __init__(self, buffers: StepBuffers, rows: slice, model: TorchModel, kv: DeviceKv) -> None:
        self._slots, self._lengths, self._tables = buffers.slots[rows], buffers.lengths[rows], buffers.tables[rows]
        self._model, self._kv = model, kv

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """[R, H, D] from queries [R, H, D], keys and values [R, Hkv, D]."""
        key_cache, value_cache = self._kv.layer(layer)
        store_kv(k, v, self._slots, key_cache, value_cache)
        queries, window = q.to(key_cache.dtype).contiguous(), self._model.window(layer)
        scale = q.shape[-1] ** -0.5
        out: torch.Tensor = torch_ops.attention(
            queries, key_cache, value_cache, self._tables, self._lengths, scale, window
        )
        return out.to(q.dtype)
