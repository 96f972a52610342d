"""bench/gpu.py from end to end without a GPU: that it runs, and that nobody can take its numbers for measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

GPU = Path(__file__).parents[2] / "bench" / "gpu.py"


def run(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"
    return subprocess.run(
        [sys.executable, GPU, *arguments], capture_output=True, text=True, env=environment, check=False
    )


def test_the_dry_run_reports_everything_and_says_that_it_is_dry(tmp_path):
    done = run("--dry", "--output", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert result["dry"]
    assert result["conditions"]["run"].startswith("DRY RUN")
    kernels, times, backend, tokens = (table["rows"] for table in result["tables"])
    assert all(table["name"].startswith("DRY RUN") for table in result["tables"])
    assert all(row["well"] for row in kernels)
    assert [row["well"] for row in backend] == [True, None]  # so short a text says nothing of rounded weights
    assert {row["kernel"].partition(",")[0] for row in times} == {"mix_sample", "shrink and expand", "attention"}
    assert {row["weights"] for row in backend} == {"float32", "bfloat16"}
    decoders = " ".join(row["decoder"] for row in tokens)
    assert all(name in decoders for name in ("no graphs", "reference", "PEFT, mixed batch", "PEFT, adapters in turn"))
    assert (tmp_path / "gpu.md").read_text(encoding="utf-8").startswith("# DRY RUN")


def test_it_asks_for_a_gpu_or_for_a_dry_run():
    done = run()
    assert done.returncode == 2
    assert "torch sees no GPU; --dry runs the code without one" in done.stderr
