"""Where the weights come from. How a learned PCM is run is in test_reference.py."""

import json
import math

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save_file

from pcm_fast.adapter import Adapter, AdapterSite
from pcm_fast.loader import LoadError, load_checkpoint
from pcm_fast.pcm import (
    CallablePCM,
    FixedPCM,
    LearnedPCM,
    NamedPCM,
    PCMContext,
    UniformPCM,
    called_weights,
    load_pcm,
    static_weights,
)
from pcm_fast.pcm_file import read_pcm, save_pcm
from pcm_fast.preference import resolve_preference
from pcm_fast.sampling import MergeRule

NAMES = ("concise", "friendly", "humorous")
LINEAR = MergeRule.parse("linear")
LOG_LINEAR = MergeRule.parse("log_linear")


def weights_of(pcm, preference=None, rule=LINEAR, active=None):
    return static_weights(pcm, resolve_preference(preference, NAMES, active), NAMES, rule)


def context(rows=2, preference=None, active=None):
    prompts = tuple(np.arange(3 + row) for row in range(rows))
    generated = tuple(np.arange(2) for _ in range(rows))
    return PCMContext(resolve_preference(preference, NAMES, active), NAMES, prompts, generated, 2)


# Weights that are known beforehand


@pytest.mark.parametrize(
    "pcm, preference, active, expected",
    [
        (NamedPCM(), None, None, [1 / 3, 1 / 3, 1 / 3]),
        (NamedPCM(), None, ["friendly"], [0, 1, 0]),
        (NamedPCM(), {"concise": 3.0, "humorous": 1.0}, None, [0.75, 0, 0.25]),
        (NamedPCM(), {"concise": 3.0}, ["concise", "friendly"], [1, 0, 0]),
        (NamedPCM(), "concise and humorous, please", None, [0.5, 0, 0.5]),
        (NamedPCM(), "concise and humorous, please", ["concise", "friendly"], [1, 0, 0]),
        (UniformPCM(), "whatever", None, [1 / 3, 1 / 3, 1 / 3]),
        (UniformPCM(), {"concise": 1, "friendly": 9}, None, [0.5, 0.5, 0]),
        (FixedPCM({"concise": 0.7, "friendly": 0.3}), "whatever", None, [0.7, 0.3, 0]),
        (FixedPCM({"concise": 7, "friendly": 3}), None, None, [0.7, 0.3, 0]),
        (FixedPCM({"concise": 0.7, "friendly": 0.3}), {"friendly": 1}, None, [0, 1, 0]),
    ],
)
def test_static_weights(pcm, preference, active, expected):
    weights = weights_of(pcm, preference, active=active)
    assert weights.dtype == np.float32
    np.testing.assert_array_equal(weights, np.array(expected, dtype=np.float32))


def test_fixed_weights_of_a_log_linear_merge_are_taken_as_they_are():
    pcm = FixedPCM({"concise": 1.5, "friendly": -1.0})
    np.testing.assert_array_equal(weights_of(pcm, rule=LOG_LINEAR), np.float32([1.5, -1, 0]))


def test_negative_fixed_weights_need_log_linear():
    with pytest.raises(ValueError, match=r"pcm: expected weights >= 0 under merge='linear', got \[1.5, -1.0, 0.0\]"):
        weights_of(FixedPCM({"concise": 1.5, "friendly": -1.0}))


def test_text_that_names_no_expert_says_what_to_do():
    message = r"'make me smile' names none of the active experts \('concise', .*mapping.*pcm='uniform'.*learned PCM"
    with pytest.raises(ValueError, match=message):
        weights_of(NamedPCM(), "make me smile")


def test_text_that_names_only_inactive_experts():
    with pytest.raises(ValueError, match=r"'humorous' names none of the active experts \('concise'\)"):
        weights_of(NamedPCM(), "humorous", active=["concise"])


def test_no_weight_is_left():
    with pytest.raises(ValueError, match=r"pcm: expected a weight other than 0 .* active experts \('humorous'\)"):
        weights_of(FixedPCM({"concise": 1.0}), active=["humorous"])


@pytest.mark.parametrize("pcm", [CallablePCM(lambda context: [1, 1, 1]), LearnedPCM("shared", NAMES, "", 0, 0)])
def test_other_weights_depend_on_the_text(pcm):
    assert weights_of(pcm, "whatever") is None


# Callables


@pytest.mark.parametrize(
    "answer, expected",
    [
        ({"concise": 1.0, "humorous": 3.0}, [[0.25, 0, 0.75]] * 2),
        ([1, 1, 2], [[0.25, 0.25, 0.5]] * 2),
        (np.float32([[1, 0, 0], [0, 1, 1]]), [[1, 0, 0], [0, 0.5, 0.5]]),
        (torch.tensor([[1, 0, 0], [0, 1, 1]], dtype=torch.bfloat16), [[1, 0, 0], [0, 0.5, 0.5]]),
    ],
)
def test_a_callable_may_answer_in_several_forms(answer, expected):
    weights = called_weights(CallablePCM(lambda context: answer), context(), LINEAR)
    np.testing.assert_array_equal(weights, np.float32(expected))


def test_a_callable_is_shown_its_context():
    seen = []
    called_weights(CallablePCM(lambda shown: seen.append(shown) or [1, 1, 1]), context(preference="brief"), LINEAR)
    (shown,) = seen
    assert shown.preference.text == "brief"
    assert shown.expert_names == NAMES
    assert (len(shown.prompts), len(shown.generated), shown.step) == (2, 2, 2)


def test_inactive_experts_lose_their_weight():
    pcm = CallablePCM(lambda context: [1, 1, 2])
    weights = called_weights(pcm, context(active=["concise", "humorous"]), LINEAR)
    np.testing.assert_array_equal(weights, np.float32([[1 / 3, 0, 2 / 3]] * 2))


def test_signed_answers_of_a_log_linear_merge_are_taken_as_they_are():
    weights = called_weights(CallablePCM(lambda context: [2, -1, 0.5]), context(), LOG_LINEAR)
    np.testing.assert_array_equal(weights, np.float32([[2, -1, 0.5]] * 2))


@pytest.mark.parametrize(
    "answer, error, message",
    [
        ([1, 1], ValueError, r"a mapping, an array of shape \[3\] or one of shape \[2, 3\], got shape \[2\]"),
        (np.ones((3, 3)), ValueError, r"got shape \[3, 3\]"),
        (1.0, ValueError, r"got shape \[\]"),
        ("concise", TypeError, "expected the callable to return numbers, got 'concise'"),
        (None, ValueError, "expected finite weights|got shape"),
        ([[1, 1, 1], [1, math.nan, 1]], ValueError, r"expected finite weights, got \[1.0, nan, 1.0\]"),
        ([[1, 1, 1], [1, -1, 1]], ValueError, r"expected weights >= 0 under merge='linear', got \[1.0, -1.0, 1.0\]"),
        ([[1, 1, 1], [0, 0, 0]], ValueError, "expected a weight other than 0"),
        ({"rude": 1.0}, ValueError, "callable's answer: expected names of experts .* got 'rude'"),
        ({"concise": math.inf}, ValueError, "callable's answer: expected a finite number for 'concise'"),
    ],
)
def test_bad_answers_of_a_callable(answer, error, message):
    with pytest.raises(error, match=message):
        called_weights(CallablePCM(lambda context: answer), context(), LINEAR)


# Learned PCMs


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Two tiny checkpoints that differ in hidden size and vocabulary."""
    checkpoints = []
    for hidden, vocabulary in ((16, 53), (8, 61)):
        config = transformers.LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
        directory = tmp_path_factory.mktemp("base")
        transformers.LlamaForCausalLM(config).save_pretrained(directory)
        checkpoints.append(load_checkpoint(directory))
    return checkpoints


def random_pcm(seed=0, hidden=16, **fields):
    rng = np.random.default_rng(seed)
    head = rng.normal(size=(3, hidden)).astype(np.float32), rng.normal(size=3).astype(np.float32)
    return LearnedPCM("shared", NAMES, "The user wants: {preference}", *head, **fields)


def test_learned_weights_are_a_softmax_over_the_active_experts():
    pcm = random_pcm()
    hidden = np.random.default_rng(1).normal(size=(5, 16)).astype(np.float32) * 20
    scores = hidden.astype(np.float64) @ pcm.weight.T.astype(np.float64) + pcm.bias
    for active in ((0, 1, 2), (0, 2), (1,)):
        weights = pcm.weights(hidden, active)
        expected = np.zeros((5, 3))
        chosen = np.exp(scores[:, active] - scores[:, active].max(axis=1, keepdims=True))
        expected[:, active] = chosen / chosen.sum(axis=1, keepdims=True)
        assert weights.dtype == np.float32
        np.testing.assert_allclose(weights, expected, rtol=2e-4, atol=1e-30)
        assert (weights[:, [i for i in range(3) if i not in active]] == 0).all()


def test_the_head_follows_the_order_of_the_experts():
    pcm = random_pcm()
    reordered = pcm.for_experts(["humorous", "concise"])
    assert reordered.experts == ("humorous", "concise")
    np.testing.assert_array_equal(reordered.weight, pcm.weight[[2, 0]])
    np.testing.assert_array_equal(reordered.bias, pcm.bias[[2, 0]])
    with pytest.raises(ValueError, match=r"trained for the experts 'concise', 'friendly', 'humorous'; .* for 'rude'"):
        pcm.for_experts(["rude"])


def test_the_preference_goes_into_the_system_turn():
    pcm = random_pcm()
    assert pcm.system_turn(resolve_preference("be {brief}", NAMES)) == "The user wants: be {brief}"
    assert pcm.system_turn(resolve_preference(None, NAMES)) == "The user wants: no particular preference"


@pytest.fixture
def adapter():
    rng = np.random.default_rng(2)
    sites = {}
    for site, rank, (rows, columns), scaling in (
        ("model.layers.0.self_attn.q_proj", 3, (16, 16), 2.0),
        ("model.layers.0.mlp.down_proj", 2, (16, 24), 0.75),
    ):
        a, b = rng.normal(size=(rank, columns)), rng.normal(size=(rows, rank))
        sites[site] = AdapterSite(a.astype(np.float32), b.astype(np.float32), scaling)
    return Adapter(path=None, sites=sites)


@pytest.mark.parametrize("with_adapter", [False, True])
def test_a_shared_pcm_survives_saving(tmp_path, bases, adapter, with_adapter):
    pcm = random_pcm(adapter=adapter if with_adapter else None)
    save_pcm(pcm, tmp_path / "pcm")
    loaded = read_pcm(tmp_path / "pcm", bases[0])
    assert (loaded.kind, loaded.experts, loaded.template) == (pcm.kind, pcm.experts, pcm.template)
    np.testing.assert_array_equal(loaded.weight, pcm.weight)
    np.testing.assert_array_equal(loaded.bias, pcm.bias)
    if not with_adapter:
        assert loaded.adapter is None
        return
    assert loaded.adapter.sites.keys() == adapter.sites.keys()
    for name, site in adapter.sites.items():
        np.testing.assert_array_equal(loaded.adapter.sites[name].A, site.A)
        np.testing.assert_array_equal(loaded.adapter.sites[name].B, site.B)
        assert loaded.adapter.sites[name].scaling == site.scaling


def test_peft_reads_the_adapter_of_a_saved_pcm(tmp_path, bases, adapter):
    import peft

    save_pcm(random_pcm(adapter=adapter), tmp_path / "pcm")
    base = transformers.AutoModelForCausalLM.from_pretrained(bases[0].path)
    before = {name: p.clone() for name, p in base.named_parameters()}
    merged = dict(peft.PeftModel.from_pretrained(base, tmp_path / "pcm").merge_and_unload().named_parameters())
    for name, weight in before.items():
        site = adapter.sites.get(name.removesuffix(".weight"))
        delta = 0 if site is None else site.scaling * torch.from_numpy(site.B @ site.A)
        torch.testing.assert_close(merged[name], weight + delta)


def test_a_separate_pcm_survives_saving(tmp_path, bases):
    pcm = random_pcm(checkpoint=bases[0])
    pcm = LearnedPCM("separate", pcm.experts, pcm.template, pcm.weight, pcm.bias, checkpoint=bases[0])
    save_pcm(pcm, tmp_path / "pcm")
    save_pcm(read_pcm(tmp_path / "pcm", bases[0]), tmp_path / "pcm")  # onto itself
    loaded = read_pcm(tmp_path / "pcm", bases[0])
    assert loaded.kind == "separate"
    assert loaded.checkpoint.path == tmp_path / "pcm" / "model"
    assert loaded.checkpoint.config == bases[0].config


def test_a_separate_pcm_shares_the_vocabulary(tmp_path, bases):
    pcm = random_pcm()
    save_pcm(LearnedPCM("separate", pcm.experts, pcm.template, pcm.weight, pcm.bias, checkpoint=bases[0]), tmp_path)
    with pytest.raises(LoadError, match=r"model: vocabulary mismatch: expected the 61 tokens of .*, got 53"):
        read_pcm(tmp_path, bases[1])


def test_the_head_fits_the_model(tmp_path, bases):
    save_pcm(random_pcm(), tmp_path)
    with pytest.raises(LoadError, match=r"head.safetensors: weight: expected shape \[3, 8\] .*, got \[3, 16\]"):
        read_pcm(tmp_path, bases[1])


@pytest.mark.parametrize(
    "description, message",
    [
        (None, "pcm.json: cannot be read: No such file"),
        ("{", "pcm.json: expected JSON"),
        ([], r"pcm.json: expected exactly the keys \['experts', 'kind', 'template'\], got list"),
        ({"kind": "shared"}, r"pcm.json: expected exactly the keys .*, got \['kind'\]"),
        ({"kind": "other"}, "pcm.json: kind: expected 'shared' or 'separate', got 'other'"),
        ({"experts": "concise"}, "pcm.json: experts: expected a list of distinct names, got 'concise'"),
        ({"experts": ["a", "a"]}, r"pcm.json: experts: expected a list of distinct names, got \['a', 'a'\]"),
        ({"template": "no place"}, "pcm.json: template: expected text with '{preference}' in it, got 'no place'"),
    ],
)
def test_bad_descriptions(tmp_path, bases, description, message):
    save_pcm(random_pcm(), tmp_path)
    path = tmp_path / "pcm.json"
    if description is None:
        path.unlink()
    elif isinstance(description, str):
        path.write_text(description)
    elif len(description) != 1 or description == {"kind": "shared"}:
        path.write_text(json.dumps(description))
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), **description}))
    with pytest.raises(LoadError, match=message):
        read_pcm(tmp_path, bases[0])


@pytest.mark.parametrize(
    "tensors, message",
    [
        (None, "head.safetensors: does not exist"),
        (b"garbage", "head.safetensors: expected float32 safetensors"),
        ({"weight": np.zeros((3, 16), np.float32)}, r"expected the tensors \['bias', 'weight'\], got \['weight'\]"),
        (
            {"weight": np.zeros((2, 16), np.float32), "bias": np.zeros(3, np.float32)},
            r"weight: expected shape \[3, hidden size\], got \[2, 16\]",
        ),
        (
            {"weight": np.zeros((3, 16), np.float32), "bias": np.zeros(2, np.float32)},
            r"bias: expected shape \[3\], got \[2\]",
        ),
        (
            {"weight": np.zeros((3, 16), np.float64), "bias": np.zeros(3, np.float32)},
            "weight: expected finite float32 numbers, got float64",
        ),
        (
            {"weight": np.full((3, 16), np.nan, np.float32), "bias": np.zeros(3, np.float32)},
            "weight: expected finite float32 numbers",
        ),
    ],
)
def test_bad_heads(tmp_path, bases, tensors, message):
    save_pcm(random_pcm(), tmp_path)
    path = tmp_path / "head.safetensors"
    if tensors is None:
        path.unlink()
    elif isinstance(tensors, bytes):
        path.write_bytes(tensors)
    else:
        save_file(tensors, path)
    with pytest.raises(LoadError, match=message):
        read_pcm(tmp_path, bases[0])


# What from_pretrained takes


def test_load_pcm_takes_every_form(tmp_path, bases):
    base = bases[0]
    assert load_pcm(None, NAMES, base) == NamedPCM()
    assert load_pcm("uniform", NAMES, base) == UniformPCM()
    assert load_pcm({"concise": 1}, NAMES, base) == FixedPCM({"concise": 1.0})
    assert isinstance(load_pcm(lambda context: [1, 0, 0], NAMES, base), CallablePCM)
    save_pcm(random_pcm(), tmp_path)
    for source in (tmp_path, str(tmp_path), random_pcm()):
        assert load_pcm(source, ["friendly", "concise"], base).experts == ("friendly", "concise")


@pytest.mark.parametrize(
    "source, error, message",
    [
        ("uniformly", LoadError, "pcm: uniformly: expected 'uniform' or the directory of a learned PCM"),
        (
            3,
            TypeError,
            "pcm: expected None, 'named', 'uniform', a mapping from expert to weight, a callable or a directory, got 3",
        ),
        ({}, ValueError, "pcm: expected at least one of the experts"),
        ({"rude": 1}, ValueError, r"pcm: expected names of experts \('concise', .*\), got 'rude'"),
        ({"concise": math.nan}, ValueError, "pcm: expected a finite number for 'concise', got nan"),
        ({"concise": None}, TypeError, "pcm: expected a number for 'concise', got None"),
    ],
)
def test_load_pcm_refuses_the_rest(bases, source, error, message):
    with pytest.raises(error, match=message):
        load_pcm(source, NAMES, bases[0])
