"""The engine: a request gets the tokens it gets alone, and those of the reference, whatever else goes on."""

import asyncio
import dataclasses
import random
import threading
from contextlib import aclosing

import numpy as np
import pytest
import torch

from pcm_fast import Engine, MixtureModel, reference
from pcm_fast import engine as engine_module
from pcm_fast.adapter import Adapter, AdapterSite
from pcm_fast.experts import Expert
from pcm_fast.loader import load_checkpoint
from pcm_fast.pcm import CallablePCM, FixedPCM, LearnedPCM, NamedPCM
from pcm_fast.spec import ModelSpec

NAMES = ("base", "one", "two")
LONG = 100  # the number from which on requests have short prompts and long answers


def ids_of(seed, length):
    return np.random.default_rng(seed).integers(3, 320, size=(1, length)).tolist()


@pytest.fixture(scope="module")
def checkpoint(tiny_models):
    return load_checkpoint(tiny_models["llama"])


@pytest.fixture(scope="module")
def experts(checkpoint, random_adapter):
    config = checkpoint.config
    return (
        Expert("base"),
        Expert("one", random_adapter(config, rank=4, seed=1)),
        Expert("two", random_adapter(config, rank=7, seed=2)),
    )


@pytest.fixture(scope="module")
def head():
    rng = np.random.default_rng(5)
    return rng.normal(size=(3, 64)).astype(np.float32), rng.normal(size=3).astype(np.float32)


@pytest.fixture(scope="module")
def learned(checkpoint, experts, head, random_adapter):
    """Three experts on one base under a learned PCM on it: one pass, four rows a sequence."""
    pcm = LearnedPCM("shared", NAMES, "{preference}", *head, adapter=random_adapter(checkpoint.config, rank=3, seed=3))
    return MixtureModel(ModelSpec(checkpoint, experts, pcm), backend="native", num_threads=2)


@pytest.fixture(scope="module")
def named(checkpoint, experts):
    return MixtureModel(ModelSpec(checkpoint, experts, NamedPCM()), backend="native", num_threads=2)


@pytest.fixture(scope="module")
def many_models(checkpoint, experts, head, make_tiny_model):
    """Two experts on the base, one of other weights, and a PCM of a third family: three passes."""
    own = load_checkpoint(make_tiny_model("llama_biased", seed=11, num_hidden_layers=2))
    separate = load_checkpoint(make_tiny_model("qwen3", seed=12, num_hidden_layers=2))
    pcm = LearnedPCM("separate", NAMES, "{preference}", *head, checkpoint=separate)
    spec = ModelSpec(checkpoint, (*experts[:2], Expert("two", checkpoint=own)), pcm)
    return MixtureModel(spec, backend="native", num_threads=2)


def request_of(number, learned=True):
    """One of many different requests: keywords of generate and of add_request."""
    rng = random.Random(number)
    options = {
        "input_ids": ids_of(number % 5, rng.choice([1, 3, 17, 33, 60])),  # some share prefixes
        "preference": rng.choice(
            [{"base": 1, "one": 2}, {"two": 1}, {"base": 1, "one": 1, "two": 3}, {"one": 1, "two": 1}]
        ),
        "merge": rng.choice(["linear", "linear", "log_linear", "power(-1)", "power(0.5)"]),
        "max_new_tokens": rng.choice([1, 4, 9, 20]),
        "do_sample": rng.random() < 0.8,
        "temperature": rng.choice([0.7, 1.0, 1.3]),
        "top_p": rng.choice([1.0, 0.9]),
        "top_k": rng.choice([0, 20]),
        "min_p": rng.choice([0.0, 0.05]),
        "seed": rng.randrange(100),
        "first_sequence": rng.randrange(4),
    }
    if rng.random() < 0.3:
        options["repetition_penalty"] = 1.3
    if rng.random() < 0.5:
        options["eos_token_id"] = list(range(3, 40))
    if learned:
        options["pcm_input_ids"] = ids_of(100 + number % 3, rng.choice([2, 20]))
        options["pcm_interval"] = rng.choice([1, 1, 3])
    if number >= LONG:
        options |= {"input_ids": ids_of(number, 5), "max_new_tokens": 45, "eos_token_id": []}
    return options


def finish(engine, *request_ids):
    while engine.has_unfinished:
        engine.step()
    return [engine.result(request_id) for request_id in request_ids]


def assert_same(ours, theirs, exact=True):
    assert np.array_equal(ours.sequences, theirs.sequences)
    assert np.array_equal(ours.lengths, theirs.lengths)
    for name in ("logprobs", "mixture_weights", "expert_logprobs"):
        a, b = np.asarray(getattr(ours, name)), np.asarray(getattr(theirs, name))
        if exact:
            assert np.array_equal(a, b, equal_nan=True), name
        else:
            np.testing.assert_allclose(a, b, atol=1e-3, rtol=1e-3)


def assert_all_free(engine):
    for cache in engine._runner.caches:
        cache.check()
        assert cache.stats()["used"] == 0
        assert cache.stats()["rows"] == 0


@pytest.mark.parametrize("which", ["learned", "many_models", "named"])
def test_requests_that_come_at_different_times_get_what_generate_and_the_reference_give(which, request):
    model = request.getfixturevalue(which)
    requests = [request_of(number, which != "named") for number in range(10)]
    engine = model.engine(prefill_chunk=24)
    request_ids = []
    for options in requests:
        request_ids.append(engine.add_request(**options, expert_logprobs=True))
        engine.step()
    for options, output in zip(requests, finish(engine, *request_ids), strict=True):
        assert_same(output, model.generate(**options, return_dict_in_generate=True))
        assert_same(output, reference.generate(model, **options, return_dict_in_generate=True), exact=False)
    assert_all_free(engine)


@pytest.fixture(scope="module")
def alone(learned):
    """What each request gives alone, on one thread, in an engine of its own."""
    model, known = MixtureModel(learned.spec, backend="native", num_threads=1), {}

    def run(number):
        if number not in known:
            engine = model.engine(max_batch=1)
            (known[number],) = finish(engine, engine.add_request(**request_of(number), expert_logprobs=True))
        return known[number]

    return run


@pytest.mark.parametrize(
    ("threads", "settings", "seen"),
    [
        (2, {"max_batch": 16}, "reused_tokens"),
        (3, {"max_batch": 3, "prefill_chunk": 5}, "steps"),
        (1, {"kv_blocks": 45, "prefill_chunk": 16}, "preemptions"),
        (2, {"kv_blocks": 34}, "preemptions"),
    ],
)
def test_tokens_do_not_depend_on_company_threads_preemption_or_reuse(learned, alone, threads, settings, seen):
    model = MixtureModel(learned.spec, backend="native", num_threads=threads)
    engine = model.engine(**settings)
    numbers = [*range(12), *range(LONG, LONG + 6)] * 2
    request_ids = [engine.add_request(**request_of(number), expert_logprobs=True) for number in numbers]
    for number, output in zip(numbers, finish(engine, *request_ids), strict=True):
        assert_same(output, alone(number))
    assert engine.stats()[seen] > 0
    assert_all_free(engine)


def test_a_prompt_is_read_once_for_all_its_sequences(learned):
    options = {**request_of(3), "input_ids": ids_of(1, 40), "num_return_sequences": 5, "max_new_tokens": 6}
    engine = learned.engine(prefill_chunk=32)
    (output,) = finish(engine, engine.add_request(**options, expert_logprobs=True))
    stats = engine.stats()
    prompts = 40 * len(options["preference"]) + len(options["pcm_input_ids"][0])
    assert stats["prompt_tokens"] == prompts
    assert stats["copies"] > 0
    assert_same(output, reference.generate(learned, **options, return_dict_in_generate=True), exact=False)
    assert len({tuple(row) for row in output.sequences.tolist()}) > 1
    # With room for two sequences at a time the others find the prompt in the cache, or with the one that still runs.
    engine = learned.engine(max_batch=2, kv_blocks=34)
    assert_same(finish(engine, engine.add_request(**options, expert_logprobs=True))[0], output)
    assert_all_free(engine)


def test_abort_frees_all_rows_at_once(learned):
    engine = learned.engine(prefill_chunk=16)
    reading = engine.add_request(ids_of(0, 120), pcm_input_ids=ids_of(1, 9), num_return_sequences=2)
    answering = engine.add_request(ids_of(2, 4), pcm_input_ids=ids_of(3, 3), max_new_tokens=50, eos_token_id=[])
    untouched = engine.add_request(ids_of(2, 5), pcm_input_ids=ids_of(3, 3))
    for _ in range(4):
        outputs = engine.step()
    assert {output.request_id for output in outputs} == {answering, untouched}
    before = engine.stats()["used"]
    assert engine.abort(reading)
    assert engine.stats()["used"] < before
    assert engine.abort(answering)
    assert not engine.abort(answering)
    assert engine.abort(untouched)
    assert_all_free(engine)
    assert not engine.has_unfinished
    waiting = engine.add_request(ids_of(2, 5), pcm_input_ids=ids_of(3, 3))
    assert engine.abort(waiting)
    assert engine.step() == []
    with pytest.raises(ValueError, match=f"request_id: .* whose result was not taken, got {waiting}"):
        engine.result(waiting)
    with pytest.raises(ValueError, match="request_id: expected the id of a request of this engine, got 99"):
        engine.abort(99)


@pytest.mark.parametrize("merge", ["linear", "log_linear"])
def test_models_of_their_own_are_scored_as_by_the_reference(many_models, merge):
    ids = np.random.default_rng(3).integers(3, 320, size=(2, 45))
    own = {"pcm_input_ids": ids_of(8, 5) * 2, "prompt_length": 3, "merge": merge}
    ours, theirs = many_models.log_probs(ids, **own)[:, 2:], reference.log_probs(many_models, ids, **own)[:, 2:]
    assert np.abs(ours - theirs)[theirs > np.log(1e-6)].max() < 1e-3


def test_one_checkpoint_is_loaded_once(checkpoint, make_tiny_model):
    own = load_checkpoint(make_tiny_model("llama", seed=3))
    spec = ModelSpec(checkpoint, (Expert("a", checkpoint=own), Expert("b", checkpoint=own)), NamedPCM())
    model = MixtureModel(spec, backend="native")
    options = {"max_new_tokens": 5, "merge": "log_linear", "preference": {"a": 1, "b": 1}}
    assert np.array_equal(model.generate(ids_of(0, 9), **options), reference.generate(model, ids_of(0, 9), **options))
    assert len(model._decoder.model.models) == 1  # nobody reads with the base


@pytest.mark.parametrize("interval", [2, 5])
def test_pcm_interval_is_that_of_the_reference(learned, checkpoint, experts, interval):
    asked = []

    def turning(context):
        asked.append(context.step)
        return [1 + context.step, 2, 1 + len(context.generated[0]) % 3]

    called = MixtureModel(ModelSpec(checkpoint, experts, CallablePCM(turning)), backend="native")
    for model, own in [(learned, {"pcm_input_ids": ids_of(4, 7)}), (called, {})]:
        options = {"max_new_tokens": 13, "pcm_interval": interval, "return_dict_in_generate": True, "eos_token_id": []}
        ours = model.generate(ids_of(5, 20), **options, **own)
        assert asked == ([] if model is learned else list(range(0, 13, interval)))
        assert_same(ours, reference.generate(model, ids_of(5, 20), **options, **own), exact=False)
        weights = ours.mixture_weights[0]
        assert (weights[:interval] == weights[0]).all()
        assert (weights[interval] != weights[0]).any()


def test_log_linear_on_hidden_states(checkpoint, experts):
    """One row of the LM head under given weights, negative ones included; with log p_i on request."""
    pcm = FixedPCM({"base": -0.7, "one": 1.2, "two": 0.4})
    model = MixtureModel(ModelSpec(checkpoint, experts, pcm), backend="native")
    options = {"input_ids": ids_of(6, 15), "merge": "log_linear", "max_new_tokens": 16, "eos_token_id": []}
    engine = model.engine()
    request_ids = engine.add_request(**options), engine.add_request(**options, expert_logprobs=True)
    assert engine._submissions[request_ids[0]].sequences[0].combine
    plain, reported = finish(engine, *request_ids)
    theirs = reference.generate(model, **options, return_dict_in_generate=True)
    assert_same(reported, theirs, exact=False)
    assert np.array_equal(plain.sequences, theirs.sequences)
    assert np.array_equal(plain.logprobs, reported.logprobs)
    assert np.isnan(plain.expert_logprobs).all()
    assert not np.isnan(reported.expert_logprobs).any()


@pytest.mark.parametrize("merge", ["linear", "log_linear"])
def test_an_adapter_on_the_lm_head(checkpoint, experts, random_adapter, merge):
    config = checkpoint.config
    adapter = random_adapter(config, rank=5, seed=6, modules=("lm_head", "v_proj"))
    assert "lm_head" in adapter.sites
    spec = ModelSpec(checkpoint, (*experts[:2], Expert("two", adapter)), NamedPCM())
    model = MixtureModel(spec, backend="native")
    engine = model.engine()
    request_id = engine.add_request(ids_of(7, 12), merge=merge, expert_logprobs=True)
    assert not engine._submissions[request_id].sequences[0].combine
    options = {"merge": merge, "return_dict_in_generate": True}
    assert_same(finish(engine, request_id)[0], reference.generate(model, ids_of(7, 12), **options), exact=False)
    ours, theirs = (score(ids_of(8, 40), merge=merge) for score in (model.log_probs, model.reference.log_probs))
    assert np.abs(ours - theirs)[theirs > np.log(1e-6)].max() < 1e-3


def test_a_short_request_does_not_wait_for_a_long_prompt(learned):
    engine = learned.engine(prefill_chunk=16)
    first = engine.add_request(ids_of(0, 6), pcm_input_ids=ids_of(1, 3), max_new_tokens=60, eos_token_id=[])
    engine.step()
    engine.step()
    long = engine.add_request(ids_of(1, 200), pcm_input_ids=ids_of(1, 200), max_new_tokens=2)
    short = engine.add_request(ids_of(2, 20), pcm_input_ids=ids_of(1, 3), max_new_tokens=3)
    steps = 0
    while not engine.is_finished(short):
        # An answer that is under way gets a token at every step.
        assert first in {output.request_id for output in engine.step()}
        steps += 1
    assert not engine._submissions[long].outputs
    assert steps < 20
    finish(engine, first, long, short)


def test_stream_makes_the_steps_it_needs(learned):
    engine = learned.engine()
    requests = [request_of(number) for number in (2, 4, 7)]
    request_ids = [engine.add_request(**options) for options in requests]
    for request_id, options in zip(request_ids, requests, strict=True):
        outputs = list(engine.stream(request_id))
        whole = engine.result(request_id)
        assert [output.token for output in outputs] == whole.sequences[0, len(options["input_ids"][0]) :].tolist()
        assert [output.position for output in outputs] == list(range(len(outputs)))
        assert [output.finish_reason for output in outputs[:-1]] == [None] * (len(outputs) - 1)
        assert outputs[-1].finish_reason in ("eos", "length")
        np.testing.assert_array_equal([output.mixture_weights for output in outputs], whole.mixture_weights[0])
    closed = engine.add_request(ids_of(0, 5), pcm_input_ids=ids_of(0, 5), max_new_tokens=50, eos_token_id=[])
    tokens = engine.stream(closed)
    next(tokens)
    tokens.close()
    assert_all_free(engine)


def test_threads_may_stream_at_the_same_time(learned, alone):
    engine, results = learned.engine(), {}

    def consume(number):
        request_id = engine.add_request(**request_of(number), expert_logprobs=True)
        tokens = [output.token for output in engine.stream(request_id)]
        results[number] = tokens, engine.result(request_id)

    threads = [threading.Thread(target=consume, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(6):
        tokens, output = results[number]
        assert_same(output, alone(number))
        assert tokens == output.sequences[0, -len(tokens) :].tolist()


def test_astream_shares_one_loop_of_steps_and_cancelling_aborts(learned, alone):
    engine = learned.engine()
    numbers = list(range(6))

    async def consume(number):
        request_id = engine.add_request(**request_of(number), expert_logprobs=True)
        tokens = [output.token async for output in engine.astream(request_id)]
        return tokens, engine.result(request_id)

    async def endless(started):
        request_id = engine.add_request(ids_of(0, 9), pcm_input_ids=ids_of(0, 9), max_new_tokens=200, eos_token_id=[])
        async with aclosing(engine.astream(request_id)) as outputs:
            async for _ in outputs:
                started.set()

    async def main():
        started = asyncio.Event()
        cancelled = asyncio.create_task(endless(started))
        await started.wait()
        others = asyncio.gather(*(consume(number) for number in numbers))
        await asyncio.sleep(0)
        cancelled.cancel()
        results = await others
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        return results

    for number, (tokens, output) in zip(numbers, asyncio.run(main()), strict=True):
        assert_same(output, alone(number))
        assert tokens == output.sequences[0, -len(tokens) :].tolist()
    assert not engine.has_unfinished
    assert_all_free(engine)
    assert engine.stats()["steps"] < 60 + max(20, 200)  # all together, not one after the other


class RefusedError(Exception):
    pass


def test_a_request_that_fails_takes_nothing_with_it(checkpoint, experts):
    nan = AdapterSite(np.full((1, 96), np.nan, np.float32), np.ones((64, 1), np.float32), 1.0)
    broken = Adapter(None, {"model.layers.1.mlp.down_proj": nan}, identity="broken")

    def weights(context):
        if context.step == 3 and context.preference.text == "refuse":
            raise RefusedError
        return [1, 1, 1, 1]

    spec = ModelSpec(checkpoint, (*experts, Expert("broken", broken)), CallablePCM(weights))
    model = MixtureModel(spec, backend="native")
    good = {"active": NAMES, "max_new_tokens": 8, "eos_token_id": [], "return_dict_in_generate": True}
    expected = model.generate(ids_of(0, 9), **good)
    del good["return_dict_in_generate"]

    def refuse(input_ids, scores):
        if input_ids.shape[1] == 11:
            raise RefusedError
        return scores

    engine = model.engine()
    fine = engine.add_request(ids_of(0, 9), **good, expert_logprobs=True)
    in_pcm = engine.add_request(ids_of(0, 9) * 2, **good, preference="refuse")
    in_processor = engine.add_request(ids_of(0, 9), **good, logits_processor=refuse)
    in_criterion = engine.add_request(ids_of(0, 9), **good, stopping_criteria=lambda ids, scores: [True, False])
    in_numbers = engine.add_request([*ids_of(0, 9), *ids_of(1, 9)], **{**good, "active": ["base", "broken"]})
    in_numbers_seen = engine.add_request(
        ids_of(0, 9), **{**good, "active": ["base", "broken"]}, logits_processor=lambda ids, scores: scores
    )
    failed = set()
    while engine.has_unfinished:
        failed |= {output.request_id for output in engine.step() if output.finish_reason == "error"}
    assert failed == {in_pcm, in_processor, in_criterion, in_numbers, in_numbers_seen}
    assert_same(engine.result(fine), expected)
    for request_id, error, message in [
        (in_pcm, RefusedError, None),
        (in_processor, RefusedError, None),
        (in_criterion, ValueError, r"stopping_criteria: expected a bool or shape \[1\], got \[2\]"),
        (in_numbers, ValueError, "row 0, token 0: NaN or .inf"),
        (in_numbers_seen, ValueError, "row 0, token 0: NaN or .inf"),
    ]:
        with pytest.raises(error, match=message):
            list(engine.stream(request_id))
        with pytest.raises(error, match=message):
            engine.result(request_id)
    assert_all_free(engine)
    # generate raises, and goes on afterwards.
    with pytest.raises(RefusedError):
        model.generate(ids_of(0, 9), **good, preference="refuse")
    assert_all_free(model._decoder._engine[0])
    assert_same(model.generate(ids_of(0, 9), **good, return_dict_in_generate=True), expected)


def test_a_step_that_fails_fails_all_and_leaves_the_engine_usable(learned, alone, monkeypatch):
    engine = learned.engine()
    doomed = engine.add_request(**{**request_of(1), "max_new_tokens": 20, "eos_token_id": []})
    engine.step()

    def run(plan):
        raise MemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "run", run)
        with pytest.raises(MemoryError):
            engine.step()
    with pytest.raises(MemoryError, match="no memory"):
        engine.result(doomed)
    assert_all_free(engine)
    assert_same(finish(engine, engine.add_request(**request_of(1), expert_logprobs=True))[0], alone(1))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"streamer": None}, TypeError, "unexpected keyword argument 'streamer'; use engine.stream"),
        ({"return_dict_in_generate": True}, TypeError, "'return_dict_in_generate'; engine.result returns"),
        ({"temperatur": 1.0}, TypeError, r"add_request\(\) got an unexpected keyword argument 'temperatur'"),
        ({"expert_logprobs": 1}, TypeError, "expert_logprobs: expected a bool, got 1"),
        ({"pcm_interval": 0}, ValueError, "pcm_interval: expected an integer >= 1, got 0"),
        ({"pcm_interval": 1.5}, TypeError, "pcm_interval: expected an integer >= 0, got 1.5"),
        ({"temperature": -1}, ValueError, "temperature: expected a finite number >= 0"),
        ({"max_new_tokens": 151}, ValueError, r"max_new_tokens: .* may need 30 blocks .* has 20; .*kv_blocks=30"),
        ({"max_new_tokens": 1000}, ValueError, "max_new_tokens: expert 'base' reads 5 tokens, and its model has 256"),
    ],
)
def test_bad_requests(named, options, error, message):
    engine = named.engine(kv_blocks=20)
    with pytest.raises(error, match=message):
        engine.add_request(ids_of(0, 5), **options)
    assert not engine.has_unfinished


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_batch": 0}, "max_batch: expected an integer >= 1, got 0"),
        ({"kv_blocks": 0}, "kv_blocks: expected an integer >= 1, got 0"),
        ({"prefill_chunk": -1}, "prefill_chunk: expected an integer >= 0, got -1"),
        ({"block_size": 32}, "unexpected keyword argument 'block_size'"),
    ],
)
def test_bad_engines(named, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        named.engine(**options)


def test_the_reference_backend_has_no_engine(named):
    with pytest.raises(ValueError, match=r"backend: an engine needs the 'native' or the 'torch' backend, got 'ref"):
        MixtureModel(named.spec, backend="reference").engine()


def test_a_result_is_asked_for_when_it_is_there(named, monkeypatch):
    monkeypatch.setattr(engine_module, "KEPT_RESULTS", 2)
    engine = named.engine()
    request_ids = [engine.add_request(ids_of(n, 4), max_new_tokens=2, preference={"one": 1}) for n in range(3)]
    with pytest.raises(ValueError, match="request_id: expected a finished request, and 0 is not"):
        engine.result(request_ids[0])
    while engine.has_unfinished:
        engine.step()
    with pytest.raises(ValueError, match=r"request_id: .*, got 0"):  # dropped for those that came after it
        engine.result(request_ids[0])
    assert engine.result(request_ids[2]).sequences.shape == (1, 6)
    assert isinstance(engine, Engine)


def test_a_step_inside_of_a_step_is_refused_and_a_generate_is_not(checkpoint, experts):
    inner = []

    def weights(context):
        if context.step == 1 and context.preference.text == "outer":
            inner.append(model.generate(ids_of(1, 3), max_new_tokens=2))
            if engine.has_unfinished:
                with pytest.raises(RuntimeError, match="engine: step was called from inside of a step"):
                    engine.step()
        return [1, 1, 1]

    model = MixtureModel(ModelSpec(checkpoint, experts, CallablePCM(weights)), backend="native")
    engine = model.engine()
    (output,) = finish(engine, engine.add_request(ids_of(0, 3), max_new_tokens=4, preference="outer"))
    assert output.sequences.shape == (1, 7)
    # The engine behind generate is busy when the callable calls generate: that gets another one.
    assert model.generate(ids_of(0, 3), max_new_tokens=4, preference="outer").shape == (1, 7)
    assert [answer.shape for answer in inner] == [(1, 5), (1, 5)]


def test_generate_reuses_prompts_and_makes_its_cache_larger(learned, monkeypatch):
    from pcm_fast.backends import engine_decoder

    monkeypatch.setattr(engine_decoder, "USUAL_BYTES", 1 << 16)
    monkeypatch.setattr(engine_decoder, "MOST_BYTES", 1 << 17)
    model = MixtureModel(learned.spec, backend="native")
    options = {"pcm_input_ids": ids_of(1, 40), "max_new_tokens": 4, "return_dict_in_generate": True}
    first = model.generate(ids_of(0, 40), **options)
    engine = model._decoder._engine[0]
    assert engine.stats()["reused_tokens"] == 0
    assert_same(model.generate(ids_of(0, 40), **options), first)
    assert model._decoder._engine[0] is engine
    assert engine.stats()["reused_tokens"] >= 4 * 32
    # Longer than all of that cache: a larger one. More rows than fit at once: they wait for their turn.
    long = {**options, "pcm_input_ids": ids_of(1, 200) * 6, "max_new_tokens": 30}
    together = model.generate(ids_of(0, 200) * 6, **long)
    assert model._decoder._engine[0] is not engine
    assert_same(together, reference.generate(model, ids_of(0, 200) * 6, **long), exact=False)
    assert set(together.timings) == {"prefill", "decode", "time_to_first_token", "tokens"}
    assert 0 < together.timings["time_to_first_token"] <= together.timings["prefill"]


def test_generate_with_everything_at_once(learned):
    """Padding, torch, several sequences, processors, criteria: each sequence sees its padded row."""
    ids = torch.as_tensor(np.random.default_rng(1).integers(3, 320, size=(2, 12)))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    seen = []

    def halve(input_ids, scores):
        assert scores.shape == (1, 320) or not seen
        return scores / 2

    options = {
        "attention_mask": mask,
        "pcm_input_ids": [*ids_of(3, 4), *ids_of(4, 9)],
        "num_return_sequences": 2,
        "max_new_tokens": 7,
        "min_new_tokens": 3,
        "logits_processor": halve,
        "stopping_criteria": lambda input_ids, scores: input_ids.shape[1] >= 17,
        "return_dict_in_generate": True,
    }
    ours = learned.generate(ids, **options)
    assert isinstance(ours.sequences, torch.Tensor)
    assert ours.sequences.shape == (4, 17)
    assert_same(ours, reference.generate(learned, ids, **options), exact=False)


def test_forced_reference_kernels_draw_the_same(learned, monkeypatch):
    options = {**request_of(5), "return_dict_in_generate": True}
    expected = learned.generate(**options)
    monkeypatch.setenv("PCM_FAST_FORCE", "reference")
    assert_same(learned.generate(**options), expected, exact=False)


def test_keys_and_values_in_bfloat16(learned):
    model = MixtureModel(learned.spec, backend="native", kv_dtype="bfloat16")
    ids, own = ids_of(2, 60), {"pcm_input_ids": ids_of(3, 5), "prompt_length": 3}
    ours, theirs = model.log_probs(ids, **own)[0, 2:], learned.log_probs(ids, **own)[0, 2:]
    divergence = (np.exp(theirs) * (theirs - ours)).sum(axis=1).mean()
    assert 0 < divergence < 1e-2
    assert model.generate(ids, pcm_input_ids=ids, max_new_tokens=3).shape == (1, 63)
    with pytest.raises(ValueError, match="kv_dtype: expected one of 'float32', 'bfloat16', got 'int8'"):
        MixtureModel(learned.spec, kv_dtype="int8")
    with pytest.raises(ValueError, match="kv_dtype: the reference backend keeps keys and values in float32"):
        MixtureModel(learned.spec, backend="reference", kv_dtype="bfloat16")


@pytest.mark.parametrize("seed", range(6))
def test_anything_may_happen_in_any_order(learned, alone, seed):
    """Requests come and go at random; all that finish have the tokens they have alone, and nothing is left behind."""
    rng = random.Random(seed)
    engine = learned.engine(
        max_batch=rng.choice([1, 3, 8]),
        kv_blocks=rng.choice([34, 45, 200]),
        prefill_chunk=rng.choice([1, 16, 100]),
    )
    live, finished = {}, 0
    for _ in range(200):
        action = rng.random()
        if action < 0.2 and len(live) < 12:
            number = rng.randrange(24) if rng.random() < 0.6 else rng.randrange(LONG, LONG + 8)
            live[engine.add_request(**request_of(number), expert_logprobs=True)] = number
        elif action < 0.25 and live:
            request_id = rng.choice(list(live))
            del live[request_id]
            assert engine.abort(request_id)
        else:
            engine.step()
        for request_id in [request_id for request_id in live if engine.is_finished(request_id)]:
            assert_same(engine.result(request_id), alone(live.pop(request_id)))
            finished += 1
        if rng.random() < 0.1:
            for cache in engine._runner.caches:
                cache.check()
    for request_id, output in zip(live, finish(engine, *live), strict=True):
        assert_same(output, alone(live[request_id]))
    assert finished + len(live) > 5
    assert_all_free(engine)


def test_dataclasses_of_the_spec_can_still_be_replaced(named):
    model = MixtureModel(dataclasses.replace(named.spec, pcm=FixedPCM({"one": 1.0})), backend="native")
    assert model.generate(ids_of(0, 4), max_new_tokens=2).shape == (1, 6)
