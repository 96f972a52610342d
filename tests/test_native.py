"""The native backend against the reference, on every family, weight format and instruction set."""

import dataclasses
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from agreement import difference

from pcm_fast import MixtureModel, _native, reference
from pcm_fast.adapter import Adapter, AdapterSite
from pcm_fast.backends.native_model import inverse_frequencies
from pcm_fast.backends.native_models import reason_against
from pcm_fast.checkpoint import StoredTensor
from pcm_fast.experts import Expert
from pcm_fast.loader import load_checkpoint
from pcm_fast.pcm import CallablePCM, LearnedPCM, load_pcm
from pcm_fast.presets import prompted_experts
from pcm_fast.spec import ModelSpec

LICENSE = Path(__file__).parents[1] / "LICENSE"
FAMILIES = ["llama", "llama_biased", "mistral", "qwen2", "qwen3"]
RULES = ["linear", "log_linear", "power(-1)"]


def tokens_of(seed, *shape, vocabulary=320):
    return np.random.default_rng(seed).integers(3, vocabulary, size=shape)


@pytest.fixture(scope="module", params=FAMILIES)
def spec(request, tiny_models, random_adapter):
    """The base, two adapters of different ranks and a prompted expert, under a learned PCM with an adapter."""
    checkpoint = load_checkpoint(tiny_models[request.param])
    config = checkpoint.config
    rng = np.random.default_rng(5)
    experts = (
        Expert("base", None, None, None),
        Expert("one", random_adapter(config, rank=4, seed=1), None, None),
        Expert("two", random_adapter(config, rank=7, seed=2), None, None),
    )
    pcm = LearnedPCM(
        kind="shared",
        experts=("base", "one", "two"),
        template="{preference}",
        weight=rng.normal(size=(3, config.hidden_size)).astype(np.float32),
        bias=np.zeros(3, np.float32),
        adapter=random_adapter(config, rank=3, seed=3),
    )
    return ModelSpec(checkpoint, experts, pcm)


@pytest.fixture(params=_native.isas())
def isa(request, monkeypatch):
    monkeypatch.setenv("PCM_FAST_ISA", request.param)
    return request.param


def both(spec, weights="float32"):
    return MixtureModel(spec, backend="native", weights=weights, num_threads=2), MixtureModel(spec, backend="reference")


@pytest.mark.parametrize("rule", RULES)
def test_scores_are_those_of_the_reference(spec, isa, rule):
    native, reference = both(spec)
    ids = tokens_of(0, 2, 45)
    own = {"pcm_input_ids": tokens_of(1, 2, 5), "prompt_length": 3, "merge": rule}
    greatest, divergence = difference(native.log_probs(ids, **own)[:, 2:], reference.log_probs(ids, **own)[:, 2:])
    assert greatest < 1e-3
    assert divergence < 1e-7


def test_prompts_that_come_back_are_read_once(spec):
    """Rows that share a prompt of several blocks, and part of one, score as each of them does alone."""
    native, _ = both(spec)
    ids, pcm = tokens_of(6, 5, 60), tokens_of(7, 5, 35)
    ids[2:, :40], ids[1, :20], pcm[2:] = ids[0, :40], ids[0, :20], pcm[0]
    together = native.log_probs(ids, pcm_input_ids=pcm, prompt_length=40)
    for b in range(len(ids)):
        alone = native.log_probs(ids[b : b + 1], pcm_input_ids=pcm[b : b + 1], prompt_length=40)
        np.testing.assert_array_equal(together[b], alone[0])


@pytest.mark.parametrize("greedy", [True, False])
def test_answers_are_those_of_the_reference(spec, greedy):
    native, reference = both(spec)
    ids = tokens_of(2, 3, 20)
    mask = np.ones_like(ids)
    mask[1, :7] = 0
    options = {
        "pcm_input_ids": tokens_of(3, 3, 6),
        "max_new_tokens": 12,
        "do_sample": not greedy,
        "top_p": 0.9,
        "num_return_sequences": 2,
        "return_dict_in_generate": True,
        "seed": 9,
    }
    ours, theirs = native.generate(ids, mask, **options), reference.generate(ids, mask, **options)
    assert (ours.sequences == theirs.sequences).all()
    for name in ("logprobs", "mixture_weights", "expert_logprobs"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), atol=1e-3, rtol=1e-4)


def test_processors_criteria_and_torch_in_and_out(spec):
    native, reference = both(spec)
    ids = torch.as_tensor(tokens_of(4, 2, 9))

    def double(input_ids, scores):
        return scores * 2

    def after_six(input_ids, scores):
        return input_ids.shape[1] >= 15

    options = {
        "pcm_input_ids": tokens_of(3, 2, 6),
        "max_new_tokens": 10,
        "repetition_penalty": 1.3,
        "banned_tokens": [5, 6],
        "no_repeat_ngram_size": 2,
        "logits_processor": [double],
        "stopping_criteria": [after_six],
        "return_dict_in_generate": True,
    }
    ours, theirs = native.generate(ids, **options), reference.generate(ids, **options)
    assert isinstance(ours.sequences, torch.Tensor)
    assert ours.sequences.shape == (2, 15)
    assert torch.equal(ours.sequences, theirs.sequences)
    np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=2e-3)
    np.testing.assert_allclose(ours.expert_logprobs, theirs.expert_logprobs, atol=1e-3)


def test_a_row_does_not_depend_on_its_batch_or_on_threads(spec):
    ids = tokens_of(6, 5, 21)
    own = tokens_of(7, 5, 4)
    options = {"max_new_tokens": 10, "return_dict_in_generate": True, "temperature": 1.2}
    together = MixtureModel(spec, num_threads=2).generate(ids, pcm_input_ids=own, **options)
    for threads in (1, 3):
        model = MixtureModel(spec, backend="native", num_threads=threads)
        for row in range(5):
            alone = model.generate(ids[row : row + 1], pcm_input_ids=own[row : row + 1], first_sequence=row, **options)
            length = int(alone.lengths[0])
            assert (alone.sequences[0, : 21 + length] == together.sequences[row, : 21 + length]).all()
            assert (alone.logprobs[0, :length] == together.logprobs[row, :length]).all()


def test_callable_weights_and_a_row_that_ends_early(tiny_models):
    checkpoint = load_checkpoint(tiny_models["llama"])
    experts = (Expert("a", None, None, None), Expert("b", None, None, None))
    spec = ModelSpec(checkpoint, experts, load_pcm(lambda context: [0.25, 0.75], ["a", "b"], checkpoint))
    assert isinstance(spec.pcm, CallablePCM)
    native, reference = both(spec)
    ids = tokens_of(8, 4, 6)
    first = reference.generate(ids, max_new_tokens=8, do_sample=False)
    ends = int(first[0, 8])
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": ends}
    assert (native.generate(ids, **options) == reference.generate(ids, **options)).all()


def requantised(checkpoint, kind):
    """The checkpoint with its weight matrices in another format; both backends then read the same numbers."""
    tensors = dict(checkpoint.tensors)
    for name, tensor in tensors.items():
        if len(tensor.shape) == 2:
            rows = gguf.quants.quantize(tensor.dequantize(), getattr(gguf.GGMLQuantizationType, kind)).view(np.uint8)
            tensors[name] = StoredTensor(name, tensor.shape, kind, tensor.file, rows)
    return dataclasses.replace(checkpoint, tensors=tensors)


@pytest.mark.parametrize("kind", ["BF16", "F16", "Q8_0", "Q4_0", "Q4_1"])
def test_every_weight_format_is_read_exactly(tiny_models, isa, kind):
    checkpoint = requantised(load_checkpoint(tiny_models["llama_biased"]), kind)
    spec = ModelSpec(checkpoint, (Expert("base", None, None, None),), load_pcm("uniform", ["base"], checkpoint))
    native, reference = both(spec, "auto")
    ids = tokens_of(10, 2, 40)
    greatest, divergence = difference(native.log_probs(ids), reference.log_probs(ids))
    assert greatest < 1e-3
    assert divergence < 1e-7


def test_formats_may_differ_within_a_layer(tiny_models, isa):
    checkpoint = load_checkpoint(tiny_models["llama_biased"])
    tensors = dict(checkpoint.tensors)
    kinds = {"q_proj": "Q4_1", "k_proj": "Q8_0", "v_proj": "BF16", "gate_proj": "Q8_0", "up_proj": "Q4_0"}
    for site, kind in kinds.items():
        only = {name: tensor for name, tensor in tensors.items() if site in name and len(tensor.shape) == 2}
        tensors |= requantised(dataclasses.replace(checkpoint, tensors=only), kind).tensors
    checkpoint = dataclasses.replace(checkpoint, tensors=tensors)
    spec = ModelSpec(checkpoint, (Expert("base", None, None, None),), load_pcm("uniform", ["base"], checkpoint))
    native, reference = both(spec, "auto")
    ids = tokens_of(11, 2, 40)
    greatest, divergence = difference(native.log_probs(ids), reference.log_probs(ids))
    assert greatest < 1e-3
    assert divergence < 1e-7
    coarse = MixtureModel(spec, backend="native", activations="int8", num_threads=2)
    assert 1e-7 < difference(coarse.log_probs(ids), reference.log_probs(ids))[1] < 0.1


def test_8_bit_activations_need_weights_in_blocks(tiny_models):
    checkpoint = load_checkpoint(tiny_models["llama"])
    spec = ModelSpec(checkpoint, (Expert("base", None, None, None),), load_pcm("uniform", ["base"], checkpoint))
    with pytest.raises(ValueError, match="activations: expected one of 'float32', 'int8', got 'int4'"):
        MixtureModel(spec, activations="int4")
    with pytest.raises(ValueError, match="activations: expected 'float32' with weights='bfloat16', got 'int8'"):
        MixtureModel(spec, activations="int8", weights="bfloat16")
    with pytest.raises(ValueError, match="activations: the reference backend computes in float32"):
        MixtureModel(spec, activations="int8", backend="reference")
    with pytest.raises(ValueError, match="activations: 'int8' expects weights in blocks"):
        MixtureModel(spec, activations="int8").generate([[3, 4]], max_new_tokens=1)


TEXT = (
    "The tides are the rise and fall of the sea, caused by the pull of the moon and the sun on the turning earth. "
    "Twice a day the water comes up the beach, covers the rocks and the sand, and goes away again. Fishermen know "
    "the hours of the tide for as long as there have been boats; today a table tells them, years ahead, to the minute. "
    "In some bays the water climbs by more than ten metres, because the shape of the coast gathers it like a funnel. "
)


@pytest.fixture(scope="module")
def smollm2(embedded_checkpoint, random_adapter):
    """SmolLM2 with two random adapters and the base, a text, and the reference's scores of it."""
    config = embedded_checkpoint.config
    experts = (
        Expert("base", None, None, None),
        Expert("one", random_adapter(config, rank=8, seed=1, size=0.2), None, None),
        Expert("two", random_adapter(config, rank=16, seed=2, size=0.2), None, None),
    )
    spec = ModelSpec(embedded_checkpoint, experts, load_pcm("uniform", ["base", "one", "two"], embedded_checkpoint))
    ids = embedded_checkpoint.tokenizer.encode(TEXT + LICENSE.read_text(encoding="utf-8")[1500:4200])
    assert len(ids) > 512
    return spec, ids, MixtureModel(spec, backend="reference").log_probs([ids])


def test_smollm2_from_its_own_blocks(smollm2, isa):
    spec, ids, expected = smollm2
    count = 60 if isa == "generic" else len(ids)
    ours = MixtureModel(spec, backend="native", weights="gguf").log_probs([ids[:count]])
    greatest, divergence = difference(ours, expected[:, :count])
    assert greatest < 1e-3
    assert divergence < 1e-7


def test_8_bit_activations_stay_close(smollm2, isa):
    spec, ids, expected = smollm2
    count = 60 if isa == "generic" else len(ids)
    ours = MixtureModel(spec, backend="native", activations="int8").log_probs([ids[:count]])
    assert difference(ours, expected[:, :count])[1] < 1.5e-2


@pytest.mark.parametrize(("weights", "most", "divergence"), [("bfloat16", 0.1, 5e-4), ("q8_0", 0.3, 5e-3)])
def test_smaller_weights_stay_close(smollm2, weights, most, divergence):
    # SmolLM2's blocks are 4-bit, so these options round numbers that are already rounded. That shifts a few unlikely
    # tokens by more than `most`, whatever the kernel does (it reads every format exactly, see above): hence a quantile.
    spec, ids, expected = smollm2
    ours = MixtureModel(spec, backend="native", weights=weights).log_probs([ids])
    likely = expected > np.log(1e-6)
    assert np.quantile(np.abs(ours - expected)[likely], 0.99) < most
    assert difference(ours, expected)[1] < divergence


def test_smollm2_greedy_answers_of_prompted_experts():
    native = MixtureModel.from_pretrained(experts=prompted_experts("concise", "humorous"), backend="native")
    for question in ("Tell me about dogs.", "Why does the sea have tides?"):
        preference = {"concise": 1.0, "humorous": 0.7}
        inputs = native.chat_inputs(question, preference=preference)
        options = {"preference": preference, "max_new_tokens": 16, "do_sample": False}
        ours = native.generate(**inputs, **options)
        theirs = reference.generate(native, **inputs, **options)
        assert (np.asarray(ours) == np.asarray(theirs)).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_rotary_frequencies_are_those_of_transformers(family, tiny_models):
    from pcm_fast.transformers_model import build_model

    checkpoint = load_checkpoint(tiny_models[family])
    expected = build_model(checkpoint).model.rotary_emb.inv_freq.numpy()
    np.testing.assert_allclose(inverse_frequencies(checkpoint.config), expected, rtol=1e-6)


def test_what_it_does_not_run_is_said(tiny_models, caplog):
    checkpoint = load_checkpoint(tiny_models["llama"])
    base = Expert("base", None, None, None)
    odd = dataclasses.replace(checkpoint, config=dataclasses.replace(checkpoint.config, intermediate_size=100))
    unknown = dataclasses.replace(checkpoint, config=None, family_reason="the architecture 'gpt2'")
    short = dataclasses.replace(checkpoint, config=dataclasses.replace(checkpoint.config, vocab_size=300))
    embedding = Adapter(
        None, {"model.embed_tokens": AdapterSite(np.ones((1, 4), np.float32), np.ones((4, 1), np.float32), 1.0)}
    )
    for expert, reason in [
        (Expert("own", None, None, odd), "intermediate_size 100 is no multiple of 16 (expert 'own')"),
        (Expert("own", None, None, unknown), "the architecture 'gpt2' (expert 'own')"),
        (Expert("own", None, None, short), "a vocabulary of 300 tokens (expert 'own')"),
        (Expert("own", embedding, None, None), "an adapter on model.embed_tokens"),
    ]:
        spec = ModelSpec(checkpoint, (base, expert), load_pcm("uniform", ["base", "own"], checkpoint))
        assert reason_against(spec) == reason
        with pytest.raises(ValueError, match=r"backend: the native backend does not run .*; use backend='reference'"):
            MixtureModel(spec, backend="native")
    assert MixtureModel(spec).backend == "reference"
    assert "running on the slow reference backend" in caplog.text
    plain = ModelSpec(checkpoint, (base,), load_pcm("uniform", ["base"], checkpoint))
    assert MixtureModel(plain).backend == "native"
    with pytest.raises(ValueError, match="weights: expected a GGUF file for 'gguf'"):
        MixtureModel(plain, weights="gguf").generate([[3, 4]], max_new_tokens=1)
