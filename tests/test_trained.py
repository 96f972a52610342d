"""The experts and the PCM that are shipped: what they weigh when told in words, and what they answer."""

import random

import numpy as np
import pytest

from pcm_fast import MixtureModel
from pcm_fast.evaluate.wordings import read_wordings
from pcm_fast.presets import TRAINED, TRAINED_EXPERTS, trained_experts, trained_pcm
from pcm_fast.train.config import load_config
from pcm_fast.train.preferences import state
from pcm_fast.train.prompts import load_prompts

TOKENS = 6


@pytest.fixture(scope="module")
def model():
    return MixtureModel.from_pretrained(experts=trained_experts(), pcm=trained_pcm())


@pytest.fixture(scope="module")
def config():
    return load_config()


@pytest.fixture(scope="module")
def prompts(config):
    return [prompt.text for prompt in load_prompts(config.evaluate.prompts)]


def weights(model, prompt, preference):
    """[K], mean over the first tokens of an answer."""
    output = model.generate(
        **model.chat_inputs(prompt, preference=preference),
        preference=preference,
        max_new_tokens=TOKENS,
        seed=1,
        return_dict_in_generate=True,
    )
    return output.mixture_weights[0].mean(axis=0)


def test_what_is_shipped(config):
    assert tuple(config.dimensions) == TRAINED_EXPERTS
    files = [path for path in TRAINED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".md"}
    assert {"rewards.json", "fixed_weights.json"} <= {path.name for path in files}
    for directory in (*trained_experts().values(), trained_pcm()):
        card = (directory / "README.md").read_text()
        assert "proxies" in card or "proxy" in card
    with pytest.raises(ValueError, match="expected one of 'helpful'"):
        trained_experts("gloomy")


def test_wordings_it_never_read_in_training_raise_the_weight_of_what_they_mean(model, config):
    for dimension in config.dimensions.values():
        assert not set(dimension.held_out) & set(dimension.train)
    rows = read_wordings(config, model.spec, load_prompts(config.evaluate.prompts))
    for row in rows:
        assert row["weight"] > 1.5 * row["without"], row
    assert np.mean([row["raised"] for row in rows]) > 0.75, rows
    assert np.mean([row["leads"] for row in rows]) > 0.5, rows


def test_composites_in_words_weigh_what_they_name(model, config, prompts):
    found = []
    for i, preference in enumerate(config.evaluate.preferences):
        text = state(config, preference, random.Random(i), held_out=True).text
        named = [model.expert_names.index(name) for name in preference]
        found.append(weights(model, prompts[i], text)[named].sum() / len(named) * len(model.expert_names))
    assert np.mean(found) > 1.5, "named experts shall weigh well over their share of a uniform mixture"


def test_strengths_are_heard(model, prompts):
    concise = model.expert_names.index("concise")
    more, less = [], []
    for prompt in prompts[:4]:
        more.append(weights(model, prompt, {"concise": 2.0, "friendly": 0.5})[concise])
        less.append(weights(model, prompt, {"concise": 0.5, "friendly": 2.0})[concise])
    assert np.mean(more) > np.mean(less)


def test_opposite_preferences_answer_differently(model, prompts):
    lengths = {"short": [], "long": []}
    preferences = ("keep it short", "a wealth of facts"), ({"concise": 1.0}, {"informative": 1.0})
    for short, long in preferences:
        for i, prompt in enumerate(prompts[:6]):
            answers = {
                "short": model.chat(prompt, preference=short, max_new_tokens=64, seed=i),
                "long": model.chat(prompt, preference=long, max_new_tokens=64, seed=i),
            }
            assert answers["short"] != answers["long"]
            for key, answer in answers.items():
                lengths[key].append(len(answer.split()))
    assert 1.2 * np.mean(lengths["short"]) < np.mean(lengths["long"])


def test_native_and_reference_weigh_alike(model, prompts):
    reference = MixtureModel.from_pretrained(experts=trained_experts(), pcm=trained_pcm(), backend="reference")
    preference = "make me laugh, in a few words"
    outputs = [
        m.generate(
            **m.chat_inputs(prompts[0], preference=preference),
            preference=preference,
            max_new_tokens=6,
            do_sample=False,
            return_dict_in_generate=True,
        )
        for m in (model, reference)
    ]
    assert np.array_equal(outputs[0].sequences, outputs[1].sequences)
    assert np.allclose(np.log(outputs[0].mixture_weights), np.log(outputs[1].mixture_weights), atol=5e-3)
