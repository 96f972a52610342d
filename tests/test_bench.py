"""bench_decode.py from end to end, so briefly that only the form of its results means anything."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

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
    assert [row["requests"] for row in result["batch"]] == [1, 32]
    assert all(memory["peak"] > memory["stored"] > 0 for memory in result["memory"].values())
