"""The torch backend on the CPU: the reference's numbers, and in an engine the tokens of a solo run."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from agreement import difference

from pcm_fast import MixtureModel, reference
from pcm_fast.backends import torch_kv
from pcm_fast.backends.torch_models import TorchModels
from pcm_fast.experts import Expert
from pcm_fast.loader import load_checkpoint
from pcm_fast.pcm import CallablePCM, LearnedPCM, NamedPCM, load_pcm
from pcm_fast.spec import ModelSpec

NAMES = ("base", "one", "two")
LONG = 100
LICENSE = Path(__file__).parents[2] / "LICENSE"


def ids_of(seed, *shape):
    return np.random.default_rng(seed).integers(3, 320, size=shape)


def on_torch(spec, **more):
    return MixtureModel(spec, backend="torch", device="cpu", num_threads=1, **more)


@pytest.fixture(scope="module")
def mixture(tiny_models, random_adapter):
    """``mixture(family, pcm)``: the base and two adapters of different ranks, under a learned PCM or by name."""

    def make(family="llama", learned=True, modules=None):
        checkpoint = load_checkpoint(tiny_models[family])
        config = checkpoint.config
        adapters = [random_adapter(config, rank=rank, seed=rank, modules=modules) for rank in (4, 7)]
        experts = (Expert("base"), *(Expert(name, a) for name, a in zip(NAMES[1:], adapters, strict=True)))
        if not learned:
            return ModelSpec(checkpoint, experts, NamedPCM())
        rng = np.random.default_rng(5)
        head = rng.normal(size=(3, config.hidden_size)).astype(np.float32), np.zeros(3, np.float32)
        pcm = LearnedPCM("shared", NAMES, "{preference}", *head, adapter=random_adapter(config, rank=3, seed=3))
        return ModelSpec(checkpoint, experts, pcm)

    return make


@pytest.fixture(scope="module")
def learned(mixture):
    return on_torch(mixture())


@pytest.fixture(scope="module")
def many_models(mixture, make_tiny_model):
    """Two experts on the base, one of other weights, and a PCM of a third family."""
    spec = mixture()
    own = load_checkpoint(make_tiny_model("llama_biased", seed=11, num_hidden_layers=2))
    separate = load_checkpoint(make_tiny_model("qwen3", seed=12, num_hidden_layers=2))
    pcm = LearnedPCM("separate", NAMES, "{preference}", spec.pcm.weight, spec.pcm.bias, checkpoint=separate)
    return on_torch(ModelSpec(spec.checkpoint, (*spec.experts[:2], Expert("two", checkpoint=own)), pcm))


@pytest.mark.parametrize("family", ["llama", "llama_biased", "mistral", "qwen2", "qwen3"])
def test_every_family_has_the_numbers_of_the_reference(mixture, family):
    model, ids = on_torch(mixture(family)), ids_of(0, 2, 45)
    own = {"pcm_input_ids": ids_of(1, 2, 5), "prompt_length": 3}
    greatest, divergence = difference(model.log_probs(ids, **own)[:, 2:], reference.log_probs(model, ids, **own)[:, 2:])
    assert greatest < 1e-3
    assert divergence < 1e-7
    options = {"pcm_input_ids": ids_of(3, 2, 6), "max_new_tokens": 10, "do_sample": False, "eos_token_id": []}
    assert (model.generate(ids[:, :20], **options) == reference.generate(model, ids[:, :20], **options)).all()


@pytest.mark.parametrize("which", ["learned", "many_models"])
@pytest.mark.parametrize("rule", ["linear", "log_linear", "power(-1)"])
def test_drawn_answers_are_those_of_the_reference(which, rule, request):
    model, ids = request.getfixturevalue(which), ids_of(2, 3, 20)
    mask = np.ones_like(ids)
    mask[1, :7] = 0
    options = {
        "pcm_input_ids": ids_of(3, 3, 6),
        "max_new_tokens": 20,  # over the end of a block
        "merge": rule,
        "top_p": 0.9,
        "top_k": 40,
        "num_return_sequences": 2,
        "return_dict_in_generate": True,
        "seed": 9,
    }
    ours, theirs = model.generate(ids, mask, **options), reference.generate(model, ids, mask, **options)
    assert (ours.sequences == theirs.sequences).all()
    for name in ("logprobs", "mixture_weights", "expert_logprobs"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), atol=1e-3, rtol=1e-3)


def test_an_adapter_on_the_lm_head(mixture):
    model, ids = on_torch(mixture(learned=False, modules=("lm_head", "v_proj"))), ids_of(4, 1, 30)
    greatest, divergence = difference(model.log_probs(ids), reference.log_probs(model, ids))
    assert greatest < 1e-3
    assert divergence < 1e-7


def test_processors_criteria_and_callables_are_seen_in_python(mixture):
    spec = mixture(learned=False)
    spec = ModelSpec(spec.checkpoint, spec.experts, CallablePCM(lambda context: [1, 2, 1 + context.step % 3]))
    model = on_torch(spec)
    options = {
        "max_new_tokens": 12,
        "repetition_penalty": 1.3,
        "stopping_criteria": [lambda input_ids, scores: input_ids.shape[1] >= 17],
        "return_dict_in_generate": True,
    }
    ids = ids_of(5, 2, 9)
    ours, theirs = model.generate(ids, **options), reference.generate(model, ids, **options)
    assert (np.asarray(ours.sequences) == np.asarray(theirs.sequences)).all()


def requests_of(number):
    """One of many different requests; from LONG on short prompts and long answers, for which room runs out."""
    rng = np.random.default_rng(number)
    return {
        "input_ids": ids_of(number % 4, 1, 5 if number >= LONG else int(rng.choice([1, 3, 17, 40]))),
        "pcm_input_ids": ids_of(100 + number % 3, 1, int(rng.choice([2, 20]))),
        "preference": [{"base": 1, "one": 2}, {"two": 1}, {"base": 1, "one": 1, "two": 3}][number % 3],
        "merge": ["linear", "linear", "log_linear"][number // 3 % 3],
        "max_new_tokens": 45 if number >= LONG else int(rng.choice([4, 20, 30])),
        "temperature": 1.1,
        "top_p": [1.0, 0.9][number % 2],
        "seed": number,
        "pcm_interval": [1, 1, 3][number // 2 % 3],
        "eos_token_id": [],
    }


@pytest.mark.parametrize(
    ("settings", "seen"), [({"max_batch": 8, "prefill_chunk": 24}, "reused_tokens"), ({"kv_blocks": 24}, "preemptions")]
)
def test_an_engine_gives_the_tokens_of_solo_runs(learned, settings, seen):
    engine = learned.engine(**settings)
    numbers = [*range(9), *range(4), *range(LONG, LONG + 5)]
    ids = []
    for number in numbers:
        ids.append(engine.add_request(**requests_of(number)))
        engine.step()
    while engine.has_unfinished:
        engine.step()
    for number, request_id in zip(numbers, ids, strict=True):
        solo = learned.generate(**requests_of(number), return_dict_in_generate=True)
        ours = engine.result(request_id)
        assert (ours.sequences == solo.sequences).all()
        np.testing.assert_allclose(ours.logprobs, solo.logprobs, atol=1e-4)
    assert engine.stats()[seen] > 0
    for cache in engine._runner.caches:
        cache.check()
        assert cache.stats()["used"] == 0


def test_a_prompt_is_read_once_for_all_its_sequences(learned):
    options = {**requests_of(2), "input_ids": ids_of(1, 1, 40), "num_return_sequences": 4, "max_new_tokens": 6}
    engine = learned.engine()
    request_id = engine.add_request(**options)
    while engine.has_unfinished:
        engine.step()
    assert engine.stats()["copies"] > 0
    assert (engine.result(request_id).sequences == reference.generate(learned, **options)).all()


def test_interpreted_kernels_serve_a_whole_answer(mixture, monkeypatch):
    model = on_torch(mixture())
    options = {"max_new_tokens": 3, "top_p": 0.9, "eos_token_id": [], "pcm_input_ids": ids_of(3, 1, 4)}
    plain = model.generate(ids_of(6, 1, 18), **options)
    monkeypatch.setenv("PCM_FAST_FORCE", "triton")
    assert (model.generate(ids_of(6, 1, 18), **options) == plain).all()


def test_advance_follows_its_contract():
    """Sequences that go on, stop, have no room, fail and were stopped before; and a row that fills up a bucket."""
    state = torch.tensor([0, 0, 2, 0, 1], dtype=torch.int32)
    draw_positions = torch.tensor([5, 5, 5, 5, 5])
    positions = torch.tensor([15, 3, 7, 2, 2, 0])
    sequence_of = torch.tensor([0, 1, 2, 3, 4, -1], dtype=torch.int32)
    input_ids, slots = torch.full((6,), 7), torch.full((6,), 99)
    lengths = (positions + 1).int()
    capacities = torch.tensor([32, 16, 8, 16, 16, 0], dtype=torch.int32)
    tables = torch.tensor([[3, 4], [5, 0], [6, 0], [8, 0], [9, 0], [0, 0]], dtype=torch.int32)
    going = torch.zeros(1, dtype=torch.int32)
    drawn, stops = torch.tensor([11, 12, 13, -1, 14]), torch.tensor([[-1], [12], [-1], [-1], [-1]])
    rows = (sequence_of, capacities, input_ids, positions, slots, lengths, tables)
    torch_kv.advance(drawn, stops, state, draw_positions, *rows, going)
    assert state.tolist() == [0, 1, 2, 3, 1]
    assert draw_positions.tolist() == [6, 5, 5, 5, 5]
    assert input_ids.tolist() == [11, 7, 7, 7, 7, 7]
    assert positions.tolist() == [16, 3, 7, 2, 2, 0]
    assert lengths.tolist() == [17, 4, 8, 3, 3, 1]
    assert slots.tolist() == [4 * 16, -1, -1, -1, -1, -1]
    assert going.tolist() == [1]


def test_weights_keep_what_the_checkpoint_has(tiny_models, make_tiny_model):
    def dtype(path, weights):
        checkpoint = load_checkpoint(path)
        spec = ModelSpec(checkpoint, (Expert("base"),), load_pcm("uniform", ["base"], checkpoint))
        return TorchModels(spec, weights, 1, "float32", "cpu").models[0]._embedding.dtype

    assert dtype(make_tiny_model("llama", dtype="bfloat16"), "auto") == torch.bfloat16
    assert dtype(tiny_models["llama"], "auto") == torch.float32
    assert dtype(tiny_models["llama"], "bfloat16") == torch.bfloat16


@pytest.fixture(scope="module")
def smollm2(embedded_checkpoint, random_adapter):
    """SmolLM2 with two random adapters and the base, a text, and the reference's scores of it."""
    config = embedded_checkpoint.config
    experts = (
        Expert("base"),
        *(Expert(n, random_adapter(config, rank=8, seed=i, size=0.2)) for i, n in enumerate("ab")),
    )
    spec = ModelSpec(embedded_checkpoint, experts, load_pcm("uniform", ["base", "a", "b"], embedded_checkpoint))
    ids = embedded_checkpoint.tokenizer.encode(LICENSE.read_text(encoding="utf-8")[1500:4200])
    assert len(ids) > 512
    return spec, ids, MixtureModel(spec, backend="reference").log_probs([ids])


def test_smollm2_in_float32(smollm2):
    spec, ids, expected = smollm2
    greatest, divergence = difference(on_torch(spec, weights="float32").log_probs([ids]), expected)
    assert greatest < 1e-3
    assert divergence < 1e-7


def test_smollm2_in_bfloat16(smollm2):
    # Its blocks are 4-bit: rounding them again shifts a few unlikely tokens by more, whoever multiplies.
    spec, ids, expected = smollm2
    ours = on_torch(spec, weights="bfloat16", kv_dtype="bfloat16").log_probs([ids])
    assert np.quantile(np.abs(ours - expected)[expected > np.log(1e-6)], 0.99) < 0.1
    assert difference(ours, expected)[1] < 5e-4


def test_smollm2_writes_the_text_of_the_reference(smollm2):
    spec, ids, _ = smollm2
    model = on_torch(spec)
    options = {"max_new_tokens": 24, "do_sample": False}
    assert (model.generate([ids[:60]], **options) == reference.generate(model, [ids[:60]], **options)).all()


def test_the_cpu_has_no_graphs_and_says_nothing_of_it(learned, caplog):
    with caplog.at_level(logging.WARNING):
        learned.generate(**requests_of(0))
    assert not caplog.records
