"""What the README shows is run, and its table is the one of the result files."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_blocks_run(capsys):
    namespace = {}
    for block in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
        assert "max_new_tokens=64" in block
        exec(block.replace("max_new_tokens=64", "max_new_tokens=3"), namespace)
        assert capsys.readouterr().out.strip()
    assert namespace["inputs"].keys() == {"input_ids", "expert_input_ids", "pcm_input_ids"}
    assert namespace["output"].mixture_weights.shape[-1] == 3


def test_files_that_are_linked_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_the_benchmark_table_is_that_of_the_results():
    command = [sys.executable, str(ROOT / "bench" / "table.py"), "--check"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
