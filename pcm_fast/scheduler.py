"""Which sequences run, and what they read in the next step: admission, chunks of prompts, preemption.

Sequences run in order of arrival. One is admitted when there is room for its text and then for one more block for every
row; its text is then read in chunks beside the tokens of those that already answer. When blocks run out, the one that
came last gives its own back, and reads everything again when there is room. No token depends on any of this: a draw is
keyed by (seed, sequence, position), and what a row reads does not depend on who reads beside it.
"""

from __future__ import annotations

import bisect

from pcm_fast.kv_cache import OutOfBlocks
from pcm_fast.runner import Runner
from pcm_fast.sequence import Row, Sequence
from pcm_fast.step_plan import StepPlan

FEW = 16  # a sequence with no more unread tokens than this, beyond one a row, is read to its end at once


class Scheduler:
    """The queue of waiting sequences, and those that run.

    Attributes:
        waiting, running: in order of arrival.
        preemptions: how often a sequence had to give its rows back.
    """

    def __init__(self, runner: Runner, max_batch: int, prefill_chunk: int) -> None:
        self._runner = runner
        self._max_batch, self._prefill_chunk = max_batch, prefill_chunk
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._last: StepPlan | None = None  # the plan of the step before, if the same sequences still run

    def add(self, sequence: Sequence) -> None:
        """Put a sequence into the queue, where its arrival puts it."""
        bisect.insort(self.waiting, sequence, key=lambda other: other.order)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is, and free its rows."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        elif sequence in self.running:
            self.running.remove(sequence)
            self._free(sequence)

    def plan(self) -> StepPlan | None:
        """The next step, its slots reserved; None if there is nothing to do."""
        last, full = self._last, len(self.running) >= self._max_batch
        if last is not None and (full or not self.waiting) and (last.ahead > 0 or self._extend(last)):
            last.repeat()
            return last
        self._settle()
        if self.waiting and not full:
            self._admit()
        self._reserve()
        return self._choose() if self.running else None

    def commit(self, plan: StepPlan) -> None:
        """What a plan says has been read."""
        if plan is self._last:
            plan.lag += 1  # a repeated step is written down later, together with others
            return
        for reading in plan.readings:
            cache, tokens = self._runner.caches[reading.model], reading.tokens
            for row, start, count in reading.spans:
                cache.commit(row.slot, tokens[start : start + count])
                row.read += count
        if plan.steady:
            self._last = plan

    # --- Steps that repeat.

    def _extend(self, plan: StepPlan) -> bool:
        """Room for some more steps of a steady plan, to the end of a block where one begins; False if there is none."""
        self._write_down(plan)
        for reading in plan.readings:
            cache = self._runner.caches[reading.model]
            rows = [row for row, _, _ in reading.spans if row.reserved == row.read]
            counts = [cache.block_size - row.reserved % cache.block_size for row in rows]
            try:
                copies = cache.append_slots([row.slot for row in rows], counts)
            except OutOfBlocks:
                return False
            for row, count in zip(rows, counts, strict=True):
                row.reserved += count
            if copies:
                self._runner.copy_blocks(reading.model, copies)
        plan.extensions += 1
        plan.ahead = min(row.reserved - row.read for reading in plan.readings for row, _, _ in reading.spans)
        return True

    def _write_down(self, plan: StepPlan) -> None:
        """Commit what was read in repeated steps."""
        for reading, owners in zip(plan.readings, plan.owners if plan.lag else (), strict=False):
            cache = self._runner.caches[reading.model]
            for (row, _, _), owner in zip(reading.spans, owners, strict=True):
                cache.commit(row.slot, plan.draws[owner].slice(row, row.read, row.read + plan.lag))
                row.read += plan.lag
        plan.lag = 0

    def _settle(self) -> None:
        """No more repetitions: what runs, or what it has read, is about to change."""
        if self._last is not None:
            self._write_down(self._last)
            self._last = None

    # --- Room for the next tokens of those that run.

    def _reserve(self) -> None:
        """Slots for all that the running sequences read next; the youngest give way if there are not enough."""
        while not self._try_reserve():
            if len(self.running) == 1:
                raise RuntimeError("the only running sequence does not fit into the KV cache")  # Engine sees to that
            youngest = self.running[-1]
            self.running.remove(youngest)
            self._free(youngest)
            self.add(youngest)
            self.preemptions += 1

    def _try_reserve(self) -> bool:
        short: dict[int, list[tuple[Row, int]]] = {}
        for sequence in self.running:
            for row in sequence.due_rows():
                missing = row.read + sequence.unread(row) - row.reserved
                if missing > 0:
                    short.setdefault(row.reader.model, []).append((row, missing))
        for model, rows in short.items():
            try:
                copies = self._runner.caches[model].append_slots([row.slot for row, _ in rows], [n for _, n in rows])
            except OutOfBlocks:
                return False
            for row, missing in rows:
                row.reserved += missing
            if copies:
                self._runner.copy_blocks(model, copies)
        return True

    # --- Admission.

    def _admit(self) -> None:
        for sequence in list(self.waiting):
            if len(self.running) >= self._max_batch:
                return
            leader = sequence.leader
            if leader is not None and leader in self.running:
                if any(row.read < len(row.context) for row in leader.rows):
                    continue  # it reads the prompt for both
            else:
                leader = None
            if not self._fits(sequence, leader):
                return
            self.waiting.remove(sequence)
            self._start(sequence, leader)
            bisect.insort(self.running, sequence, key=lambda other: other.order)

    def _fits(self, sequence: Sequence, leader: Sequence | None) -> bool:
        """Whether there is room for a sequence's text and then for one more block for every row, unless it is alone."""
        sequence.restart()
        needed: dict[int, int] = {}
        if self.running:
            for row in (row for other in (*self.running, sequence) for row in other.rows):
                needed[row.reader.model] = needed.get(row.reader.model, 0) + 1
        for row in sequence.rows:
            cache = self._runner.caches[row.reader.model]
            blocks = -(-len(row.text) // cache.block_size)
            if leader is not None:
                blocks -= (len(row.context) - 1) // cache.block_size
            else:
                tokens, idle = cache.match_prefix(row.reader.namespace, row.text)
                blocks += idle - tokens // cache.block_size
            needed[row.reader.model] = needed.get(row.reader.model, 0) + blocks
        return all(count <= self._runner.caches[model].num_free() for model, count in needed.items())

    def _start(self, sequence: Sequence, leader: Sequence | None) -> None:
        for i, row in enumerate(sequence.rows):
            cache = self._runner.caches[row.reader.model]
            if leader is not None:  # all of the prompt less its last token, which leads to the first draw
                shared = leader.rows[i]
                cache.truncate(shared.slot, shared.read)
                shared.reserved = shared.read
                row.slot = cache.fork(shared.slot)
                cache.truncate(row.slot, len(row.context) - 1)
            else:
                row.slot = cache.create_row(row.reader.namespace, row.text)
            row.read = cache.length(row.slot)
            copies = cache.append_slots(row.slot, len(row.text) - row.read)
            row.reserved = len(row.text)
            if copies:
                self._runner.copy_blocks(row.reader.model, copies)

    def _free(self, sequence: Sequence) -> None:
        self._settle()
        for row in sequence.rows:
            if row.slot >= 0:
                self._runner.caches[row.reader.model].free(row.slot)
            row.slot, row.read, row.reserved = -1, 0, 0

    # --- What is read.

    def _choose(self) -> StepPlan:
        """All that have few unread tokens read them and draw; the rest of the step is shared out among the others."""
        plan = StepPlan()
        long: list[tuple[Sequence, tuple[Row, ...], list[int], int]] = []
        rest = self._prefill_chunk
        for sequence in self.running:
            rows = sequence.due_rows()
            unread = [sequence.unread(row) for row in rows]
            total = sum(unread)
            if total <= len(rows) + FEW:
                plan.read(sequence, rows, unread, draws=True)
                rest -= total
            else:
                long.append((sequence, rows, unread, total))
        # However many draw, prompts are read on: they would otherwise wait for the end of somebody's answer.
        shares = _shares([total for _, _, _, total in long], max(rest, self._prefill_chunk // 4, 1))
        for (sequence, rows, unread, total), share in zip(long, shares, strict=True):
            if share >= total - len(rows):
                plan.read(sequence, rows, unread, draws=True)
                continue
            # The last token of every row is read in the step of the draw, so that all hidden states come together.
            counts = []
            for count in unread:
                counts.append(min(count - 1, share))
                share -= counts[-1]
            plan.read(sequence, rows, counts, draws=False)
        plan.close()
        return plan


def _shares(totals: list[int], rest: int) -> list[int]:
    """`rest` tokens shared out evenly, what one does not need going to the others, the first ones first."""
    shares = []
    for i, total in enumerate(totals):
        share = min(total, -(-rest // (len(totals) - i)))
        shares.append(share)
        rest -= share
    for i, total in enumerate(totals):
        more = min(total - shares[i], rest)
        shares[i] += more
        rest -= more
    return shares
