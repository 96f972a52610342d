"""Training from end to end on a tiny model: answers, rewards, experts, PCM; a user's own dimension."""

import itertools
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_chat import add_tokenizer
from typer.testing import CliRunner

from pcm_fast import MixtureModel
from pcm_fast.cli import app
from pcm_fast.loader import load_checkpoint
from pcm_fast.pcm import FixedPCM
from pcm_fast.train.answers import Answer
from pcm_fast.train.config import ExpertConfig, load_config
from pcm_fast.train.fixed_weights import RIDGE, gains
from pcm_fast.train.pairs import choose_pairs
from pcm_fast.train.policy import Policy, mixture_log_likelihood
from pcm_fast.train.pool import Pool
from pcm_fast.train.preferences import composites, state
from pcm_fast.train.prompts import Prompt, load_prompts
from pcm_fast.train.rebel import Contest, rebel_loss, update
from pcm_fast.train.rollouts import Wish, draw_rollouts
from pcm_fast.train.warm_start import targets

CONFIG = """
base = "{base}"
prompts = "prompts.jsonl"
dimensions = "dimensions.toml"
seed = 3
fluency_margin = 2
[answers]
plain = 3
own = 3
max_new_tokens = 12
[experts]
rank = 2
modules = ["q_proj", "v_proj"]
pairs = 8
batch_size = 2
[experts.vowels.again]
learning_rate = 1e-3
pairs = 4
[pcm]
kind = "{kind}"
model = "{model}"
rank = 2
layers = 2
warm_start = 4
warm_start_batch = 4
iterations = 2
prompts = 4
answers = 3
naming = 0.5
batch_size = 2
epochs = 1
max_new_tokens = 8
[evaluate]
preferences = [["concise", "vowels"]]
"""
DIMENSIONS = """
joins = ["{}", "Please: {}."]
[concise]
train = ["concise", "be brief"]
held_out = ["keep it short"]
system = "Be brief."
styles = ["Say little."]
[vowels]
train = ["vowels", "many vowels"]
held_out = ["aeiou"]
system = "Use vowels."
reward = "scorers.py:vowels"
"""
SCORER = """
def vowels(prompts, answers):
    return [sum(letter in "aeiou" for letter in answer) for answer in answers]
"""


@pytest.fixture(scope="module")
def base(make_tiny_model):
    directory = make_tiny_model("llama")
    add_tokenizer(directory)
    return directory


def write_config(directory: Path, base: Path, kind: str = "shared", model: str = "") -> Path:
    """A user's own files."""
    (directory / "config.toml").write_text(CONFIG.format(base=base, kind=kind, model=model))
    (directory / "dimensions.toml").write_text(DIMENSIONS)
    (directory / "scorers.py").write_text(SCORER)
    prompts = [{"id": f"p{i}", "topic": "t", "text": f"tell me about {word}"} for i, word in enumerate("abcdef")]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    return directory / "config.toml"


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    """A directory with experts and a PCM, made by the commands."""
    directory = tmp_path_factory.mktemp("train")
    config = write_config(directory, base)
    for command in ("train-experts", "train-pcm"):
        result = CliRunner().invoke(app, [command, str(config), "--out", str(directory / "out")])
        assert result.exit_code == 0, result.output
    return directory


def test_experts_and_pcm_answer(trained, base):
    out = trained / "out"
    experts = {name: out / "experts" / name for name in ("concise", "vowels")}
    model = MixtureModel.from_pretrained(base, experts, out / "pcm")
    output = model.generate(
        **model.chat_inputs("why?", preference="be brief"),
        preference="be brief",
        max_new_tokens=5,
        return_dict_in_generate=True,
    )
    weights = output.mixture_weights[0]
    assert model.backend == "native"
    assert np.allclose(weights.sum(axis=-1), 1)
    assert len(np.unique(weights)) > 2, "the head has not learned anything"
    for name in experts:
        assert "proxy" in (out / "experts" / name / "README.md").read_text()
    assert "the adapter itself gave" not in (out / "experts" / "concise" / "README.md").read_text()
    curve = json.loads((out / "pcm" / "curve.json").read_text())
    assert [round_["iteration"] for round_ in curve] == [0, 1, 2]


def test_an_expert_learns_again_from_its_own_answers(trained, base):
    """Its answers were drawn from the first adapter, and training went on from that."""
    out = trained / "out"
    last, first = out / "experts" / "vowels", out / "work" / "first" / "vowels"
    assert "4 pairs of answers that the adapter itself gave" in (last / "README.md").read_text()
    answers = [json.loads(line) for line in (out / "work" / "answers-vowels.jsonl").read_text().splitlines()]
    assert len(answers) == 6 * 3
    model = MixtureModel.from_pretrained(base, {"vowels": first}, "uniform")
    texts = [f"tell me about {word}" for word in "abcdef"]
    mine, of_base = [], []
    for answer in answers:
        read, tokens = model.chat_inputs(texts[int(answer["key"][1])])["input_ids"][0], answer["tokens"]
        rows = model.log_probs([[*read, *tokens]], prompt_length=len(read))[0, len(read) - 1 : -1]
        mine.append(float(rows[range(len(tokens)), tokens].sum()))
        of_base.append(answer["likelihood"])
    assert np.mean(mine) > np.mean(of_base), "what it has drawn is likelier under it than under the base"
    one, other = (load_file(path / "adapter_model.safetensors") for path in (first, last))
    for name in one:
        moved, size = (other[name] - one[name]).float().norm(), one[name].float().norm()
        assert 0 < moved < 0.5 * size + 0.1, name
    short, long = (json.loads((path / "curve.json").read_text()) for path in (first, last))
    assert long[: len(short)] == short
    assert len(long) > len(short)


def test_commands_go_on_where_they_were_cut_off(trained, base, tmp_path):
    config = write_config(tmp_path, base)
    whole = trained / "out"
    out = tmp_path / "out"
    (out / "work").mkdir(parents=True)
    lines = (whole / "work" / "answers.jsonl").read_text().splitlines(keepends=True)
    (out / "work" / "answers.jsonl").write_text("".join(lines[:5]) + lines[5][:10])  # cut off in the middle of a line
    result = CliRunner().invoke(app, ["train-experts", str(config), "--out", str(out), "--only", "vowels"])
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (out / "experts").iterdir()) == ["vowels"]
    again = [json.loads(line) for line in (out / "work" / "answers.jsonl").read_text().splitlines()]
    whole_answers = [json.loads(line) for line in lines]
    assert sorted(again, key=lambda a: a["key"]) == sorted(whole_answers, key=lambda a: a["key"])
    result = CliRunner().invoke(app, ["train-pcm", str(config), "--out", str(out)])
    assert result.exit_code == 1
    assert "concise" in result.output


def test_separate_pcm(trained, base, make_tiny_model, tmp_path):
    small = make_tiny_model("llama", seed=5, hidden_size=32, head_dim=16, num_hidden_layers=2)
    config = write_config(tmp_path, base, kind="separate", model=str(small))
    result = CliRunner().invoke(app, ["train-pcm", str(config), "--out", str(trained / "out"), "--name", "separate"])
    assert result.exit_code == 0, result.output
    experts = {name: trained / "out" / "experts" / name for name in ("concise", "vowels")}
    model = MixtureModel.from_pretrained(base, experts, trained / "out" / "separate")
    assert model.spec.pcm.kind == "separate"
    assert model.chat("why?", preference="aeiou", max_new_tokens=4) is not None


@pytest.fixture(scope="module")
def setting(base, trained):
    """A policy with weights that depend on the text, and rollouts of the mixture it weighs."""
    config = load_config(trained / "config.toml")
    torch.manual_seed(1)
    policy = Policy(load_checkpoint(base), ["concise", "vowels"], replace(config.pcm, head_learning_rate=0.05))
    with torch.no_grad():
        policy.head.weight.normal_(std=0.3)
        for name, parameter in policy.body.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    experts = {name: trained / "out" / "experts" / name for name in policy.experts}
    model = MixtureModel.from_pretrained(base, experts, policy.learned(trained))
    wishes = [Wish(f"how is {i}?", "be brief", policy.experts, seed=i) for i in range(6)]
    return policy, draw_rollouts(model, wishes, 4, max_new_tokens=10)


def test_engine_and_policy_weigh_alike(setting):
    policy, rollouts = setting
    rows = policy.log_weights([r.context for r in rollouts], [r.tokens for r in rollouts])
    for row, rollout in zip(rows, rollouts, strict=True):
        assert np.abs(row.detach().numpy() - np.log(rollout.weights)).max() < 1e-3
        assert rollout.weights.std(axis=0).max() > 1e-3, "weights that do not depend on the text prove nothing"


def test_gradient_of_the_mixture_log_likelihood(setting):
    rollout = setting[1][0]
    logprobs = torch.from_numpy(rollout.expert_logprobs).double()
    scores = torch.randn(len(rollout.tokens), 2, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda s: mixture_log_likelihood(torch.log_softmax(s, -1), logprobs, (0, 1)), scores
    )
    direct = (rollout.weights * np.exp(rollout.expert_logprobs)).sum(axis=1)
    whole = mixture_log_likelihood(torch.from_numpy(rollout.weights).log(), logprobs, (0, 1))
    assert float(whole) == pytest.approx(float(np.log(direct).sum()), abs=1e-4)


def test_gradient_through_the_policy(setting):
    """Against differences of the loss for a parameter of the head and one of the adapter."""
    policy, rollouts = setting
    contests = [Contest((rollouts[0], rollouts[1]), (0.9, 0.2), (0, 1))]
    policy.zero_grad()
    rebel_loss(policy, contests, 1.0).backward()
    adapter = next(p for name, p in policy.body.named_parameters() if "lora_B" in name and p.requires_grad)
    for parameter, step in ((policy.head.weight, 1e-2), (adapter, 1e-2)):
        index = tuple(int(i) for i in np.unravel_index(int(parameter.grad.abs().argmax()), parameter.shape))
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[index] += sign * step
                values.append(rebel_loss(policy, contests, 1.0).item())
                parameter[index] -= sign * step
        difference = (values[0] - values[1]) / (2 * step)
        assert float(parameter.grad[index]) == pytest.approx(difference, rel=0.05, abs=1e-4)


def test_of_many_answers_every_pair_counts(setting):
    policy, rollouts = setting
    rewards = (0.9, 0.2, 0.4)
    pairs = [Contest((rollouts[i], rollouts[j]), (rewards[i], rewards[j]), (0, 1)) for i, j in ((0, 1), (0, 2), (1, 2))]
    with torch.no_grad():
        together = rebel_loss(policy, [Contest(tuple(rollouts[:3]), rewards, (0, 1))], 2.0)
        assert together.item() == pytest.approx(rebel_loss(policy, pairs, 2.0).item(), rel=1e-4)


def test_rebel_makes_the_better_answer_likelier(setting, base, trained):
    policy, rollouts = setting
    contests = [Contest((rollouts[i], rollouts[i + 1]), (1.0, 0.0), (0, 1)) for i in (0, 2, 4)]
    assert rebel_loss(policy, contests, 1.0).item() == pytest.approx(1.0, abs=1e-3), "the ratios start at 1"
    optimizer = torch.optim.AdamW(policy.parameter_groups(), weight_decay=0.0)
    losses = [update(policy, optimizer, contests, 1.0, 3, seed) for seed in range(20)]
    assert losses[-1] < 0.9, losses


def test_rollouts_of_other_pcms_have_no_context(base):
    model = MixtureModel.from_pretrained(base, {"a": None, "b": None}, FixedPCM({"a": 0.5, "b": 0.5}))
    rollout = draw_rollouts(model, [Wish("why?", "a", ("a", "b"), 0)], 2, max_new_tokens=4)[0]
    assert rollout.context == []
    assert rollout.weights.shape == (len(rollout.tokens), 2)


def test_shipped_configuration():
    config = load_config()
    prompts, held_out = load_prompts(config.prompts), load_prompts(config.evaluate.prompts)
    assert len(prompts) >= 400
    assert len(held_out) >= 120
    assert not {p.text.lower() for p in prompts} & {p.text.lower() for p in held_out}
    assert len(config.dimensions) == 6
    for dimension in config.dimensions.values():
        assert not set(dimension.train) & set(dimension.held_out)
    assert len(config.evaluate.preferences) >= 8
    pairs = {frozenset(pair) for pair in config.compatible}
    assert all(len(names) < 2 or frozenset(names[:2]) in pairs for names in composites(config))


def test_stated_preferences():
    config = load_config()
    chance = random.Random(0)
    for names in composites(config):
        stated = state(config, names, chance)
        assert set(stated.strengths) == set(names)
        assert math.isclose(sum(stated.shares.values()), 1)
        held = state(config, names, chance, held_out=True)
        assert any(word in held.text for word in config.dimensions[names[0]].held_out)
    nothing = state(config, (), chance)
    assert set(nothing.strengths) == set(config.dimensions)
    texts = [state(config, ("concise",), chance).text for _ in range(300)]
    denied = [text for text in texts if "not " in text and text.split("not ")[-1].rstrip(".") in config.dimensions]
    assert 5 < len(denied) < 100
    assert not any(text.rstrip(".").endswith("not concise") for text in texts)


def test_better_and_worse_answers():
    """Six answers to one prompt: two of them plain, one cut short on purpose, one that is babble."""
    scores = np.array([0.0, -1.0, 3.0, 2.0, -3.0, -4.0])
    pool = Pool(
        prompts={"p": Prompt("p", "t", "why?")},
        prompt_ids=["p"] * 6,
        styles=["", "", "warm", "warm", "brief", "warm"],
        answers=[Answer(str(i), str(i), [i], True, -1.0, -0.1) for i in range(6)],
        fluency=np.array([-1.0, -1.0, -1.0, -1.4, -1.0, -9.0]),
        rewards={"warm": scores},
        relevance=np.array([0.0, 0.0, -3.0, 0.0, 0.0, 0.0]),
        shortened=frozenset({"brief"}),
    )
    rewards = SimpleNamespace(fluency_floor=-1.5)

    def pair(**settings):
        found = choose_pairs(pool, rewards, "warm", ExpertConfig(**settings))[0]
        return int(found.chosen.text), int(found.rejected.text)

    assert pair(relevance=0.0) == (2, 1)
    assert pair(relevance=1.0) == (3, 1), "what is off the subject is not chosen"
    assert pair(relevance=1.0, rejected="any") == (3, 5)
    assert pair(relevance=1.0, rejected="plain") == (3, 1)
    assert pair(relevance=1.0, rejected="plain", fluency=4.0) == (3, 1)
    pool.rewards["warm"][4] = 3.0
    assert pair(relevance=1.0) == (4, 1)
    assert pair(relevance=1.0, cut_short=False) == (3, 1), "what was cut short for another dimension is not chosen"
    pool.rewards["warm"][4] = -3.0
    assert pair(relevance=1.0, rejected="plain", fluency=6.0) == (0, 1), "what is less fluent is not chosen"


@pytest.mark.parametrize(
    "text, message",
    [
        ("bass = 1", "bass: no such key"),
        ("seed = 'x'", "seed: expected int, got 'x'"),
        ("[pcm]\nkind = 'both'", "pcm.kind: expected 'shared' or 'separate', got 'both'"),
        ("[pcm]\nanswers = 1", "pcm.answers: expected two or more, which are compared, got 1"),
        ("[pcm]\nkind = 'separate'", "pcm.model: expected the directory"),
        ("[experts]\nrank = 1.5", "experts.rank: expected int, got 1.5"),
        ("[experts.concise.again]\nrank = 1", "experts.concise.again: expected the adapter as it was"),
        ("[experts.concise]\nagain = 1", "experts.concise.again: expected a table, got 1"),
        ("[experts.concise]\nrejected = 'all'", "experts.concise.rejected: expected 'alike', 'any' or 'plain'"),
        ("[experts]\nrejected = 'all'", "experts.rejected: expected 'alike', 'any' or 'plain', got 'all'"),
        ("activations = 'int4'", "activations: expected 'float32' or 'int8', got 'int4'"),
        ("[evaluate]\npreferences = [['tall']]", "expected names of dimensions, got 'tall'"),
    ],
)
def test_bad_configurations(text, message, tmp_path):
    (tmp_path / "c.toml").write_text(text)
    (tmp_path / "dimensions.toml").write_text(DIMENSIONS)
    with pytest.raises(ValueError, match=r"c\.toml") as raised:
        load_config(tmp_path / "c.toml")
    assert message in str(raised.value)


def test_gains_are_read_off_fixed_weights():
    """Of two experts in n pairs: n d / (2 n + ridge) each way, where d is the logarithm of their ratio."""
    known = {str(i): {"a": 4.0, "b": 1.0} for i in range(3)}
    found = gains(known, ["a", "b", "c"])
    assert np.allclose(found, np.array([1.0, -1.0, 0.0]) * 3 * math.log(4) / (2 * 3 + RIDGE), atol=1e-6)
    assert not gains({}, ["a"]).any()
    loud = {"a": 4.0, "b": 1.0, "c": 0.5}
    sets = [names for size in (2, 3) for names in itertools.combinations(loud, size)] * 200
    known = {str(i): {name: loud[name] / sum(loud[n] for n in names) for name in names} for i, names in enumerate(sets)}
    found = gains(known, list(loud))
    assert np.allclose(found - found[1], np.log(list(loud.values())), atol=0.01), "much evidence outweighs the ridge"


def test_weights_that_a_preference_names():
    louder = np.log(np.array([2.0, 1.0, 0.5], dtype=np.float32))
    names = ("a", "b", "c")
    assert np.allclose(targets({"b": 0.5}, names, louder), [0, 1, 0]), "one alone has it all"
    assert np.allclose(targets({"a": 1.0, "c": 2.0}, names, louder), [2 / 3, 0, 1 / 3])
    assert np.allclose(targets({"a": 1.0, "b": 3.0}, names, np.zeros(3, dtype=np.float32)), [0.25, 0.75, 0])
