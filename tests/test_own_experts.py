"""docs/your-own-experts.md, run from top to bottom on a tiny model."""

import re
import shlex
from pathlib import Path

import pytest
from tiny_chat import add_tokenizer
from typer.testing import CliRunner

from pcm_fast.cli import app

PAGE = (Path(__file__).parents[1] / "docs" / "your-own-experts.md").read_text(encoding="utf-8")
SMALLER = {
    'base = "smollm2-135m-instruct"': 'base = "{base}"\nfluency_margin = 3',
    "styled = 2": "styled = 1\nmax_new_tokens = 40",
    "pairs = 160": 'pairs = 4\nrank = 2\nmodules = ["q_proj"]',
    "iterations = 20": "iterations = 1\nprompts = 2\nwarm_start = 2\nlayers = 1\nmax_new_tokens = 8\nfixed_prompts = 1",
    'preferences = [["rhyming", "questioning"]]': 'preferences = [["rhyming", "questioning"]]\nmax_new_tokens = 8',
}


@pytest.fixture(scope="module")
def folder(make_tiny_model, tmp_path_factory):
    base = make_tiny_model("llama", max_position_embeddings=1024)
    add_tokenizer(base)
    folder = tmp_path_factory.mktemp("own")
    for name, text in re.findall(r"```\w+ file=(\S+)\n(.*?)```", PAGE, flags=re.DOTALL):
        if name == "config.toml":
            for old, new in SMALLER.items():
                assert text.count(old) == 1, old
                text = text.replace(old, new.format(base=base))
        (folder / name).write_text(text)
    return folder, base


def test_commands_and_python_run(folder, monkeypatch, capsys):
    directory, base = folder
    monkeypatch.chdir(directory)
    (commands,) = re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)
    for line in commands.replace("\\\n", " ").strip().splitlines():
        program, *arguments = shlex.split(line)
        assert program == "pcm-fast"
        if arguments[0] == "generate":
            arguments += ["--base", str(base), "-n", "4"]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
    assert (directory / "mine" / "report" / "report.md").exists()
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    capsys.readouterr()
    exec(code.replace("smollm2-135m-instruct", str(base)).replace("max_new_tokens=64", "max_new_tokens=4"), {})
    assert capsys.readouterr().out.strip()
