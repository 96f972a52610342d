import threading

import numpy as np
import pytest

from pcm_fast.streaming import TextStreamer, iterate

TEXTS = ["Tides rise and fall.", "Grüße, 你好, 👩‍🚀 and 🌊🌊!", " leading and trailing \n\n", "naïve <|im_end|> end"]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_decoded_text(embedded_checkpoint, text):
    tokenizer = embedded_checkpoint.tokenizer
    ids = tokenizer.encode(text)
    pieces = []
    streamer = TextStreamer(tokenizer, pieces.append)
    streamer.put(np.array([[1, 2, 3]]))  # the prompt
    for token in ids:
        streamer.put(np.array([token]))
    streamer.end()
    assert "".join(pieces) == tokenizer.decode(ids)
    assert all(pieces)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_half_a_character_is_given_at_the_end(embedded_checkpoint):
    tokenizer = embedded_checkpoint.tokenizer
    ids = tokenizer.encode("x🌊")[:-1]
    pieces = []
    streamer = TextStreamer(tokenizer, pieces.append)
    for value in ([[1]], *([token] for token in ids)):
        streamer.put(np.array(value))
    assert "".join(pieces) == "x"
    streamer.end()
    assert "".join(pieces) == tokenizer.decode(ids)


def test_iterate_gives_the_pieces():
    def produce(callback):
        for piece in "abc":
            callback(piece)

    assert list(iterate(produce)) == ["a", "b", "c"]


def test_iterate_raises_what_its_producer_raises():
    def produce(callback):
        callback("a")
        raise ValueError("the producer's own")

    iterator = iterate(produce)
    assert next(iterator) == "a"
    with pytest.raises(ValueError, match="the producer's own"):
        next(iterator)


def test_closing_early_stops_the_producer():
    stopped = threading.Event()

    def produce(callback):
        try:
            while True:
                callback("a")
        finally:
            stopped.set()

    iterator = iterate(produce)
    assert next(iterator) == "a"
    iterator.close()
    assert stopped.is_set()
