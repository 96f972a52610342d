"""The command ``pcm-fast``. Nothing heavy is imported before a command needs it: ``--help`` and ``info`` are quick."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pcm_fast import cli_evaluation, cli_training
from pcm_fast._version import __version__
from pcm_fast.presets import TRAINED_BASE, prompted_experts, trained_experts, trained_pcm

if TYPE_CHECKING:
    from pcm_fast.model import MixtureModel
    from pcm_fast.preference import Preference

NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")

app = typer.Typer(
    name="pcm-fast",
    help="Several expert language models answer together; a preference says how much each has to say.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

BaseOption = Annotated[str, typer.Option("--base", help="Hugging Face directory, safetensors or GGUF file, or a name.")]
ExpertOption = Annotated[
    list[str] | None,
    typer.Option(
        "--expert",
        metavar="NAME[=SPEC]",
        help="An expert; give it again for more. SPEC is the path of an adapter or model, 'system:TEXT' for the base "
        "under a system prompt, or nothing after '=' for the base as it is. NAME alone is one of the trained experts "
        "helpful, concise, informative, friendly, humorous, elementary; with another base, one of the prompted experts "
        "concise, friendly, humorous, elementary. The default is all of these.",
    ),
]
PCMOption = Annotated[
    str | None,
    typer.Option(
        "--pcm",
        help="What turns the preference into weights: 'named' (names and strengths in it), 'uniform', fixed weights as "
        "name=weight,..., or the directory of a learned PCM. Default: the trained PCM where all experts are trained "
        "ones, otherwise 'named'.",
    ),
]
PreferenceOption = Annotated[
    str | None,
    typer.Option("--preference", "-p", help="In words ('concise and friendly'), or as name=strength,..."),
]
MergeOption = Annotated[str, typer.Option("--merge", help="linear, log_linear or 'power(a)'.")]
MaxNewTokensOption = Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Tokens of an answer at most.")]
TemperatureOption = Annotated[float, typer.Option("--temperature", min=0.0, help="0 takes the most likely token.")]
TopKOption = Annotated[int, typer.Option("--top-k", min=0, help="Draw among so many tokens; 0: all.")]
TopPOption = Annotated[float, typer.Option("--top-p", min=0.0, max=1.0, help="Draw among the likeliest of this mass.")]
MinPOption = Annotated[float, typer.Option("--min-p", min=0.0, max=1.0, help="Least probability, relative to the top.")]
RepetitionPenaltyOption = Annotated[
    float, typer.Option("--repetition-penalty", min=0.01, help="Above 1, tokens of the text so far become less likely.")
]
GreedyOption = Annotated[bool, typer.Option("--greedy", help="Always take the most likely token.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="The same seed draws the same answer.")]
BackendOption = Annotated[str, typer.Option("--backend", help="auto, reference, native or torch.")]
WeightsOption = Annotated[str, typer.Option("--weights", help="auto, float32, bfloat16, q8_0 or gguf.")]
ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, help="Threads to compute on.")]


def print_version(wanted: bool) -> None:
    """``--version``."""
    if wanted:
        typer.echo(f"pcm-fast {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Options of the command as a whole."""


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The prompt; '-' or nothing reads it from standard input.")] = "-",
    base: BaseOption = TRAINED_BASE,
    expert: ExpertOption = None,
    pcm: PCMOption = None,
    preference: PreferenceOption = None,
    merge: MergeOption = "linear",
    max_new_tokens: MaxNewTokensOption = 128,
    temperature: TemperatureOption = 0.7,
    top_k: TopKOption = 0,
    top_p: TopPOption = 0.95,
    min_p: MinPOption = 0.0,
    repetition_penalty: RepetitionPenaltyOption = 1.0,
    greedy: GreedyOption = False,
    seed: SeedOption = 0,
    backend: BackendOption = "auto",
    weights: WeightsOption = "auto",
    threads: ThreadsOption = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Colour each token by its leading expert; add a summary.")
    ] = False,
    tokens: Annotated[bool, typer.Option("--tokens", help="With --explain: a line per token as well.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Text, tokens, weights, shares and timings as JSON.")] = False,
) -> None:
    """Answer one prompt."""
    if tokens and not explain:
        raise typer.BadParameter("it adds to --explain, which is not given", param_hint="--tokens")
    text = read_prompt(prompt)
    from pcm_fast.commands import terminal
    from pcm_fast.commands.answer import print_answer

    with terminal.errors():
        wanted = read_preference("--preference", preference)
        drawing = drawing_options(
            merge, max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, greedy, seed
        )
        model = load(base, expert, pcm, backend, weights, threads)
        print_answer(model, text, wanted, drawing, raw=raw, explain=explain, tokens=tokens, as_json=as_json)


@app.command()
def chat(
    base: BaseOption = TRAINED_BASE,
    expert: ExpertOption = None,
    pcm: PCMOption = None,
    preference: PreferenceOption = None,
    merge: MergeOption = "linear",
    max_new_tokens: MaxNewTokensOption = 256,
    temperature: TemperatureOption = 0.7,
    top_k: TopKOption = 0,
    top_p: TopPOption = 0.95,
    min_p: MinPOption = 0.0,
    repetition_penalty: RepetitionPenaltyOption = 1.0,
    greedy: GreedyOption = False,
    seed: SeedOption = 0,
    backend: BackendOption = "auto",
    weights: WeightsOption = "auto",
    threads: ThreadsOption = None,
    explain: Annotated[bool, typer.Option("--explain", help="Colour each token by its leading expert.")] = False,
) -> None:
    """Talk with the experts; /help lists the commands."""
    from pcm_fast.commands import terminal
    from pcm_fast.commands.chat import Conversation

    with terminal.errors():
        wanted = read_preference("--preference", preference)
        drawing = drawing_options(
            merge, max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, greedy, seed
        )
        model = load(base, expert, pcm, backend, weights, threads)
        conversation = Conversation(model, terminal.output(), wanted, read_preference, drawing, explain)
        conversation.run(lambda: input("> " if sys.stdin.isatty() else ""))


@app.command()
def demo(
    max_new_tokens: MaxNewTokensOption = 48,
    seed: SeedOption = 5,
    backend: BackendOption = "auto",
    weights: WeightsOption = "auto",
    threads: ThreadsOption = None,
) -> None:
    """Two questions under several preferences, answered by the embedded model."""
    from pcm_fast.commands import terminal
    from pcm_fast.commands.demo import run_demo

    with terminal.errors():
        model = load(TRAINED_BASE, None, None, backend, weights, threads)
        drawing = drawing_options("linear", max_new_tokens, 0.8, 0, 0.95, 0.0, 1.1, False, seed)
        run_demo(model, terminal.output(), drawing)


@app.command()
def info(
    base: Annotated[str | None, typer.Option("--base", help="Also describe this model.")] = None,
) -> None:
    """What is installed, what it runs on, and what is in a model."""
    from pcm_fast.commands import terminal
    from pcm_fast.commands.info import print_info

    with terminal.errors():
        print_info(base)


app.command()(cli_training.train_experts)
app.command()(cli_training.train_pcm)
app.command()(cli_evaluation.evaluate)


def load(
    base: str, expert: list[str] | None, pcm: str | None, backend: str, weights: str, threads: int | None
) -> MixtureModel:
    """The model that the options describe."""
    from pcm_fast.commands.terminal import load_model

    weighing = name_number_pairs("--pcm", pcm) if pcm and "=" in pcm else pcm
    if weighing is None and base == TRAINED_BASE and all("=" not in value for value in expert or []):
        weighing = str(trained_pcm())
    return load_model(base, read_experts(expert or [], base), weighing, backend, weights, threads)


def read_prompt(prompt: str) -> str:
    """The prompt, from standard input if it is '-'."""
    if prompt == "-":
        if sys.stdin.isatty():
            raise typer.BadParameter("give a prompt, or pipe one to standard input", param_hint="PROMPT")
        prompt = sys.stdin.read().strip("\n")
    if not prompt.strip():
        raise typer.BadParameter("expected some text, got none", param_hint="PROMPT")
    return prompt


def read_experts(values: list[str], base: str) -> dict[str, Any]:
    """Experts for ``from_pretrained`` from ``NAME`` and ``NAME=SPEC``; all ready-made ones if there are none."""
    ready_made: Callable[..., dict[str, Any]] = trained_experts if base == TRAINED_BASE else prompted_experts
    if not values:
        return ready_made()
    experts: dict[str, Any] = {}
    for value in values:
        name, equals, spec = value.partition("=")
        if name in experts:
            raise ValueError(f"--expert: expected each name once, got {name!r} twice")
        if not equals:
            experts |= ready_made(name)
        elif spec.startswith("system:"):
            experts[name] = {"system": spec.removeprefix("system:").strip()}
        else:
            experts[name] = spec or None
    return experts


def read_preference(option: str, text: str | None) -> Preference:
    """A preference in words, or as strengths if there is an '=' in it."""
    return name_number_pairs(option, text) if text and "=" in text else text


def name_number_pairs(option: str, text: str) -> Mapping[str, float]:
    """``a=1,b=0.5`` as a mapping."""
    pairs: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = (word.strip() for word in part.partition("="))
        if not name or not NUMBER.fullmatch(number):
            raise ValueError(f"{option}: expected name=number,name=number,..., got {text!r}")
        if name in pairs:
            raise ValueError(f"{option}: expected each name once, got {name!r} twice")
        pairs[name] = float(number)
    return pairs


def drawing_options(
    merge: str,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    repetition_penalty: float,
    greedy: bool,
    seed: int,
) -> dict[str, Any]:
    """The keywords of ``generate`` that say how tokens are drawn; a bad one is an error before anything is loaded."""
    from pcm_fast.sampling import MergeRule, SamplingParams

    params = SamplingParams(not greedy, temperature, top_k, top_p, min_p, seed)
    return {
        "merge": MergeRule.parse(merge),
        "max_new_tokens": max_new_tokens,
        "do_sample": params.do_sample,
        "temperature": params.temperature,
        "top_k": params.top_k,
        "top_p": params.top_p,
        "min_p": params.min_p,
        "repetition_penalty": repetition_penalty,
        "seed": params.seed,
    }


def main() -> None:
    """The console script."""
    app()
