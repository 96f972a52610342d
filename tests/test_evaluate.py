"""The evaluation from end to end on a tiny random model, with rewards that are easy to count."""

import json
import re
import shutil

import numpy as np
import pytest
from rich.progress import Progress
from tiny_chat import add_tokenizer
from typer.testing import CliRunner

from pcm_fast import MixtureModel
from pcm_fast.adapter import save_adapter
from pcm_fast.cli import app
from pcm_fast.evaluate import answers as answers_module
from pcm_fast.evaluate.answers import collect_answers
from pcm_fast.evaluate.methods import all_methods, choose_methods
from pcm_fast.evaluate.mixtures import Mixtures
from pcm_fast.evaluate.questions import ask
from pcm_fast.evaluate.run import evaluate
from pcm_fast.evaluate.scores import text_key
from pcm_fast.evaluate.shortfalls import shortfalls
from pcm_fast.evaluate.wordings import TOKENS
from pcm_fast.loader import load_checkpoint
from pcm_fast.pcm import LearnedPCM
from pcm_fast.pcm_file import save_pcm
from pcm_fast.train.config import load_config
from pcm_fast.train.prompts import load_prompts
from pcm_fast.train.rewards import Rewards, Scale

CONFIG = """
base = "base"
prompts = "prompts.jsonl"
seed = 3
[evaluate]
prompts = "prompts.jsonl"
preferences = [["short", "vowels"], ["vowels", "spaces"], ["short", "vowels", "spaces"]]
max_new_tokens = 12
max_batch = 8
"""
DIMENSIONS = """
[short]
train = ["short"]
held_out = ["keep it short", "say little"]
system = "Be short."
reward = "scorers.py:short"
[vowels]
train = ["vowels"]
held_out = ["aeiou"]
system = "Use vowels."
reward = "scorers.py:vowels"
[spaces]
train = ["spaces"]
held_out = ["with room"]
system = "Leave room."
reward = "scorers.py:spaces"
"""
SCORERS = """
def short(prompts, answers):
    return [-len(answer) for answer in answers]
def vowels(prompts, answers):
    return [sum(letter in "aeiou" for letter in answer) for answer in answers]
def spaces(prompts, answers):
    return [answer.count(" ") for answer in answers]
"""
DIMENSION_NAMES = ("short", "vowels", "spaces")
EVERY_METHOD = [
    *("base", "prompting", "soup", "uniform", "fixed", "mod", "expert-short", "expert-vowels", "expert-spaces"),
    *("pcm", "pcm-free-text", "pcm-log", "pcm-per-prompt", "pcm-no-bt"),
]


@pytest.fixture(scope="module")
def setup(make_tiny_model, random_adapter, tmp_path_factory):
    """A directory with a configuration, a base, and artefacts that were never trained."""
    directory = tmp_path_factory.mktemp("evaluation")
    shutil.copytree(make_tiny_model("llama"), directory / "base")
    add_tokenizer(directory / "base")
    (directory / "config.toml").write_text(CONFIG)
    (directory / "dimensions.toml").write_text(DIMENSIONS)
    (directory / "scorers.py").write_text(SCORERS)
    prompts = [{"id": f"p{n}", "topic": "any", "text": f"What about {n}?"} for n in range(6)]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    config = load_config(directory / "config.toml")
    shape = load_checkpoint(config.base).config
    artefacts = directory / "artefacts"
    for seed, name in enumerate(DIMENSION_NAMES):
        save_adapter(random_adapter(shape, seed), artefacts / "experts" / name)
    rng = np.random.default_rng(1)
    for name in ("pcm", "other"):
        head = rng.normal(size=(3, 64)).astype(np.float32), np.zeros(3, np.float32)
        save_pcm(LearnedPCM("shared", DIMENSION_NAMES, "Be {preference}", *head), artefacts / name)
    weights = {"+".join(p): {p[0]: 0.7, p[1]: 0.3} for p in config.evaluate.preferences}
    (artefacts / "fixed_weights.json").write_text(json.dumps(weights))
    scales = {name: Scale(mean, 3.0) for name, mean in zip(DIMENSION_NAMES, (-20.0, 4.0, 2.0), strict=True)}
    Rewards(config, scales, -5.0).save(artefacts)
    return directory


@pytest.fixture(scope="module")
def config(setup):
    return load_config(setup / "config.toml")


@pytest.fixture(scope="module")
def evaluated(setup, config):
    """A whole evaluation: what it returned."""
    return evaluate(
        config,
        setup / "artefacts",
        setup / "out",
        Progress(disable=True),
        without_bt=setup / "artefacts" / "other",
        num_threads=1,
    )


def drawn(path):
    return [record for record in map(json.loads, path.read_text().splitlines()) if "text" in record]


# What comes out


def test_every_method_is_evaluated(evaluated):
    assert [method["name"] for method in evaluated["methods"]] == EVERY_METHOD
    for method in evaluated["methods"]:
        assert set(method["rewards"]) == set(DIMENSION_NAMES)
        assert method["tokens_per_second"] > 0
        assert method["tokens"]["low"] <= method["tokens"]["value"] <= method["tokens"]["high"] <= 12
        assert method["fluency"]["value"] < 0
    base = evaluated["methods"][0]
    assert base["composite"] == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert base["fluency_change"]["value"] == 0


def test_the_numbers_are_those_of_the_answers(evaluated, setup):
    """Rewards, composite reward and win rate of one method, again, from the answers in the files."""
    scored = {
        record["key"]: record for record in map(json.loads, (setup / "out/scores.jsonl").read_text().splitlines()[1:])
    }
    base = {answer["prompt_id"]: answer["text"] for answer in drawn(setup / "out/answers/base.jsonl")}
    texts = {(a["prompt_id"], a["preference"]): a["text"] for a in drawn(setup / "out/answers/uniform.jsonl")}
    assert len(texts) == 18

    def reward(prompt_id, text, name):
        return scored[text_key(f"What about {prompt_id[1:]}?", text)]["rewards"][name]

    composite, wins = [], []
    for (prompt_id, preference), text in texts.items():
        beats = [
            1 / (1 + np.exp(reward(prompt_id, base[prompt_id], name) - reward(prompt_id, text, name)))
            for name in preference.split("+")
        ]
        composite.append(np.mean(beats))
        wins.append(0.5 if abs(composite[-1] - 0.5) <= 1e-9 else float(composite[-1] > 0.5))
    method = evaluated["methods"][EVERY_METHOD.index("uniform")]
    assert method["composite"]["value"] == pytest.approx(np.mean(composite))
    row, column = EVERY_METHOD.index("uniform"), EVERY_METHOD.index("base")
    assert evaluated["win_rates"]["value"][row][column] == pytest.approx(np.mean(wins))
    assert evaluated["win_rates"]["value"][column][row] == pytest.approx(1 - np.mean(wins))
    lengths = [len(text) for text in texts.values()]
    guarded = [reward(prompt_id, text, "short") for (prompt_id, _), text in texts.items()]
    assert method["rewards"]["short"]["mean"] == pytest.approx(np.mean(guarded))
    assert max(guarded) <= (20 - min(lengths)) / 3 + 1e-9  # guards only take off


def test_weights_of_the_pcm(evaluated, setup):
    weights = evaluated["weights"]
    assert set(weights) == {"pcm", "pcm-free-text", "pcm-log", "pcm-per-prompt", "pcm-no-bt"}
    for preference, means in weights["pcm"]["overall"].items():
        assert sum(means.values()) == pytest.approx(1, abs=1e-3)
        assert weights["pcm-free-text"]["overall"][preference].keys() == means.keys()
    assert weights["pcm"]["overall"]["short+vowels"]["spaces"] == 0
    assert weights["pcm-free-text"]["overall"]["short+vowels"]["spaces"] > 0
    for answer in drawn(setup / "out/answers/pcm-per-prompt.jsonl"):
        assert len({tuple(w) for w in answer["weights"]}) == 1
    assert any(len({tuple(w) for w in a["weights"]}) > 1 for a in drawn(setup / "out/answers/pcm.jsonl"))


def test_what_the_pcm_reads(setup, evaluated):
    for answer in drawn(setup / "out/answers/pcm.jsonl"):
        assert sorted(re.split(", | and ", answer["wording"])) == sorted(answer["preference"].split("+"))
    for answer in drawn(setup / "out/answers/pcm-free-text.jsonl"):
        assert "aeiou" in answer["wording"]
        assert ("keep it short" in answer["wording"]) + ("say little" in answer["wording"]) == (
            "short" in answer["preference"]
        )
        assert ("with room" in answer["wording"]) == ("spaces" in answer["preference"])


def test_what_single_wordings_weigh(setup, config, evaluated):
    """The share of a dimension's wordings at which its expert leads, again, one request at a time."""
    spec = Mixtures(config, setup / "artefacts").learned(setup / "artefacts" / "pcm")
    model = MixtureModel(spec)
    prompts = [prompt.text for prompt in load_prompts(config.evaluate.prompts)]
    assert [row["dimension"] for row in evaluated["wordings"]] == list(DIMENSION_NAMES)
    for column, row in enumerate(evaluated["wordings"]):
        found, plain = [], []
        for i, wording in enumerate(config.dimensions[row["dimension"]].held_out):
            for preference, means in ((wording, found), (None, plain)):
                output = model.generate(
                    **model.chat_inputs(prompts[i], preference=preference),
                    preference=preference,
                    max_new_tokens=TOKENS,
                    temperature=config.evaluate.temperature,
                    top_p=config.evaluate.top_p,
                    seed=config.seed + i,
                    return_dict_in_generate=True,
                )
                means.append(output.mixture_weights[0, : int(output.lengths[0])].mean(axis=0))
        leaders = np.argmax(found, axis=1)
        assert row["wordings"] == len(found)
        assert row["leads"] == pytest.approx(np.mean(leaders == column))
        assert row["weight"] == pytest.approx(np.mean(found, axis=0)[column], abs=1e-5)
        assert row["without"] == pytest.approx(np.mean(plain, axis=0)[column], abs=1e-5)
        assert row["raised"] == np.mean([own[column] > other[column] for own, other in zip(found, plain, strict=True)])
        assert [leader for _, leader in row["missed"]] == [DIMENSION_NAMES[k] for k in leaders if k != column]
    assert "misunderstood" in (setup / "out/report.md").read_text()


def test_the_report_stands_alone(setup, evaluated):
    out = setup / "out"
    html = (out / "report.html").read_text()
    assert html.count('src="data:image/png;base64,iVBOR') == 4
    assert not re.search(r'(?:src|href)="(?!data:)', html)
    assert "proxies" in html
    for method in evaluated["methods"]:
        assert method["label"] in html
        assert method["label"] in (out / "report.md").read_text()
    for example in evaluated["examples"]:
        assert len(example["answers"]) == 3
    for link in re.findall(r"\]\((.*?)\)", (out / "report.md").read_text()):
        assert (out / link).stat().st_size > 1000
    assert json.loads((out / "results.json").read_text()) == evaluated


def test_what_falls_short_is_said(evaluated):
    text = "\n".join(evaluated["shortfalls"])
    assert "a small run: 6 prompts and 3 composite preferences" in text
    worse = [name for name, e in evaluated["experts"].items() if e["d"][name]["value"] < 0.8]
    assert worse
    for name in worse:
        assert f"The {name} expert moves its own reward by d = " in text


def test_nothing_falls_short_of_a_perfect_run():
    def method(name, kind, rate):
        return {
            "name": name,
            "label": name,
            "kind": kind,
            "average_win_rate": {"value": rate},
            "composite": {"value": rate},
        }

    rates = {"value": [[0.5, 0.7], [0.3, 0.5]], "low": [[0.5, 0.6], [0.2, 0.5]], "high": [[0.5, 0.8], [0.4, 0.5]]}
    expert = {"d": {"a": {"value": 0.9}}, "in_base_standard_deviations": {"a": 0.9}, "fluency_change": {"value": -0.1}}
    summary = {
        "preferences": [["a"]] * 8,
        "experts": {"a": expert},
        "methods": [method("pcm", "pcm", 0.7), method("soup", "baseline", 0.3)],
        "win_rates": {"methods": ["pcm", "soup"], **rates},
    }
    heard = [{"dimension": "a", "wordings": 12, "leads": 0.5}]
    assert shortfalls(summary, heard, 100, {}) == []
    rates["low"][0][1] = 0.49
    expert["fluency_change"]["value"] = -0.6
    heard[0]["leads"] = 0.4
    found = shortfalls(summary, heard, 99, {"fixed": "none was learned"})
    assert len(found) == 5
    assert any("40 % of 12 wordings" in sentence for sentence in found)


# Going on


def test_nothing_is_drawn_or_scored_twice(setup, config, evaluated, monkeypatch):
    def never(*arguments, **keywords):
        raise AssertionError("drawn or scored again")

    monkeypatch.setattr(answers_module, "draw", never)
    monkeypatch.setattr(Rewards, "fluency", never)
    again = evaluate(
        config,
        setup / "artefacts",
        setup / "out",
        Progress(disable=True),
        without_bt=setup / "artefacts" / "other",
        num_threads=1,
    )
    assert again == evaluated


def test_a_run_that_was_cut_off_goes_on(setup, config, evaluated, tmp_path, monkeypatch):
    """The answers are those of a run in one piece, and each is drawn once."""
    (method,) = [m for m in all_methods(Mixtures(config, setup / "artefacts"), None)[0] if m.name == "pcm"]
    questions = ask(method, load_prompts(config.evaluate.prompts), config.evaluate.preferences, config)
    path, answered = tmp_path / "pcm.jsonl", []

    def five_then_cut(count):
        answered.append(count)
        if len(answered) == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect_answers(method, questions, config, path, 1, five_then_cut)
    assert len(drawn(path)) == 5
    path.write_text(path.read_text() + '{"prompt_id": "p0", "pref')  # torn
    asked, draw = [], answers_module.draw

    def counting(engine, requests, most):
        requests = list(requests)
        asked.extend(question.key for question, _ in requests)
        return draw(engine, requests, most)

    monkeypatch.setattr(answers_module, "draw", counting)
    result = collect_answers(method, questions, config, path, 1, lambda count: None)
    assert len(asked) == 18 - 5
    assert not {(a["prompt_id"], a["preference"]) for a in drawn(path)[:5]} & set(asked)
    whole = {(a["prompt_id"], a["preference"]): a["text"] for a in drawn(setup / "out/answers/pcm.jsonl")}
    assert {key: answer.text for key, answer in result.by_key.items()} == whole
    assert result.tokens == sum(answer.tokens for answer in result.by_key.values())


def test_answers_of_other_artefacts_are_refused(setup, config, evaluated, random_adapter, tmp_path):
    artefacts = tmp_path / "artefacts"
    shutil.copytree(setup / "artefacts", artefacts)
    save_adapter(random_adapter(load_checkpoint(config.base).config, 9), artefacts / "experts" / "short")
    with pytest.raises(ValueError, match=r"soup\.jsonl: expected results of the same mixtures, got others"):
        evaluate(config, artefacts, setup / "out", Progress(disable=True), methods=["soup"], num_threads=1)
    kept = ["prompting", "expert-vowels"]  # the expert that changed takes no part in these
    evaluate(config, artefacts, setup / "out", Progress(disable=True), methods=kept, num_threads=1)


def test_answers_to_other_questions_are_refused(setup, config, evaluated, tmp_path):
    artefacts = tmp_path / "artefacts"
    shutil.copytree(setup / "artefacts", artefacts)
    weights = json.loads((artefacts / "fixed_weights.json").read_text())
    weights["short+vowels"]["short"] = 0.6
    (artefacts / "fixed_weights.json").write_text(json.dumps(weights))
    message = r"fixed\.jsonl: expected answers to the same requests, and that of p0 under short\+vowels has changed"
    with pytest.raises(ValueError, match=message):
        evaluate(config, artefacts, setup / "out", Progress(disable=True), methods=["fixed"], num_threads=1)


# Arguments


def test_methods_are_chosen_by_name_and_pattern(setup, config):
    available, missing = all_methods(Mixtures(config, setup / "artefacts"), None)
    assert list(missing) == ["pcm-no-bt"]
    assert [m.name for m in choose_methods(available, missing, ["soup", "expert-*"])] == [
        *("base", "soup", "expert-short", "expert-vowels", "expert-spaces")
    ]
    with pytest.raises(
        ValueError, match=r"methods: expected names of methods, got 'pcm-no-bt': no PCM trained without"
    ):
        choose_methods(available, missing, ["pcm-no-bt"])
    with pytest.raises(
        ValueError, match=r"methods: expected names of methods, got 'magic', and there are base, prompting"
    ):
        choose_methods(available, missing, ["magic"])


def test_what_artefacts_lack(setup, config, tmp_path):
    with pytest.raises(ValueError, match="artefacts: expected a directory of trained artefacts"):
        Mixtures(config, tmp_path / "nowhere")
    (tmp_path / "experts" / "short").mkdir(parents=True)
    with pytest.raises(ValueError, match="artefacts: expected the expert 'vowels' in"):
        Mixtures(config, tmp_path)
    shutil.copytree(setup / "artefacts" / "experts", tmp_path / "experts", dirs_exist_ok=True)
    missing = all_methods(Mixtures(config, tmp_path), None)[1]
    assert list(missing) == ["pcm", "pcm-free-text", "pcm-log", "pcm-per-prompt", "fixed", "pcm-no-bt"]
    (tmp_path / "fixed_weights.json").write_text("[]")
    with pytest.raises(ValueError, match=r"fixed_weights\.json: expected"):
        all_methods(Mixtures(config, tmp_path), None)


def command(setup, *arguments):
    options = ["--artefacts", str(setup / "artefacts"), "--out", str(setup / "cli"), "--threads", "1"]
    return CliRunner().invoke(app, ["evaluate", str(setup / "config.toml"), *options, *arguments])


def test_the_command(setup):
    result = command(setup, "--methods", "soup,pcm", "--limit", "2")
    assert result.exit_code == 0, result.output
    assert re.search(r"Personalized Soup +\d", result.output)
    assert "small run: 2 prompts" in result.output
    assert (setup / "cli" / "report.html").is_file()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--methods", "magic"], "methods: expected names of methods, got 'magic'"),
        (["--judge-url", "http://localhost/v1"], "judge-url, judge-model: expected both or neither"),
        (["--judge-url", "localhost", "--judge-model", "m"], "judge-url: expected an address"),
        (["--methods", "soup", "--judge-url", "http://x", "--judge-model", "m"], "expected the PCM among the methods"),
    ],
)
def test_bad_arguments_are_one_line(setup, arguments, message):
    result = command(setup, *arguments)
    assert result.exit_code == 1
    assert message in result.output
    assert "\n" not in result.output.strip()


def test_the_extra_is_asked_for(setup, monkeypatch):
    monkeypatch.setattr("pcm_fast.commands.evaluate.PACKAGES", ("no_such_package",))
    result = command(setup)
    assert result.exit_code == 1
    assert "no_such_package is not installed; expected pip install 'pcm-fast[train,evaluate]'" in result.output


# The judge


def test_the_judge_compares_the_pcm_with_the_baselines(setup, config):
    class Taste:
        """Prefers the longer answer."""

        model = "taste"

        def verdict(self, preference, prompt, first, second):
            if len(first) == len(second):
                return "tie"
            return "first" if len(first) > len(second) else "second"

    results = evaluate(
        config,
        setup / "artefacts",
        setup / "judged",
        Progress(disable=True),
        methods=["soup", "pcm"],
        num_threads=1,
        judge=Taste(),
        judge_limit=7,
    )
    verdicts = results["judge"]
    assert [row["name"] for row in verdicts["rows"]] == ["base", "soup"]
    assert verdicts["asked"] == 14
    assert verdicts["failed"] == 0
    records = [json.loads(line) for line in (setup / "judged/verdicts.jsonl").read_text().splitlines()[1:]]
    for row in verdicts["rows"]:
        own = [record for record in records if f"| {row['name']} |" in record["key"]]
        wins = [np.sign(len(record["answer"]) - len(record["other"])) / 2 + 0.5 for record in own]
        assert row["verdicts"] == 7
        assert row["ties"] == wins.count(0.5)
        assert row["win_rate"]["value"] == pytest.approx(np.mean(wins))
    assert "taste" in (setup / "judged/report.html").read_text()
