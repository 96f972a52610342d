"""The reference against transformers + PEFT with Eq. 1 written out here: no model or merge code of ours there."""

import logging
from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
import transformers

from pcm_fast import reference
from pcm_fast.adapter import Adapter
from pcm_fast.experts import Expert, load_experts
from pcm_fast.loader import load_checkpoint
from pcm_fast.pcm import CallablePCM, FixedPCM, LearnedPCM, NamedPCM, UniformPCM, load_pcm
from pcm_fast.pcm_file import save_pcm
from pcm_fast.sampling import MergeRule, SamplingParams, merge_log_probs, sample
from pcm_fast.spec import ModelSpec

V = 97
FAMILIES = {
    "llama": (
        transformers.LlamaConfig,
        {
            "head_dim": 8,
            "attention_bias": True,
            "mlp_bias": True,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "mistral": (transformers.MistralConfig, {"head_dim": 16, "sliding_window": 5}),
    "qwen2": (
        transformers.Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 16, "tie_word_embeddings": True}),
}
ADAPTERS = {
    "concise": {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]},
    "friendly": {
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "rank_pattern": {"down_proj": 3},
        "alpha_pattern": {"o_proj": 7},
    },
    "humorous": {"r": 3, "lora_alpha": 5, "target_modules": ["o_proj", "down_proj"], "use_rslora": True},
}
NAMES = (*ADAPTERS, "base")
WEIGHTS = {"concise": 0.4, "friendly": 0.3, "humorous": 0.2, "base": 0.1}


def randomise(model, seed, spread):
    """Weights large enough for distributions that are far from uniform, and experts that are far from each other."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        scale = 0.5 if parameter.ndim == 1 else spread
        parameter.data = torch.randn(parameter.shape, generator=generator) * scale


class Independent:
    """The experts as PEFT runs them, in turn on one base."""

    def __init__(self, base, adapters):
        self.base = base
        self.model = None
        for name, path in adapters.items():
            if self.model is None:
                self.model = peft.PeftModel.from_pretrained(base, path, adapter_name=name)
            else:
                self.model.load_adapter(path, adapter_name=name)
        self.model.eval()

    @torch.no_grad()
    def log_probs(self, name, ids):
        """log p_i [T, V] in float64 after each of the tokens ids [T]."""
        ids = torch.as_tensor(np.asarray(ids))[None]
        if name == "base":
            with self.model.disable_adapter():
                logits = self.model(ids).logits
        else:
            self.model.set_adapter(name)
            logits = self.model(ids).logits
        return logits[0].double().log_softmax(-1)

    def mixture(self, weights, ids, rule="linear"):
        """log p [T, V]; weights by name."""
        return merged({name: self.log_probs(name, ids) for name in weights}, weights, rule)


def merged(log_probs, weights, rule):
    """log p [T, V] by the formulas of the design, in float64; log_probs [T, V] and weights by name."""
    terms = [(weights[name], log_p) for name, log_p in log_probs.items() if name in weights]
    if rule == "linear":
        return sum(w * log_p.exp() for w, log_p in terms).log()
    if rule == "log_linear":
        return sum(w * log_p for w, log_p in terms).log_softmax(-1)
    exponent = float(rule.removeprefix("power(").removesuffix(")"))
    return (sum(w * (exponent * log_p).exp() for w, log_p in terms).log() / exponent).log_softmax(-1)


def differences(got, expected):
    """Largest difference of log p where p > 1e-6, and the mean KL divergence from expected; both [T, V]."""
    got, expected = torch.as_tensor(got).double(), torch.as_tensor(expected).double()
    assert torch.isfinite(got).all()
    probable = expected.exp() > 1e-6
    divergence = (expected.exp() * (expected - got)).sum(-1) - (expected.exp().sum(-1) - got.exp().sum(-1))
    return (got - expected)[probable].abs().max().item(), divergence.mean().item()


def assert_same_distribution(got, expected, max_difference=1e-5, max_divergence=1e-9):
    difference, divergence = differences(got, expected)
    assert difference <= max_difference
    assert divergence <= max_divergence


def write_adapters(base, directory, seed, spread):
    paths = {}
    for i, (name, settings) in enumerate(ADAPTERS.items()):
        model = peft.get_peft_model(base, peft.LoraConfig(**settings), adapter_name="default")
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed + i)
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
        paths[name] = directory / name
        model.save_pretrained(paths[name])
        base = model.unload()
    return paths


class Tiny:
    """A tiny random base of one family with three random LoRA experts, on disk and as PEFT runs it."""

    def __init__(self, family, directory, seed=0):
        make_config, extra = FAMILIES[family]
        config = make_config(
            vocab_size=V,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            **extra,
        )
        base = transformers.AutoModelForCausalLM.from_config(config).eval()
        randomise(base, seed, 0.4)
        base.save_pretrained(directory / "base")
        self.path = directory / "base"
        self.adapters = write_adapters(base, directory, seed + 100, spread=0.3)
        self.independent = Independent(
            transformers.AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32), self.adapters
        )
        self.checkpoint = load_checkpoint(self.path)
        self.experts = load_experts({**self.adapters, "base": None}, self.checkpoint)

    def spec(self, pcm=None, experts=None):
        return ModelSpec(self.checkpoint, experts or self.experts, FixedPCM(WEIGHTS) if pcm is None else pcm)

    def decoder(self, pcm=None, experts=None):
        return reference.Decoder(self.spec(pcm, experts))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny matrices are not worth a second thread, and on a busy machine waiting for it takes most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=FAMILIES)
def any_family(request, tmp_path_factory):
    return Tiny(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return Tiny("llama", tmp_path_factory.mktemp("tiny"), seed=7)


@pytest.fixture
def ids():
    return np.random.default_rng(3).integers(3, V, size=(2, 12))


def run(decoder, input_ids, attention_mask=None, **options):
    return reference.generate(decoder, input_ids, attention_mask, return_dict_in_generate=True, **options)


# Eq. 1, teacher-forced


@pytest.mark.parametrize("rule", ["linear", "log_linear", "power(-1)", "power(0.5)"])
def test_log_probs_are_the_merged_experts(any_family, ids, rule):
    got = reference.log_probs(any_family.spec(), ids, merge=rule)
    assert got.shape == (2, 12, V)
    assert got.dtype == np.float32
    for row in range(2):
        assert_same_distribution(got[row], any_family.independent.mixture(WEIGHTS, ids[row], rule))


def test_the_experts_differ(any_family, ids):
    """What the tests here would miss if it were not so."""
    for name in ADAPTERS:
        expert, base = (any_family.independent.log_probs(n, ids[0]) for n in (name, "base"))
        assert differences(expert, base)[1] > 0.01


def test_signed_weights_of_a_log_linear_merge(tiny, ids):
    signed = {"concise": 1.5, "friendly": -1.0, "base": 0.5}
    got = reference.log_probs(tiny.spec(FixedPCM(signed)), ids, merge="log_linear")
    assert_same_distribution(got[0], tiny.independent.mixture(signed, ids[0], "log_linear"))


def test_padding_changes_nothing(tiny, ids):
    mask = np.ones_like(ids)
    mask[1, :5] = 0
    spec = tiny.spec()
    got = reference.log_probs(spec, ids, mask)
    alone = reference.log_probs(spec, ids[1:, 5:])
    assert np.isnan(got[1, :5]).all()
    np.testing.assert_allclose(got[1, 5:], alone[0], atol=1e-6)
    np.testing.assert_allclose(got[0], reference.log_probs(spec, ids[:1])[0], atol=1e-6)


SMOLLM2_TEXT = (
    "The tide is the rise and fall of the sea, twice in most days, and it is the Moon that makes it. Her pull is "
    "a little stronger on the side of the Earth that faces her and a little weaker on the far side, so the water is "
    "drawn out into two low hills, and the Earth turns beneath them. When the Sun stands in line with the Moon, at new "
    "and at full moon, both pull together and the tides are high; in between they pull across each other, and the "
    "tides are low. In a narrow bay the water piles up: in the Bay of Fundy it climbs sixteen metres, as high as a "
    "house of five floors."
)


def test_eq_1_on_smollm2(tmp_path):
    """Real weights: the GGUF file read by transformers on one side and by us on the other, random adapters on both."""
    checkpoint = load_checkpoint("smollm2-135m-instruct")
    base = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint.path.parent, gguf_file=checkpoint.path.name, dtype=torch.float32
    ).eval()
    adapters = write_adapters(base, tmp_path, seed=5, spread=0.04)
    independent = Independent(base, adapters)
    decoder = reference.Decoder(
        ModelSpec(checkpoint, load_experts({**adapters, "base": None}, checkpoint), FixedPCM(WEIGHTS))
    )
    ids = checkpoint.tokenizer.encode(SMOLLM2_TEXT)
    assert len(ids) > 128
    assert_same_distribution(
        reference.log_probs(decoder, [ids])[0],
        independent.mixture(WEIGHTS, ids),
        max_difference=1e-4,
        max_divergence=1e-8,
    )
    got = run(decoder, [ids[:40]], do_sample=False, max_new_tokens=6)
    expected = list(ids[:40])
    for _ in range(6):
        expected.append(int(independent.mixture(WEIGHTS, expected)[-1].argmax()))
    assert got.sequences[0].tolist() == expected


# generate, token by token


def loop(independent, prompt, weights, params, count, sequence=0, rule="linear", contexts=None):
    """The naive loop with no cache: text, log p(token) [T], log p_i(token) [T, K]."""
    texts = {name: list(map(int, (contexts or {}).get(name, prompt))) for name in NAMES}
    text, logprobs, expert_logprobs = list(map(int, prompt)), [], []
    for position in range(count):
        lasts = {name: independent.log_probs(name, texts[name])[-1] for name in NAMES}
        log_p = merged(lasts, weights(position) if callable(weights) else weights, rule)
        token = sample(log_p.float().numpy(), params, sequence=sequence, position=position)
        logprobs.append(float(log_p[token]))
        expert_logprobs.append([float(lasts[name][token]) for name in NAMES])
        for growing in (text, *texts.values()):
            growing.append(token)
    return text, logprobs, expert_logprobs


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False},
        {"seed": 11},
        {"seed": 12, "temperature": 1.7, "top_k": 20, "top_p": 0.9},
        {"seed": 2**63 + 5, "temperature": 0.7, "min_p": 0.05},
    ],
)
def test_generate_is_the_naive_loop(any_family, ids, settings):
    mask = np.ones_like(ids)
    mask[1, :4] = 0
    output = run(any_family.decoder(), ids, mask, max_new_tokens=8, eos_token_id=[], **settings)
    assert output.sequences.shape == (2, 20)
    for row, prompt in enumerate((ids[0], ids[1, 4:])):
        text, logprobs, each = loop(
            any_family.independent, prompt, WEIGHTS, SamplingParams(**settings), 8, sequence=row
        )
        assert output.sequences[row, 20 - len(text) :].tolist() == text
        np.testing.assert_allclose(output.logprobs[row], logprobs, atol=1e-5)
        np.testing.assert_allclose(output.expert_logprobs[row], each, atol=1e-5)
    np.testing.assert_allclose(output.mixture_weights, np.broadcast_to([*WEIGHTS.values()], (2, 8, 4)), rtol=1e-6)


@pytest.mark.parametrize("rule", ["log_linear", "power(-1)"])
def test_generate_under_other_merges(tiny, ids, rule):
    output = run(tiny.decoder(), ids[:1], merge=rule, max_new_tokens=6, seed=3, eos_token_id=[])
    text, logprobs, _ = loop(tiny.independent, ids[0], WEIGHTS, SamplingParams(seed=3), 6, rule=rule)
    assert output.sequences[0].tolist() == text
    np.testing.assert_allclose(output.logprobs[0], logprobs, atol=1e-5)


def test_experts_may_read_prompts_of_their_own(tiny, ids):
    own = {"concise": [5, 6, 7, *ids[0]], "base": [9]}
    output = run(
        tiny.decoder(),
        ids[:1],
        expert_input_ids={name: [context] for name, context in own.items()},
        max_new_tokens=8,
        seed=4,
        eos_token_id=[],
    )
    text, logprobs, each = loop(tiny.independent, ids[0], WEIGHTS, SamplingParams(seed=4), 8, contexts=own)
    assert output.sequences[0].tolist() == text
    np.testing.assert_allclose(output.logprobs[0], logprobs, atol=1e-5)
    np.testing.assert_allclose(output.expert_logprobs[0], each, atol=1e-5)


def test_rows_may_have_own_prompts_of_different_lengths(tiny, ids):
    own = [[3, 4, 5], [9, 9, 9, 9, 9, 9, 9]]
    both = run(tiny.decoder(), ids, expert_input_ids={"friendly": own}, max_new_tokens=5, seed=4, eos_token_id=[])
    for row in range(2):
        alone = run(
            tiny.decoder(),
            ids[row : row + 1],
            expert_input_ids={"friendly": own[row : row + 1]},
            max_new_tokens=5,
            seed=4,
            first_sequence=row,
            eos_token_id=[],
        )
        np.testing.assert_array_equal(both.sequences[row], alone.sequences[0])
        np.testing.assert_allclose(both.expert_logprobs[row], alone.expert_logprobs[0], atol=1e-5)


def test_a_row_does_not_depend_on_its_batch(any_family):
    rng = np.random.default_rng(5)
    rows = [rng.integers(3, V, size=n).tolist() for n in (3, 15, 1, 8)]
    decoder = any_family.decoder()
    batch = run(decoder, rows, max_new_tokens=7, seed=1)
    for i, row in enumerate(rows):
        alone = run(decoder, [row], max_new_tokens=7, seed=1, first_sequence=i)
        n = int(alone.lengths[0])
        assert batch.lengths[i] == n
        np.testing.assert_array_equal(batch.sequences[i, 15 : 15 + n], alone.sequences[0, len(row) :])
        np.testing.assert_allclose(batch.logprobs[i, :n], alone.logprobs[0], atol=1e-5)


def test_seeds(tiny, ids):
    decoder = tiny.decoder()
    first, again, other = (run(decoder, ids, max_new_tokens=12, seed=seed).sequences for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_several_sequences_for_a_prompt(tiny, ids):
    decoder = tiny.decoder()
    batch = run(decoder, ids, num_return_sequences=3, max_new_tokens=6, seed=1, eos_token_id=[])
    assert batch.sequences.shape == (6, 18)
    np.testing.assert_array_equal(batch.sequences[:, :12], np.repeat(ids, 3, axis=0))
    for i in range(2):
        for j in range(3):
            alone = run(decoder, ids[i : i + 1], max_new_tokens=6, seed=1, first_sequence=3 * i + j, eos_token_id=[])
            np.testing.assert_array_equal(batch.sequences[3 * i + j], alone.sequences[0])
    assert len({tuple(row) for row in batch.sequences[:, 12:].tolist()}) == 6


# The end of a sequence


def test_a_row_ends_at_its_end_token_and_is_padded(tiny, ids):
    decoder = tiny.decoder()
    free = run(decoder, ids, max_new_tokens=10, seed=6, eos_token_id=[])
    end = int(free.sequences[0, 12 + 3])
    assert end not in free.sequences[0, 12:15].tolist()
    assert end not in free.sequences[1, 12:].tolist()
    output = run(decoder, ids, max_new_tokens=10, seed=6, eos_token_id=end, pad_token_id=7)
    np.testing.assert_array_equal(output.lengths, [4, 10])
    np.testing.assert_array_equal(output.sequences[0, :16], free.sequences[0, :16])
    assert (output.sequences[0, 16:] == 7).all()
    np.testing.assert_array_equal(output.sequences[1], free.sequences[1])
    assert (output.logprobs[0, 4:] == 0).all()
    assert (output.mixture_weights[0, 4:] == 0).all()
    assert (output.expert_logprobs[0, 4:] == 0).all()
    assert output.timings["tokens"] == 14


def test_generation_stops_when_all_rows_have_ended(tiny, ids):
    decoder = tiny.decoder()
    free = run(decoder, ids, max_new_tokens=10, seed=6, eos_token_id=[])
    ends = [int(free.sequences[0, 14]), int(free.sequences[1, 13])]
    output = run(decoder, ids, max_new_tokens=10, seed=6, eos_token_id=ends)
    assert output.sequences.shape[1] == 12 + int(output.lengths.max()) <= 15


def test_min_new_tokens(tiny, ids):
    decoder = tiny.decoder()
    every_token = list(range(1, V))  # all but token 0 end a sequence
    output = run(decoder, ids, max_new_tokens=6, min_new_tokens=4, eos_token_id=every_token)
    assert (output.sequences[:, 12:16] == 0).all()
    assert (output.lengths >= 5).all()


def test_the_model_knows_its_end_and_pad_tokens(tiny, ids):
    output = run(tiny.decoder(), ids, max_new_tokens=3, logit_bias={2: 1e4})
    np.testing.assert_array_equal(output.sequences[:, 12:], [[2], [2]])
    output = run(tiny.decoder(), ids, max_new_tokens=3, logits_processor=_first_row_ends)
    assert output.sequences[0, 12:].tolist() == [2, 0, 0]


def _first_row_ends(input_ids, scores):
    scores = scores.clone()
    scores[0, 2] = 1e4
    scores[1, 2] = -torch.inf
    return scores


# Processors, criteria, streamers


def test_built_in_processors(tiny, ids):
    decoder = tiny.decoder()
    settings = {
        "logit_bias": {5: 2.0},
        "banned_tokens": [6],
        "repetition_penalty": 1.3,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
        "no_repeat_ngram_size": 2,
    }
    mask = np.ones_like(ids)
    mask[1, :4] = 0
    output = run(decoder, ids, mask, max_new_tokens=10, eos_token_id=[], seed=2, temperature=2.0, **settings)
    for row, prompt in enumerate((ids[0], ids[1, 4:])):
        text, start = list(map(int, prompt)), len(prompt)
        for position in range(10):
            log_p = tiny.independent.mixture(WEIGHTS, text)[-1].float()
            log_p[5] += 2.0
            log_p[6] = -torch.inf
            text_tensor = torch.tensor([text])
            log_p = transformers.RepetitionPenaltyLogitsProcessor(1.3)(text_tensor, log_p[None])[0]
            for token in set(text[start:]):
                log_p[token] -= 0.4 + 0.3 * text[start:].count(token)
            log_p = transformers.NoRepeatNGramLogitsProcessor(2)(text_tensor, log_p[None])[0]
            params = SamplingParams(temperature=2.0, seed=2)
            token = sample(log_p.numpy(), params, sequence=row, position=position)
            assert output.sequences[row, 12 + position] == token
            np.testing.assert_allclose(output.logprobs[row, position], log_p[token], atol=1e-5)
            text.append(token)


def test_hugging_face_processors_see_text_and_log_probs(tiny, ids):
    decoder = tiny.decoder()
    seen = []

    class Watch(transformers.LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append((input_ids.clone(), scores.clone()))
            return scores

    processors = transformers.LogitsProcessorList([transformers.RepetitionPenaltyLogitsProcessor(1.5), Watch()])
    output = run(decoder, torch.from_numpy(ids), max_new_tokens=5, do_sample=False, logits_processor=processors)
    built_in = run(decoder, torch.from_numpy(ids), max_new_tokens=5, do_sample=False, repetition_penalty=1.5)
    assert torch.equal(output.sequences, built_in.sequences)
    for step, (input_ids, scores) in enumerate(seen):
        assert torch.equal(input_ids, output.sequences[:, : 12 + step])
        chosen = scores.gather(1, output.sequences[:, 12 + step, None])[:, 0]
        assert torch.equal(chosen, output.logprobs[:, step])


def test_a_processor_of_the_wrong_shape(tiny, ids):
    with pytest.raises(ValueError, match=r"logits_processor: expected .* shape \[2, 97\], got \[97\]"):
        run(tiny.decoder(), ids, logits_processor=lambda input_ids, scores: scores[0])


def test_nothing_left_to_draw_names_the_row(tiny, ids):
    with pytest.raises(ValueError, match=r"row 0, token 0: .*all -inf"):
        run(tiny.decoder(), ids, banned_tokens=range(V))


@pytest.mark.parametrize(
    "criteria",
    [
        transformers.StoppingCriteriaList([transformers.MaxLengthCriteria(15)]),
        transformers.MaxLengthCriteria(15),
        [lambda input_ids, scores: input_ids.shape[1] >= 15],
    ],
)
def test_stopping_criteria(tiny, ids, criteria):
    output = run(tiny.decoder(), ids, max_new_tokens=10, eos_token_id=[], stopping_criteria=criteria)
    assert output.sequences.shape == (2, 15)


def test_a_criterion_may_stop_one_row(tiny, ids):
    def first_row(input_ids, scores):
        assert scores.shape == (2, V)
        return torch.tensor([input_ids.shape[1] >= 14, False])

    output = run(tiny.decoder(), ids, max_new_tokens=5, eos_token_id=[], stopping_criteria=first_row, pad_token_id=9)
    np.testing.assert_array_equal(output.lengths, [2, 5])
    assert (output.sequences[0, 14:] == 9).all()


def test_a_criterion_of_the_wrong_shape(tiny, ids):
    with pytest.raises(ValueError, match=r"stopping_criteria: expected a bool or shape \[2\], got \[3\]"):
        run(tiny.decoder(), ids, stopping_criteria=lambda input_ids, scores: torch.zeros(3))


class Recorder:
    def __init__(self):
        self.values, self.ended = [], 0

    def put(self, value):
        assert not self.ended
        self.values.append(value.tolist())

    def end(self):
        self.ended += 1


def test_streaming_is_what_generate_returns(tiny, ids):
    recorder = Recorder()
    streamed = run(tiny.decoder(), ids[:1], max_new_tokens=6, seed=5, streamer=recorder)
    silent = run(tiny.decoder(), ids[:1], max_new_tokens=6, seed=5)
    np.testing.assert_array_equal(streamed.sequences, silent.sequences)
    assert recorder.values == [ids[:1].tolist(), *([token] for token in streamed.sequences[0, 12:].tolist())]
    assert recorder.ended == 1


def test_a_streamer_is_told_the_end_whatever_happens(tiny, ids):
    recorder = Recorder()
    with pytest.raises(ValueError):
        run(tiny.decoder(), ids[:1], streamer=recorder, banned_tokens=range(V))
    assert recorder.ended == 1


# Who takes part


def test_an_inactive_expert_is_not_run(tiny, ids):
    decoder = tiny.decoder(NamedPCM())
    output = run(decoder, ids, preference={"concise": 1.0, "humorous": 3.0}, max_new_tokens=3, eos_token_id=[])
    used = {id(expert.adapter) for expert in tiny.experts if expert.name in ("concise", "humorous")}
    assert {adapter for _, adapter in decoder._models} == used | {id(None)}  # the base is what adapters are merged into
    np.testing.assert_array_equal(output.mixture_weights, np.broadcast_to([0.25, 0, 0.75, 0], (2, 3, 4)))
    assert np.isnan(output.expert_logprobs[:, :, [1, 3]]).all()
    assert np.isfinite(output.expert_logprobs[:, :, [0, 2]]).all()
    text, _, _ = loop(tiny.independent, ids[0], {"concise": 0.25, "humorous": 0.75}, SamplingParams(), 3)
    assert output.sequences[0].tolist() == text


def test_text_runs_only_the_experts_it_names(tiny, ids):
    decoder = tiny.decoder(NamedPCM())
    run(decoder, ids, preference="be friendly, please", max_new_tokens=1)
    assert len(decoder._models) == 2


def test_experts_share_what_they_have_in_common(tiny):
    prompted = (Expert("a", system="A."), Expert("b", system="B."), Expert("base"), tiny.experts[0])
    decoder = tiny.decoder(experts=prompted)
    models = [decoder._expert_model(i) for i in range(4)]
    assert models[0] is models[1] is models[2]
    base, adapted = (dict(model.named_parameters()) for model in models[2:])
    own = {name for name, p in adapted.items() if p.data_ptr() != base[name].data_ptr()}
    assert own == {f"model.layers.{layer}.self_attn.{site}_proj.weight" for layer in range(2) for site in "qv"}


def test_a_full_model_may_be_an_expert(tiny, tmp_path, ids):
    other = transformers.AutoModelForCausalLM.from_pretrained(tiny.path)
    randomise(other, 77, 0.4)
    other.save_pretrained(tmp_path)
    experts = load_experts({"base": None, "other": tmp_path}, tiny.checkpoint)
    got = reference.log_probs(tiny.spec(FixedPCM({"base": 1.0, "other": 3.0}), experts), ids)
    with torch.no_grad():
        p = other(torch.from_numpy(ids[:1])).logits[0].double().softmax(-1)
    expected = (0.25 * tiny.independent.log_probs("base", ids[0]).exp() + 0.75 * p).log()
    assert_same_distribution(got[0], expected)


def test_an_adapter_on_a_tied_head_unties_it(make_tiny_model, tmp_path, ids):
    path = make_tiny_model("llama")
    base = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert base.config.tie_word_embeddings
    settings = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["lm_head", "v_proj"], init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapted = peft.get_peft_model(base, settings).eval()
    adapted.save_pretrained(tmp_path, save_embedding_layers=False)
    checkpoint = load_checkpoint(path)
    got = reference.log_probs(ModelSpec(checkpoint, load_experts({"a": tmp_path}, checkpoint), UniformPCM()), ids)
    with torch.no_grad():
        # Logits are large here: PEFT's own float32 is up to 2e-5 off what it computes in float64, and so are we.
        expected = adapted(torch.from_numpy(ids[:1])).logits[0].double().log_softmax(-1)
        assert_same_distribution(got[0], expected, max_difference=5e-5)
        with adapted.disable_adapter():
            base_log_p = adapted(torch.from_numpy(ids[:1])).logits[0].double().log_softmax(-1)
    assert differences(got[0], base_log_p)[1] > 0.01


def test_rotary_divisors_that_follow_no_rule(make_tiny_model, ids):
    """Some GGUF files hold them; here they are those of a Llama 3, whose rule transformers knows."""
    path = make_tiny_model("llama_biased")
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    checkpoint = load_checkpoint(path)
    rotary = model.model.rotary_emb.inv_freq
    plain = checkpoint.config.rope_theta ** (-torch.arange(0, len(rotary)) / len(rotary))
    divisors = {"rope_type": "factors", "factors": tuple((plain / rotary).tolist())}
    checkpoint.config = replace(checkpoint.config, rope_scaling=divisors)
    for experts in ((Expert("a"),), (Expert("a", adapter=Adapter(None, {})),)):
        got = reference.log_probs(ModelSpec(checkpoint, experts, UniformPCM()), ids)
        with torch.no_grad():
            assert_same_distribution(got[0], model(torch.from_numpy(ids[:1])).logits[0].log_softmax(-1))


# PCMs


def test_a_callable_is_asked_at_every_token(tiny, ids):
    contexts = []

    def turning(context):
        contexts.append(context)
        return {"concise": 0.9 / (1 + context.step), "friendly": 1 - 0.9 / (1 + context.step)}

    mask = np.ones_like(ids)
    mask[1, :4] = 0
    output = run(tiny.decoder(CallablePCM(turning)), ids, mask, preference="soft", max_new_tokens=5, eos_token_id=[])
    assert [context.step for context in contexts] == [0, 1, 2, 3, 4]
    for context in contexts:
        assert context.preference.text == "soft"
        assert context.expert_names == NAMES
        np.testing.assert_array_equal(context.prompts[0], ids[0])
        np.testing.assert_array_equal(context.prompts[1], ids[1, 4:])
        for row in range(2):
            np.testing.assert_array_equal(context.generated[row], output.sequences[row, 12 : 12 + context.step])
    expected = [{"concise": 0.9 / (1 + t), "friendly": 1 - 0.9 / (1 + t)} for t in range(5)]
    text, logprobs, _ = loop(tiny.independent, ids[0], lambda t: expected[t], SamplingParams(), 5)
    assert output.sequences[0].tolist() == text
    np.testing.assert_allclose(output.logprobs[0], logprobs, atol=1e-5)
    np.testing.assert_allclose(output.mixture_weights[0, :, 0], [w["concise"] for w in expected], rtol=1e-6)


def test_log_probs_show_a_callable_what_generate_shows_it(tiny, ids):
    def by_last_token(context):
        last = [(*prompt, *generated)[-1] for prompt, generated in zip(context.prompts, context.generated, strict=True)]
        return [[1 + (token % 5), 1, 2, context.step] for token in last]

    decoder = tiny.decoder(CallablePCM(by_last_token))
    mask = np.ones_like(ids)
    mask[1, :4] = 0
    output = run(decoder, ids, mask, max_new_tokens=6, eos_token_id=[])
    full_mask = np.concatenate([mask, np.ones((2, 6), int)], axis=1)
    log_p = reference.log_probs(decoder, output.sequences, full_mask, prompt_length=[12, 8])
    for step in range(6):
        for row in range(2):
            token = output.sequences[row, 12 + step]
            assert log_p[row, 11 + step, token] == pytest.approx(output.logprobs[row, step], abs=1e-5)


def learned_weights(model, pcm, text, active):
    """softmax over the active experts of the head on the last hidden state, in float64; model is a transformers one."""
    with torch.no_grad():
        hidden = model.base_model(torch.tensor([text])).last_hidden_state[0, -1].double()
    scores = torch.from_numpy(pcm.weight).double() @ hidden + torch.from_numpy(pcm.bias).double()
    weights = torch.zeros(4, dtype=torch.float64)
    weights[list(active)] = scores[list(active)].softmax(-1)
    return dict(zip(NAMES, weights.tolist(), strict=True))


def random_head(seed):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(4, 32)) * 0.5).astype(np.float32), rng.normal(size=4).astype(np.float32)


@pytest.fixture(params=["shared", "shared without adapter", "separate"])
def learned(request, tiny, tmp_path):
    """A PCM with a random head, read from disk, and the transformers model that the test runs it with."""
    head = random_head(8)
    fresh = transformers.AutoModelForCausalLM.from_pretrained(tiny.path, dtype=torch.float32)
    template = "Wants: {preference}"
    if request.param == "separate":
        randomise(fresh, 31, 0.4)
        fresh.save_pretrained(tmp_path / "small")
        small = load_checkpoint(tmp_path / "small")
        pcm = LearnedPCM("separate", NAMES, template, *head, checkpoint=small)
    elif request.param == "shared":
        adapter = next(expert.adapter for expert in tiny.experts if expert.name == "friendly")
        pcm = LearnedPCM("shared", NAMES, template, *head, adapter=adapter)
        fresh = peft.PeftModel.from_pretrained(fresh, tiny.adapters["friendly"]).merge_and_unload()
    else:
        pcm = LearnedPCM("shared", NAMES, template, *head)
    save_pcm(pcm, tmp_path / "pcm")
    return load_pcm(tmp_path / "pcm", NAMES, tiny.checkpoint), fresh.eval()


@pytest.mark.parametrize("active", [None, ["friendly", "base"]])
def test_a_learned_pcm_reads_its_own_prompt_and_every_token(tiny, ids, learned, active):
    pcm, model = learned
    prompts = [[4, 5, 6, *ids[0]], [7, *ids[1]]]
    output = run(
        tiny.decoder(pcm), ids, active=active, pcm_input_ids=prompts, max_new_tokens=6, seed=9, eos_token_id=[]
    )
    chosen = (0, 1, 2, 3) if active is None else (1, 3)
    for row in range(2):
        generated = output.sequences[row, 12:].tolist()
        weights = [learned_weights(model, pcm, prompts[row] + generated[:t], chosen) for t in range(6)]
        text, logprobs, _ = loop(
            tiny.independent, ids[row], lambda t, w=weights: w[t], SamplingParams(seed=9), 6, sequence=row
        )
        assert output.sequences[row].tolist() == text
        np.testing.assert_allclose(output.logprobs[row], logprobs, atol=2e-5)
        np.testing.assert_allclose(output.mixture_weights[row], [[*w.values()] for w in weights], atol=1e-5)
    assert (output.mixture_weights[:, :, [i for i in range(4) if i not in chosen]] == 0).all()
    assert np.ptp(output.mixture_weights[0], axis=0).max() > 1e-3  # they do change from token to token


def test_log_probs_under_a_learned_pcm(tiny, ids, learned):
    pcm, _ = learned
    decoder = tiny.decoder(pcm)
    prompts = [[4, 5, 6, *ids[0]], [7, *ids[1]]]
    output = run(decoder, ids, pcm_input_ids=prompts, max_new_tokens=6, seed=9, eos_token_id=[])
    log_p = reference.log_probs(decoder, output.sequences, prompt_length=12, pcm_input_ids=prompts)
    assert np.isnan(log_p[:, :11]).all()
    for step in range(6):
        for row in range(2):
            token = output.sequences[row, 12 + step]
            assert log_p[row, 11 + step, token] == pytest.approx(output.logprobs[row, step], abs=1e-5)


def test_log_probs_with_prompts_of_their_own(tiny, ids):
    decoder = tiny.decoder()
    own = {"concise": [[5, 6, 7], [8, 9]], "base": ids.tolist()}
    output = run(decoder, ids, expert_input_ids=own, max_new_tokens=6, seed=9, eos_token_id=[])
    log_p = reference.log_probs(decoder, output.sequences, prompt_length=12, expert_input_ids=own)
    assert log_p.shape == (2, 18, V)
    assert np.isnan(log_p[:, :11]).all()
    for step in range(6):
        for row in range(2):
            token = output.sequences[row, 12 + step]
            assert log_p[row, 11 + step, token] == pytest.approx(output.logprobs[row, step], abs=1e-5)


# The merge against the NumPy oracle of sampling.py


@pytest.mark.parametrize("rule", ["linear", "log_linear", "power(-1)", "power(0.3)", "power(2)"])
@pytest.mark.parametrize("seed", range(5))
def test_merge_is_the_oracles(rule, seed):
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(4, 3, 50)) * 10).astype(np.float32)
    logits[rng.random(logits.shape) < 0.1] = -np.inf
    logits[:, :, 0] = 1.0  # a token that nobody excludes
    weights = rng.dirichlet(np.ones(4), size=3).astype(np.float32)
    weights[0, 1] = 0
    weights[0] /= weights[0].sum()
    if rule == "log_linear":
        weights[1] = [1.5, -0.5, 0.5, -0.5]
        logits[[1, 3], 1] = np.nan_to_num(logits[[1, 3], 1], neginf=-20)
    log_p = torch.from_numpy(logits).log_softmax(-1)
    merged = reference.merge(log_p, torch.from_numpy(weights), MergeRule.parse(rule)).numpy()
    for row in range(3):
        expected = merge_log_probs(logits[:, row], weights[row], rule)
        np.testing.assert_array_equal(np.isneginf(merged[row]), np.isneginf(expected))
        np.testing.assert_allclose(merged[row], expected, atol=2e-5, rtol=1e-5)


def test_nothing_underflows():
    log_p = torch.tensor([[[0.0, -200.0, -500.0]], [[0.0, -400.0, -300.0]]])
    merged = reference.merge(log_p, torch.tensor([[0.5, 0.5]]), MergeRule.parse("linear"))
    expected = [0.0, -200 + np.log(0.5), -300 + np.log(0.5)]
    np.testing.assert_allclose(merged[0], expected, atol=1e-4)


# Other architectures


@pytest.mark.parametrize("architecture", ["gpt2", "bloom"])
def test_another_architecture_runs_through_transformers(tmp_path, caplog, architecture):
    if architecture == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=V, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2
        )
    else:
        config = transformers.BloomConfig(
            vocab_size=V, hidden_size=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2, pad_token_id=3
        )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    randomise(model, 13, 0.3)
    model.save_pretrained(tmp_path)
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.config is None
    decoder = reference.Decoder(ModelSpec(checkpoint, (Expert("a"), Expert("b")), UniformPCM()))
    ids = torch.from_numpy(np.random.default_rng(1).integers(4, V, size=(2, 9)))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with caplog.at_level(logging.WARNING, logger="pcm_fast"):
        got = reference.log_probs(decoder, ids, mask)
    assert f"loaded through transformers: {checkpoint.family_reason}" in caplog.text
    with torch.no_grad():
        assert_same_distribution(got[0], model(ids[:1]).logits[0].log_softmax(-1))
        assert_same_distribution(got[1, 3:], model(ids[1:, 3:]).logits[0].log_softmax(-1))
    output = reference.generate(decoder, ids, mask, do_sample=False, max_new_tokens=5, eos_token_id=[])
    expected = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=5, eos_token_id=None)
    assert torch.equal(output, expected)


def test_the_first_argument_is_a_model(ids):
    with pytest.raises(TypeError, match="model_spec: expected a ModelSpec or a MixtureModel, got 'smollm2'"):
        reference.generate("smollm2", ids)


def test_a_token_that_all_experts_exclude_stays_excluded_under_negative_weights():
    logits = torch.tensor([[0.0, 1.0, -torch.inf], [2.0, 1.0, -torch.inf]])
    weights = torch.tensor([[1.5, -0.5]])
    rule = MergeRule.parse("log_linear")
    merged = reference.merge(logits.log_softmax(-1)[:, None], weights, rule)[0].numpy()
    np.testing.assert_allclose(merged, merge_log_probs(logits.numpy(), weights[0].numpy(), rule), atol=1e-6)
    only_negative = reference.merge(logits.log_softmax(-1)[1:, None], weights[:, 1:], rule)[0].numpy()
    np.testing.assert_allclose(
        only_negative, merge_log_probs(logits[1:].numpy(), weights[0, 1:].numpy(), rule), atol=1e-6
    )
