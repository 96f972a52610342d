"""One step of an engine, written down: which rows read which tokens, and which sequences draw."""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Any

import numpy as np
import numpy.typing as npt

from pcm_fast.pcm import CallablePCM
from pcm_fast.sequence import Row, Sequence

Int32 = npt.NDArray[np.int32]


class Reading:
    """What one model reads in one step; n counts tokens. Tokens of one row stand together, in order of position.

    Attributes:
        model: index of the model.
        tokens, slots, positions, adapters: [n] int32; slots are rows of the block tables of the model's cache.
        wanted: [m] int32, the entries whose hidden states lead to a draw.
        spans: the rows that read, with the first entry and the number of entries of each.
    """

    def __init__(self, model: int) -> None:
        self.model = model
        self.spans: list[tuple[Row, int, int]] = []
        self._tokens: list[int] = []
        self._slots: list[int] = []
        self._positions: list[int] = []
        self._adapters: list[int] = []
        self._wanted: list[int] = []

    def add(self, row: Row, tokens: list[int], wanted: int) -> int:
        """Let a row read its next tokens; the states of the last `wanted` are. Returns the first one's index there."""
        self.spans.append((row, len(self._tokens), len(tokens)))
        self._tokens += tokens
        self._slots += [row.slot] * len(tokens)
        self._positions += range(row.read, row.read + len(tokens))
        self._adapters += [row.reader.adapter] * len(tokens)
        first = len(self._wanted)
        self._wanted += range(len(self._tokens) - wanted, len(self._tokens))
        return first

    def close(self) -> None:
        """Make the arrays; nothing is added afterwards."""
        self.tokens, self.slots, self.positions, self.adapters, self.wanted = (
            np.array(values, dtype=np.int32)
            for values in (self._tokens, self._slots, self._positions, self._adapters, self._wanted)
        )


class StepPlan:
    """A step.

    Attributes:
        readings: of every model that reads anything.
        draws: the sequences that are due a token.
        states: for each of them, (index of the reading, index among its wanted) of the hidden state of each of its
            experts, and last of the PCM if its weights are taken anew.
        steady: whether the next step is this one again, a token later, as long as the same sequences run.
        owners: of a steady plan, for each reading the index among the draws of each span's sequence.
        ahead: how often it can be repeated before its rows need more slots.
        extensions: how often its rows got more slots since it was made.
        lag: how often it was repeated since the KV cache was told what its rows have read.
        callables: the sequences that draw under weights of a callable PCM.
        prepared: what the runner keeps with it.
    """

    def __init__(self) -> None:
        self.readings: list[Reading] = []
        self.draws: list[Sequence] = []
        self.states: list[list[tuple[int, int]]] = []
        self.steady = True
        self.owners: list[list[int]] = []
        self.ahead = self.lag = self.extensions = 0
        self.callables: list[Sequence] = []
        self.prepared: Any = None
        self._index: dict[int, int] = {}

    def read(self, sequence: Sequence, rows: Items[Row], counts: Items[int], draws: bool) -> None:
        """Let rows of a sequence read their next tokens, and let it draw if they are then read to the end."""
        states = []
        for row, count in zip(rows, counts, strict=True):
            if count == 0:
                continue
            model = row.reader.model
            if model not in self._index:
                self._index[model] = len(self.readings)
                self.readings.append(Reading(model))
            index = self._index[model]
            tokens = sequence.slice(row, row.read, row.read + count)
            states.append((index, self.readings[index].add(row, tokens, wanted=int(draws))))
            self.steady = self.steady and count == 1
        if draws:
            self.draws.append(sequence)
            self.states.append(states)
        else:
            self.steady = False

    def close(self) -> None:
        """Make the arrays; nothing is added afterwards."""
        for reading in self.readings:
            reading.close()
        # While the text of one row goes on faster than that of another no step is like the one before.
        self.steady = self.steady and all(
            sequence.submission.request.options.pcm_interval == 1 or sequence.pcm is None for sequence in self.draws
        )
        self.callables = [
            sequence for sequence in self.draws if isinstance(sequence.submission.request.mixture.pcm, CallablePCM)
        ]
        if self.steady:
            owner = {id(row): i for i, sequence in enumerate(self.draws) for row in sequence.rows}
            self.owners = [[owner[id(row)] for row, _, _ in reading.spans] for reading in self.readings]

    def repeat(self) -> None:
        """A steady plan becomes that of the next step."""
        self.ahead -= 1
        # Item by item through a memoryview: a pass over the weights has driven NumPy's machinery out of all caches, and
        # three calls of it would take as long as the rest of the step's Python.
        for reading, owners in zip(self.readings, self.owners, strict=True):
            tokens, positions = reading.tokens.data, reading.positions.data
            for entry, owner in enumerate(owners):
                tokens[entry] = self.draws[owner].tokens[-1]
                positions[entry] += 1
