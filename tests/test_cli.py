"""The console script as a user meets it: output, plain text, exit codes, errors on one line."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pcm_fast import __version__
from pcm_fast.cli import app

SCRIPT = Path(sys.executable).parent / "pcm-fast"
ESCAPE = "\x1b"


def run(*arguments, text=None, **environment):
    return subprocess.run(
        [SCRIPT, *arguments],
        input=text,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
        check=False,
    )


def test_help_names_every_command_and_imports_nothing_heavy():
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    for command in ("generate", "chat", "demo", "info", "evaluate"):
        assert command in result.output
    loaded = "import sys, pcm_fast.cli; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_generate_imports_neither_torch_nor_transformers():
    program = (
        "import sys; from pcm_fast.cli import main\n"
        "sys.argv = ['pcm-fast', 'generate', 'Hi', '--max-new-tokens', '2']\n"
        "try: main()\nexcept SystemExit: pass\n"
        "sys.exit(str([m for m in ('torch', 'transformers') if m in sys.modules]))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stderr.strip() == "[]"


def test_version_and_info():
    assert run("--version").stdout == f"pcm-fast {__version__}\n"
    result = run("info", "--base", "smollm2-135m-instruct", PCM_FAST_ISA="generic")
    assert result.returncode == 0
    assert re.search(r"kernels: cpu +available \(C\+\+, generic;", result.stdout)
    assert "134,515,008" in result.stdout


def test_generate_is_plain_text_when_not_on_a_terminal_and_reproducible():
    arguments = (
        "generate",
        "Tell me about dogs.",
        "-p",
        "concise=1,friendly=0.5",
        "--pcm",
        "named",
        "-n",
        "6",
        "--seed",
        "3",
        "--explain",
    )
    first, second = run(*arguments), run(*arguments)
    assert first.returncode == 0, first.stderr
    assert ESCAPE not in first.stdout + first.stderr
    answer = first.stdout.splitlines()[0]
    assert answer
    assert answer == second.stdout.splitlines()[0]
    assert re.search(r"concise +0\.67", first.stdout)
    assert re.search(r"friendly +0\.33", first.stdout)


def test_the_prompt_may_come_from_standard_input():
    piped = run("generate", "-", "-p", "concise", "-n", "4", "--greedy", text="Tell me about dogs.\n")
    given = run("generate", "Tell me about dogs.", "-p", "concise", "-n", "4", "--greedy")
    assert piped.returncode == given.returncode == 0
    assert piped.stdout == given.stdout != ""


def test_chat_answers_and_leaves():
    result = run("chat", "-p", "friendly", "-n", "4", text="Hello\n/quit\n")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["generate", "x", "-p", "gloomy", "--pcm", "named", "-n", "1"],
            1,
            "preference: 'gloomy' names none of the active experts",
        ),
        (["generate", "x", "-p", "gloomy=1", "-n", "1"], 1, "gloomy"),
        (["generate", "x", "--base", "nowhere.gguf"], 1, "nowhere.gguf: expected"),
        (["generate", "x", "--merge", "mean", "-p", "concise", "-n", "1"], 1, "merge: expected 'linear'"),
        (["info", "--base", "nowhere"], 1, "nowhere: expected"),
    ],
)
def test_errors_are_one_line_and_exit_with_1(arguments, code, message):
    result = run(*arguments)
    assert result.returncode == code
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [["generate", "x", "--temperature", "-1"], ["generate", "x", "--nonsense"], ["sing"], ["generate", "x", "-n", "0"]],
)
def test_wrong_usage_exits_with_2(arguments):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2


def test_a_model_directory_is_described(tiny_llama_dir):
    result = run("info", "--base", str(tiny_llama_dir))
    assert result.returncode == 0, result.stderr
    assert "llama" in result.stdout
