"""Logs of results: they go on after a cut, and only under the same conditions."""

import json

import pytest

from pcm_fast.evaluate.log import JsonLog


@pytest.fixture
def path(tmp_path):
    return tmp_path / "made" / "log.jsonl"


def write(path, *records, **conditions):
    with JsonLog(path, conditions) as log:
        for record in records:
            log.append(record)
    return log.records


def test_it_goes_on_where_it_stopped(path):
    assert write(path, {"n": 1}, {"text": "a\u2028b\u0085\n"}, seed=1) == [{"n": 1}, {"text": "a\u2028b\u0085\n"}]
    assert write(path, {"n": 2}, seed=1) == [{"n": 1}, {"text": "a\u2028b\u0085\n"}, {"n": 2}]


def test_a_torn_line_is_dropped(path):
    write(path, {"n": 1}, {"n": 2}, seed=1)
    whole = path.read_bytes()
    path.write_bytes(whole + '{"text": "é'.encode()[:-1])
    assert write(path, {"n": 3}, seed=1) == [{"n": 1}, {"n": 2}, {"n": 3}]
    assert [json.loads(line) for line in path.read_text().splitlines()[1:]] == [{"n": 1}, {"n": 2}, {"n": 3}]


def test_a_torn_first_line(path):
    path.parent.mkdir()
    path.write_text('{"condi')
    assert write(path, {"n": 1}, seed=1) == [{"n": 1}]


def test_other_conditions_are_refused_by_name(path):
    write(path, {"n": 1}, seed=1, base="a")
    before = path.read_text()
    with pytest.raises(ValueError, match=r"log\.jsonl: expected results of the same seed, got others"):
        JsonLog(path, {"seed": 2, "base": "a"})
    assert path.read_text() == before


@pytest.mark.parametrize("text", ["not JSON\n", "[1]\n", '{"n": 1}\n'])
def test_other_files_are_refused(path, text):
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(ValueError, match=r"log\.jsonl"):
        JsonLog(path, {"seed": 2})
