"""bench_decode.py from end to end, so briefly that only the form of its results means anything."""

import itertools
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from decode_batch import Request, in_engine
from table import tables

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    target = tmp_path_factory.mktemp("bench") / "decode.json"
    command = [sys.executable, ROOT / "bench" / "bench_decode.py", "--quick", "--output", target]
    run = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert run.returncode == 0, run.stderr
    assert target.with_suffix(".png").stat().st_size > 0
    result = json.loads(target.read_text(encoding="utf-8"))
    for line in result["skipped"]:
        assert line in run.stdout
    return result


def rows(result, name):
    return next(table["rows"] for table in result["tables"] if table["name"].startswith(name))


def test_every_decoder_has_a_row(result):
    decoders = {row["decoder"] for row in rows(result, "One token")}
    expected = {f"pcm-fast, {name} weights" for name in ("GGUF", "float32", "bfloat16", "8-bit")}
    expected |= {
        "pcm-fast, GGUF weights, rank 16 on all 7 sites",
        "pcm-fast, GGUF weights, 1 expert, no PCM",
        "reference decoder",
        "PEFT, adapters in turn",
        "PEFT, mixed batch",
    }
    assert expected <= decoders
    assert any(name.startswith("llama.cpp") for name in decoders) == (find_spec("llama_cpp") is not None)
    assert all(row["ms a token"] > 0 for row in rows(result, "One token"))


def test_every_target_has_a_line(result):
    targets = rows(result, "Targets")
    assert [row["measure"].partition(".")[0] for row in targets] == ["1", "2", "3", *"445678", "9", "10"]
    against_llama = {row["measure"] for row in targets if "llama.cpp" in row["measure"]}
    for row in targets:
        measured = row["measured"] is not None
        assert measured == (row["met"] in (True, False))
        assert measured or row["measure"] in against_llama
    assert bool(result["skipped"]) == (find_spec("llama_cpp") is None)


def test_what_the_plot_shows_is_there(result):
    assert {row["experts"] for row in result["experts"] if row["decoder"].startswith("pcm-fast")} == {1, 8}
    assert [row["requests"] for row in result["batch"]] == [1, 4]
    assert all(memory["peak"] > memory["stored"] > 0 for memory in result["memory"].values())


def test_the_tables_are_ready_for_the_readme(result, tmp_path):
    (tmp_path / "decode.json").write_text(json.dumps(result), encoding="utf-8")
    text = tables(tmp_path)
    assert text.count("**One token: 4 experts and a PCM (medians)**") == text.count("**Targets**") == 1


class ScriptedEngine:
    """Reads one prompt a step, and goes on meanwhile with those that are read."""

    def __init__(self):
        self.numbers, self.waiting, self.live = itertools.count(), [], []

    def add_request(self, input_ids, **options):
        self.waiting.append(next(self.numbers))
        return self.waiting[-1]

    def abort(self, request):
        self.live.remove(request)

    def step(self):
        if self.waiting:
            self.live.append(self.waiting.pop(0))
        return [SimpleNamespace(request_id=request) for request in self.live]


def test_requests_leave_an_engine_until_one_is_left():
    engine = ScriptedEngine()
    model = SimpleNamespace(engine=lambda max_batch: engine)
    steps = in_engine(model, [Request([1, 2], ("a",))] * 4, sizes=[4, 2, 1], tokens=3)
    assert {size: len(times) for size, times in steps.items()} == {4: 3, 2: 3, 1: 3}
    assert engine.live == []
