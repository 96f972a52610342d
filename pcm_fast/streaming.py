"""Text as it is generated: tokens in, pieces of text out, as a callback or as an iterator."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from pcm_fast.tokenizer import Tokenizer

_HALF_A_CHARACTER = "\N{REPLACEMENT CHARACTER}"


class TextStreamer:
    """A streamer for ``generate`` that gives text to a callback in pieces; joined, they are the decoded answer.

    A piece ends at the end of a character: bytes of a character that is not complete are kept back.

    Attributes:
        takes_arrays: that ``put`` is given NumPy arrays. Others get tensors, and torch takes seconds to import.
    """

    takes_arrays = True

    def __init__(self, tokenizer: Tokenizer, callback: Callable[[str], Any]) -> None:
        self._tokenizer = tokenizer
        self._callback = callback
        self._prompt_seen = False
        self._tokens: list[int] = []
        self._length = 0  # of the text given so far

    def put(self, value: Any) -> None:
        """The prompt [1, L] at the first call, then one token [1] at each."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self._tokens.extend(int(token) for token in np.asarray(value).ravel())
        text = self._tokenizer.decode(self._tokens)
        if not text.endswith(_HALF_A_CHARACTER):
            self._give(text)

    def end(self) -> None:
        """No more tokens: what was kept back is given."""
        self._give(self._tokenizer.decode(self._tokens))

    def _give(self, text: str) -> None:
        piece, self._length = text[self._length :], max(self._length, len(text))
        if piece:
            self._callback(piece)


class _Cancelled(Exception):  # noqa: N818 - a signal, no error
    pass


def iterate(produce: Callable[[Callable[[str], None]], Any]) -> Iterator[str]:
    """The pieces that ``produce(callback)`` passes to its callback, while it runs in a thread of its own.

    An exception of ``produce`` is raised here. An iterator that is closed early stops ``produce`` at its next piece.
    """
    pieces: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
    closed = threading.Event()

    def callback(piece: str) -> None:
        if closed.is_set():
            raise _Cancelled
        pieces.put(piece)

    def run() -> None:
        try:
            produce(callback)
            pieces.put(None)
        except BaseException as error:  # whatever it is, the thread that reads must not wait for ever
            pieces.put(error)

    thread = threading.Thread(target=run, name="pcm-fast-stream", daemon=True)
    thread.start()
    try:
        while (piece := pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece
    finally:
        closed.set()
        thread.join()


@contextlib.contextmanager
def streaming(streamer: Any, prompt: npt.NDArray[np.int64]) -> Iterator[Callable[[npt.NDArray[np.int64]], None]]:
    """A function that passes tokens [B] on to a streamer; the end is told to it whatever happens."""
    if streamer is None:
        yield lambda tokens: None
        return
    given: Callable[[npt.NDArray[np.int64]], Any] = np.asarray
    if not getattr(streamer, "takes_arrays", False):
        import torch

        given = torch.from_numpy
    try:
        streamer.put(given(prompt))
        yield lambda tokens: streamer.put(given(tokens))
    finally:
        streamer.end()
