"""Captured decode steps, on a stand-in for CUDA's graphs: the order of calls, the memory, and the tokens."""

import logging

import numpy as np
import pytest
from recorded_graphs import Operators, RecordedGraphs

from pcm_fast.adapter import Adapter
from pcm_fast.backends.torch_graphs import MAX_SHAPES, ShapeGraphs
from pcm_fast.backends.torch_models import TorchModels
from pcm_fast.backends.torch_runner import TorchRunner, _buckets
from pcm_fast.backends.torch_step import StepBuffers, StepShape
from pcm_fast.engine import Engine
from pcm_fast.experts import Expert
from pcm_fast.loader import load_checkpoint
from pcm_fast.model import MixtureModel
from pcm_fast.pcm import LearnedPCM
from pcm_fast.spec import ModelSpec

NAMES = ("base", "one", "two")


def ids_of(seed, length):
    return np.random.default_rng(seed).integers(3, 320, size=(1, length)).tolist()


@pytest.fixture(scope="module")
def spec(tiny_models, random_adapter):
    checkpoint = load_checkpoint(tiny_models["llama"])
    adapters: list[Adapter | None] = [None, *(random_adapter(checkpoint.config, rank=r, seed=r) for r in (4, 7))]
    rng = np.random.default_rng(5)
    head = rng.normal(size=(3, 64)).astype(np.float32), rng.normal(size=3).astype(np.float32)
    pcm = LearnedPCM("shared", NAMES, "{preference}", *head, adapter=random_adapter(checkpoint.config, rank=3, seed=3))
    return ModelSpec(checkpoint, tuple(Expert(*pair) for pair in zip(NAMES, adapters, strict=True)), pcm)


@pytest.fixture(scope="module")
def models(spec):
    return TorchModels(spec, "float32", 1, "float32", "cpu")


@pytest.fixture(scope="module")
def eager(spec):
    return MixtureModel(spec, backend="torch", device="cpu", num_threads=1)


def engine_on(spec, models, api, max_batch=4, blocks=60):
    return Engine(spec, TorchRunner(models, [blocks], max_batch, api), max_batch, 64)


def request(number, **more):
    options = {
        "input_ids": ids_of(number, 4 + 5 * number),
        "pcm_input_ids": ids_of(50 + number, 3),
        "max_new_tokens": 40,  # several blocks
        "top_p": 0.9,
        "seed": number,
        "eos_token_id": [],
    }
    return {**options, **more}


def finish(engine, *ids):
    while engine.has_unfinished:
        engine.step()
    return [engine.result(number) for number in ids]


def test_replays_give_the_tokens_of_eager_runs(spec, models, eager):
    api = RecordedGraphs()
    engine = engine_on(spec, models, api)
    requests = [request(0), request(1, max_new_tokens=11), request(2, preference={"one": 1, "two": 1}), request(3)]
    outputs = finish(engine, *(engine.add_request(**options, expert_logprobs=True) for options in requests))
    for options, output in zip(requests, outputs, strict=True):
        solo = eager.generate(**options, return_dict_in_generate=True)
        assert (output.sequences == solo.sequences).all()
        for name in ("logprobs", "mixture_weights", "expert_logprobs"):
            np.testing.assert_allclose(getattr(output, name), getattr(solo, name), atol=1e-4)
    stats = engine._runner.graphs.stats()
    assert stats["captures"] == stats["graphs"] == api.events.count("capture")
    assert stats["replays"] > 25


def test_the_order_of_calls(spec, models):
    api = RecordedGraphs()
    engine = engine_on(spec, models, api)
    finish(engine, engine.add_request(**request(1, max_new_tokens=6)))
    # The first token comes with the end of the prompt.
    assert api.events == ["warm up", "warmed up", "capture", "captured", *["replay"] * 5]


def test_nothing_is_allocated_and_no_buffer_moves_between_replays(spec, models):
    api = RecordedGraphs()
    engine = engine_on(spec, models, api)
    request_id = engine.add_request(**request(0))
    addresses, quiet, busy, extensions = set(), 0, 0, set()
    while engine.has_unfinished:
        before = api.events.count("replay")
        with Operators(api) as outside:
            engine.step()
        if before == 0:
            continue  # the prompt, and the step that is captured
        plan = engine._core.scheduler._last
        if plan is not None:
            buffers = plan.prepared.buffers
            addresses.add(tuple(tensor.data_ptr() for tensor in buffers.tensors.values()))
            extensions.add(plan.extensions)
        quiet += not outside.names
        busy += bool(outside.names)
    assert len(addresses) == 1
    assert quiet > 30
    assert busy == len(extensions)  # steps before which rows were given blocks
    assert 2 <= busy < 8
    engine.result(request_id)


def test_another_plan_uses_the_graph_that_is_there(spec, models):
    api = RecordedGraphs()
    engine = engine_on(spec, models, api)
    for number in range(3):
        finish(engine, engine.add_request(**request(number, max_new_tokens=5)))
    assert api.events.count("capture") == 1
    assert api.events.count("replay") == 12
    finish(engine, *(engine.add_request(**request(number, max_new_tokens=5)) for number in range(3)))
    assert api.events.count("capture") > 1  # other buckets


def test_the_least_used_graph_goes_when_the_budget_is_spent(models):
    shape = StepShape((3,), "linear", 1.0, ())
    ran = []

    def make(bucket):
        return StepBuffers(shape, bucket, models, 4)

    size = {bucket: sum(t.nbytes for t in make(bucket).tensors.values()) for bucket in (1, 2, 4)}
    graphs = ShapeGraphs(RecordedGraphs(), make, lambda buffers: ran.append(buffers), [1, 2, 4], size[2] + size[4])

    def run(batch):
        buffers = graphs.buffers(batch)
        assert buffers.bucket == graphs.store.bucket(batch)
        return graphs.store.run(batch, 1), buffers

    assert not run(1)[0]
    kept = run(2)[1]
    assert not run(3)[0]  # bucket 4; that of 1 gives way
    assert graphs.store.stats() == {
        "graphs": 2, "bytes": size[2] + size[4], "captures": 3, "replays": 0, "evictions": 1,
    }  # fmt: skip
    assert run(2) == (True, kept)
    assert not run(1)[0]  # that of 4 gives way, which was run before that of 2
    assert run(2) == (True, kept)
    assert ran.count(kept) == 1  # it is captured once, and never warmed up


def test_what_cannot_be_captured_is_said_once_and_runs_all_the_same(spec, eager, caplog):
    on_cuda = TorchModels(spec, "float32", 1, "float32", "cpu")
    engine = engine_on(spec, on_cuda, RecordedGraphs(fails=True))
    engine._runner._on_gpu = True  # so that it says what it would say there
    with caplog.at_level(logging.WARNING):
        outputs = finish(engine, *(engine.add_request(**request(number)) for number in range(2)))
        finish(engine, engine.add_request(**request(1, repetition_penalty=1.2)))
        finish(engine, engine.add_request(**request(1, pcm_interval=3)))
        finish(engine, *(engine.add_request(**request(n, merge=m)) for n, m in enumerate(["linear", "log_linear"])))
    for number, output in enumerate(outputs):
        assert (output.sequences == eager.generate(**request(number))).all()
    reasons = [record.getMessage().partition(": ")[2] for record in caplog.records]
    assert reasons == [
        "no graph could be captured (operation not permitted when stream is capturing)",
        "processors or criteria see log p before the draw",
        "a PCM that is asked every few tokens only reads more than one token at a time",
        "sequences with different merge rules",
    ]


def test_shapes_are_kept_up_to_a_number(spec, models):
    api = RecordedGraphs()
    engine = engine_on(spec, models, api)
    rules = [f"power({number})" for number in range(1, MAX_SHAPES + 3)]
    for rule in rules:
        finish(engine, engine.add_request(**request(0, max_new_tokens=3, merge=rule)))
    assert engine._runner.graphs.stats()["graphs"] == MAX_SHAPES
    assert api.events.count("capture") == len(rules)


def test_buckets_hold_every_batch():
    for most in (1, 2, 3, 8, 9, 32, 33):
        buckets = _buckets(most)
        assert buckets == sorted(set(buckets))
        assert buckets[-1] == most
