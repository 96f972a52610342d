"""MixtureModel as a whole: arguments in, results out. What it computes is in test_reference.py."""

import json

import numpy as np
import pytest
import torch
import transformers

from pcm_fast import reference
from pcm_fast.generation import GenerateOutput
from pcm_fast.model import MixtureModel, ModelSpec
from pcm_fast.pcm import LearnedPCM
from pcm_fast.pcm_file import save_pcm

EXPERTS = {"concise": {"system": "Be concise."}, "friendly": {"system": "Be friendly."}, "base": None}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny matrices are not worth a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def chatty(embedded_checkpoint, make_tiny_model):
    """A tiny random model with the tokenizer and the chat template of the embedded one."""
    tokenizer = embedded_checkpoint.tokenizer
    directory = make_tiny_model("llama", vocab_size=49152, hidden_size=16, num_attention_heads=2, num_key_value_heads=1)
    tokenizer.backend.save(str(directory / "tokenizer.json"))
    settings = {"chat_template": tokenizer.chat_template, **tokenizer.special_tokens}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture(scope="module")
def model(chatty):
    return MixtureModel.from_pretrained(chatty, EXPERTS)


@pytest.fixture
def ids():
    return np.random.default_rng(1).integers(3, 49152, size=(2, 6))


# Loading


def test_what_is_loaded(model, chatty):
    assert model.expert_names == ("concise", "friendly", "base")
    assert model.backend == "reference"
    assert isinstance(model.spec, ModelSpec)
    assert model.tokenizer.decode(model.tokenizer.encode("Why?")) == "Why?"
    assert MixtureModel.from_pretrained(chatty).expert_names == ("base",)
    assert MixtureModel(model.spec, backend="reference", weights="float32", num_threads=1).spec is model.spec


def test_the_embedded_model_is_the_default():
    model = MixtureModel.from_pretrained()
    assert model.spec.checkpoint.config.num_layers == 30


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"base": 3}, TypeError, "base: expected a path or the name of the embedded model, got 3"),
        ({"base": "no/such/model"}, ValueError, "no/such/model: expected a Hugging Face directory"),
        ({"experts": {"a": "no/such/place"}}, ValueError, "no/such/place"),
        ({"experts": {"a": 3}}, TypeError, r"experts\['a'\]"),
        ({"pcm": "no/such/pcm"}, ValueError, "pcm: no/such/pcm: expected 'uniform' or the directory of a learned PCM"),
        ({"pcm": {"rude": 1}}, ValueError, r"pcm: expected names of experts \('base'\), got 'rude'"),
        (
            {"backend": "cuda"},
            ValueError,
            "backend: expected one of 'auto', 'reference', 'native', 'torch', got 'cuda'",
        ),
        ({"device": "cpu"}, ValueError, "device: only backend='torch' runs on a device of choice; this one is"),
        ({"backend": "torch", "device": "tpu"}, ValueError, "device: expected 'cuda', 'cuda:N' or 'cpu', got 'tpu'"),
        (
            {"backend": "torch", "device": 0},
            TypeError,
            "device: expected a name such as 'cuda' or .*, got 0",
        ),
        ({"backend": "torch", "weights": "q8_0"}, ValueError, "weights: expected one of .* with backend='torch'"),
        ({"backend": "torch", "activations": "int8"}, ValueError, "activations: expected 'float32' with backend='t"),
        ({"weights": "int3"}, ValueError, "weights: expected one of 'auto', .*, got 'int3'"),
        (
            {"backend": "reference", "weights": "q8_0"},
            ValueError,
            "weights: the reference backend computes in float32; expected 'auto' or 'float32', got 'q8_0'",
        ),
        ({"num_threads": 0}, ValueError, "num_threads: expected an integer >= 1 or None, got 0"),
        ({"num_threads": "two"}, TypeError, "num_threads: expected an integer >= 0, got 'two'"),
        ({"devices": "cpu"}, TypeError, "unexpected keyword argument 'devices'"),
    ],
)
def test_bad_models(chatty, arguments, error, message):
    with pytest.raises(error, match=message):
        MixtureModel.from_pretrained(**{"base": chatty, **arguments})


def test_the_spec_is_a_spec():
    with pytest.raises(TypeError, match="spec: expected a ModelSpec, got 'smollm2'"):
        MixtureModel("smollm2")


def test_a_model_without_a_tokenizer(tiny_llama_dir):
    model = MixtureModel.from_pretrained(tiny_llama_dir)
    with pytest.raises(ValueError, match=r"tokenizer: .* has none"):
        _ = model.tokenizer
    with pytest.raises(ValueError, match="chat: the base has no chat template"):
        model.chat("Hi")
    assert model.generate([[5, 6]], max_new_tokens=2, eos_token_id=[]).shape == (1, 4)


# generate


def test_arrays_come_back_as_they_came_in(model, ids):
    arguments = {"max_new_tokens": 3, "return_dict_in_generate": True, "eos_token_id": []}
    from_lists, from_numpy, from_torch = (
        model.generate(given, **arguments) for given in (ids.tolist(), ids, torch.from_numpy(ids))
    )
    for output, kind in ((from_lists, np.ndarray), (from_numpy, np.ndarray), (from_torch, torch.Tensor)):
        assert isinstance(output, GenerateOutput)
        for name in ("sequences", "lengths", "logprobs", "mixture_weights", "expert_logprobs"):
            assert isinstance(output[name], kind)
            np.testing.assert_array_equal(np.asarray(output[name]), from_lists[name])
    assert from_lists.sequences.shape == (2, 9)
    assert from_lists.logprobs.shape == (2, 3)
    assert from_lists.mixture_weights.shape == from_lists.expert_logprobs.shape == (2, 3, 3)
    assert from_lists.expert_names == model.expert_names
    assert set(from_lists.timings) == {"prefill", "decode", "time_to_first_token", "tokens"}
    np.testing.assert_array_equal(model.generate(ids, max_new_tokens=3, eos_token_id=[]), from_lists.sequences)


def test_dtypes(model, ids):
    output = model.generate(ids, max_new_tokens=2, return_dict_in_generate=True)
    assert output.sequences.dtype == output.lengths.dtype == np.int64
    assert output.logprobs.dtype == output.mixture_weights.dtype == output.expert_logprobs.dtype == np.float32


def test_an_expert_reads_its_system_turn_and_then_the_ids(model, ids):
    system = model.tokenizer.encode("<|im_start|>system\nBe concise.<|im_end|>\n", add_special_tokens=False)
    output = model.generate(ids[:1], preference="concise", max_new_tokens=4, seed=3, eos_token_id=[])
    base = MixtureModel.from_pretrained(model.spec.checkpoint.path)
    same = base.generate([[*system, *ids[0]]], max_new_tokens=4, seed=3, eos_token_id=[])
    np.testing.assert_array_equal(output[0, 6:], same[0, len(system) + 6 :])


def test_the_reference_is_the_same_by_any_door(model, ids):
    expected = model.generate(ids, max_new_tokens=4, seed=2)
    for door in (model, model.spec, model.reference):
        np.testing.assert_array_equal(reference.generate(door, ids, max_new_tokens=4, seed=2), expected)
    expected = model.log_probs(ids, preference="friendly")
    np.testing.assert_array_equal(reference.log_probs(model, ids, preference="friendly"), expected)


def test_the_number_of_threads_is_given_back(model, ids):
    seen = []
    before = torch.get_num_threads()
    MixtureModel(model.spec, num_threads=2).generate(
        ids, max_new_tokens=1, stopping_criteria=lambda input_ids, scores: seen.append(torch.get_num_threads()) or False
    )
    assert seen == [2]
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"input_ids": [[49152]]}, ValueError, r"input_ids: expected token ids in \[0, 49152\), got 49152 in row 0"),
        ({"input_ids": []}, ValueError, "input_ids: expected at least one row"),
        ({"attention_mask": [[1, 1, 0]]}, ValueError, "attention_mask: expected padding on the left only"),
        ({"preference": {"rude": 1}}, ValueError, "preference: expected names of experts .* got 'rude'"),
        ({"preference": {"concise": -1}}, ValueError, "preference: expected a strength >= 0 for 'concise', got -1"),
        ({"preference": "rude"}, ValueError, "preference: 'rude' names none of the active experts"),
        ({"active": ["rude"]}, ValueError, "active: expected names of experts .* got 'rude'"),
        (
            {"eos_token_id": 49152},
            ValueError,
            "eos_token_id: expected token ids below the vocabulary size 49152, got 49152",
        ),
        (
            {"eos_token_id": "end"},
            TypeError,
            "eos_token_id: expected a token id, a sequence of them or None, got 'end'",
        ),
        ({"eos_token_id": [-1]}, ValueError, "eos_token_id: expected an integer >= 0, got -1"),
        ({"pad_token_id": 49152}, ValueError, "pad_token_id: expected a token id below the vocabulary size 49152"),
        ({"banned_tokens": [49152]}, ValueError, "banned_tokens: expected token ids below the vocabulary size 49152"),
        ({"logit_bias": {49152: 1}}, ValueError, "logit_bias: expected token ids below the vocabulary size 49152"),
        ({"expert_input_ids": {"rude": [[1]]}}, ValueError, "expert_input_ids: expected names of experts"),
        ({"pcm_input_ids": [[1]]}, ValueError, "pcm_input_ids: expected None"),
        (
            {"max_new_tokens": 250},
            ValueError,
            "max_new_tokens: expert 'concise' reads 11 tokens, .* 256 pos.* at most 245",
        ),
        (
            {"num_return_sequences": 2, "streamer": transformers.TextStreamer(None)},
            ValueError,
            "streamer: expected one",
        ),
        ({"temprature": 0.5}, TypeError, "unexpected keyword argument 'temprature'"),
    ],
)
def test_bad_calls_of_generate(model, arguments, error, message):
    with pytest.raises(error, match=message):
        model.generate(**{"input_ids": [[5, 6, 7]], **arguments})


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"merge": "mean"}, ValueError, "merge: expected 'linear'"),
        ({"prompt_length": 0}, ValueError, "prompt_length: expected 1 to the 3 tokens of the row, got 0"),
        ({"prompt_length": 4}, ValueError, "prompt_length: expected 1 to the 3 tokens of the row, got 4"),
        ({"prompt_length": [1, 2]}, ValueError, "prompt_length: expected an integer or 1 of them, got 2"),
        ({"prompt_length": "all"}, TypeError, "prompt_length: expected an integer >= 0, got 'all'"),
        ({"preference": "rude"}, ValueError, "preference: 'rude' names none"),
        ({"input_ids": [[5] * 300]}, ValueError, "input_ids: expert 'concise' reads 308 tokens, .* 256 positions"),
        ({"temperature": 0.5}, TypeError, "unexpected keyword argument 'temperature'"),
    ],
)
def test_bad_calls_of_log_probs(model, arguments, error, message):
    with pytest.raises(error, match=message):
        model.log_probs(**{"input_ids": [[5, 6, 7]], **arguments})


# chat


def test_chat_is_generate_on_rendered_prompts(model):
    settings = {"max_new_tokens": 12, "seed": 5}
    answer = model.chat("Why?", preference="concise, friendly", **settings)
    inputs = model.chat_inputs("Why?", preference="concise, friendly")
    sequences = model.generate(**inputs, preference="concise, friendly", **settings)
    assert answer == model.tokenizer.decode(sequences[0, len(inputs["input_ids"][0]) :].tolist())
    assert answer == model.chat([{"role": "user", "content": "Why?"}], preference="concise, friendly", **settings)


def test_chat_streams_what_it_returns(model):
    settings = {"preference": "friendly", "max_new_tokens": 12, "seed": 6}
    answer = model.chat("Why?", **settings)
    pieces = []
    assert model.chat("Why?", streamer=pieces.append, **settings) == answer
    assert "".join(pieces) == answer
    assert len(pieces) > 3
    assert "".join(model.stream_chat("Why?", **settings)) == answer


def test_chat_takes_transformers_streamers(model, chatty, capsys):
    settings = {"max_new_tokens": 8, "seed": 7}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(chatty / "tokenizer.json"))
    streamer = transformers.TextStreamer(tokenizer, skip_prompt=True)
    answer = model.chat("Why?", streamer=streamer, **settings)
    assert capsys.readouterr().out == answer + "\n"


@pytest.mark.parametrize("name", ["input_ids", "num_return_sequences", "return_dict_in_generate", "expert_input_ids"])
def test_chat_is_for_one_text(model, name):
    with pytest.raises(TypeError, match=rf"chat\(\) got an unexpected keyword argument '{name}'"):
        model.chat("Why?", **{name: 1})


def test_bad_conversations_and_streamers(model):
    with pytest.raises(TypeError, match="messages: expected text or a list of messages, got 3"):
        model.chat(3)
    with pytest.raises(TypeError, match="streamer: expected an object with the methods put and end, got 3"):
        model.chat("Why?", streamer=3)
    with pytest.raises(TypeError, match=r"stream_chat\(\) got an unexpected keyword argument 'streamer'"):
        model.stream_chat("Why?", streamer=print)
    with pytest.raises(TypeError, match="unexpected keyword argument 'temprature'"):
        model.chat("Why?", temprature=1)


def test_a_learned_pcm_reads_the_preference(chatty, tmp_path):
    rng = np.random.default_rng(2)
    head = rng.normal(size=(3, 16)).astype(np.float32) * 0.1, np.zeros(3, np.float32)
    save_pcm(LearnedPCM("shared", ("base", "concise", "friendly"), "They want: {preference}", *head), tmp_path)
    model = MixtureModel.from_pretrained(chatty, EXPERTS, pcm=tmp_path)
    weights = []
    for preference in ("short and sweet", "long and sour"):
        inputs = model.chat_inputs("Why?", preference=preference)
        assert f"They want: {preference}" in model.tokenizer.decode(inputs["pcm_input_ids"][0])
        output = model.generate(**inputs, preference=preference, max_new_tokens=4, return_dict_in_generate=True)
        weights.append(output.mixture_weights)
        np.testing.assert_allclose(output.mixture_weights.sum(-1)[0, : output.lengths[0]], 1, rtol=1e-6)
    assert np.abs(weights[0][0, 0] - weights[1][0, 0]).max() > 1e-4
