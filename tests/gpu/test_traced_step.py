"""The torch backend traced for a GPU that is not there: fake tensors on "cuda", through whole answers of an engine."""

import contextlib

import numpy as np
import pytest
import torch
from device_region import DeviceRegion, NotCapturableError, device_guard
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import FakeTensor

from pcm_fast.backends import cuda_kv, torch_kv, torch_ops, torch_step
from pcm_fast.backends.torch_models import TorchModels
from pcm_fast.backends.torch_runner import TorchRunner
from pcm_fast.engine import Engine
from pcm_fast.experts import Expert
from pcm_fast.loader import load_checkpoint
from pcm_fast.pcm import LearnedPCM
from pcm_fast.spec import ModelSpec

DEVICE = "cuda:0"
NAMES = ("base", "one", "two")


class TracedGraphs:
    """A ``GraphApi`` that captures by tracing, every operator under the rules of a captured region."""

    def __init__(self):
        self.operators, self.replays = [], 0

    def warm_up(self):
        return contextlib.nullcontext()

    def make_graph(self):
        return None

    @contextlib.contextmanager
    def capture(self, graph):
        with DeviceRegion() as region:
            yield
        self.operators.append(region.operators)

    def replay(self, graph):
        self.replays += 1

    def reserved(self):
        return 0


@pytest.fixture
def traced(monkeypatch):
    """Fake tensors, which a host that reads them finds to be zeros; and no device to choose."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())

    def zeros(tensor):
        assert tensor.device.type == "cpu", "a tensor on the device was taken for an array"
        shape, dtype = tuple(tensor.shape), torch.empty(0, dtype=tensor.dtype).to_sparse().dtype
        return np.zeros(shape, str(dtype).removeprefix("torch."))

    monkeypatch.setattr(FakeTensor, "numpy", zeros, raising=False)
    with device_guard(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


@pytest.fixture(scope="module", params=["one base", "three models"])
def spec(request, tiny_models, random_adapter, make_tiny_model):
    checkpoint = load_checkpoint(tiny_models["llama"])
    adapters = [None, *(random_adapter(checkpoint.config, rank=rank, seed=rank) for rank in (4, 7))]
    experts = tuple(Expert(*pair) for pair in zip(NAMES, adapters, strict=True))
    head = np.ones((3, 64), np.float32), np.zeros(3, np.float32)
    if request.param == "one base":
        return ModelSpec(checkpoint, experts, LearnedPCM("shared", NAMES, "{preference}", *head, adapter=adapters[1]))
    own = load_checkpoint(make_tiny_model("mistral", seed=11, num_hidden_layers=2))
    separate = load_checkpoint(make_tiny_model("qwen3", seed=12, num_hidden_layers=2))
    pcm = LearnedPCM("separate", NAMES, "{preference}", *head, checkpoint=separate)
    return ModelSpec(checkpoint, (*experts[:2], Expert("two", checkpoint=own)), pcm)


def answer(spec, weights, kv_dtype, merge="linear"):
    """Prompts, chunks of them, decode steps, new blocks and copies of blocks; the graphs that were captured."""
    models = TorchModels(spec, weights, 1, kv_dtype, DEVICE)
    graphs = TracedGraphs()
    engine = Engine(spec, TorchRunner(models, [64] * len(models.models), 4, graphs), 4, 16)
    options = {"max_new_tokens": 20, "eos_token_id": [], "pcm_input_ids": [[5, 6, 7]], "top_p": 0.9, "merge": merge}
    ids = np.arange(3, 40)[None]
    engine.add_request(ids, num_return_sequences=2, **options)
    engine.add_request(ids[:, :5], repetition_penalty=1.1, **{**options, "max_new_tokens": 2})
    while engine.has_unfinished:
        engine.step()
    return graphs


@pytest.mark.parametrize("extension", [False, True])
@pytest.mark.parametrize(("weights", "kv_dtype"), [("float32", "float32"), ("bfloat16", "bfloat16")])
def test_whole_answers_stay_on_the_device(spec, traced, monkeypatch, weights, kv_dtype, extension):
    monkeypatch.setattr(cuda_kv, "available", lambda: extension)
    monkeypatch.setattr(cuda_kv, "copy_blocks", lambda cache, pairs: None)  # no operator of torch, so not faked
    graphs = answer(spec, weights, kv_dtype)
    assert graphs.operators
    assert graphs.operators[0] > 50
    assert graphs.replays > 10


MISTAKES = {
    "the host reads": [lambda x: x.sum().item(), lambda x: bool(x.any())],
    "a tensor on cpu": [lambda x: x.cpu(), lambda x: x + torch.ones(x.shape), lambda x: torch.ones(3).to(x.device)],
    "a shape depends on data": [lambda x: x.nonzero(), lambda x: x[x > 0], lambda x: x.unique()],
}


@pytest.mark.parametrize(("noticed", "mistake"), [(noticed, m) for noticed, all_ in MISTAKES.items() for m in all_])
def test_every_mistake_in_a_captured_step_is_noticed(spec, traced, monkeypatch, noticed, mistake):
    right = torch_step.advance

    def wrong(drawn, *more):
        mistake(drawn)
        right(drawn, *more)

    monkeypatch.setattr(torch_step, "advance", wrong)
    with pytest.raises(NotCapturableError, match=noticed):
        captured_step(spec)


def test_a_wrong_type_of_index_is_noticed(spec, traced, monkeypatch):
    right = torch_ops.attention

    def wrong(q, keys, values, tables, lengths, scale, window):
        return right(q, keys, values, tables.long(), lengths, scale, window)

    monkeypatch.setattr(torch_ops, "attention", wrong)
    with pytest.raises(TypeError, match=r"tables: expected torch\.int32"):
        captured_step(spec)


def test_the_step_without_mistakes_is_captured(spec, traced):
    assert captured_step(spec) > 50


def captured_step(spec):
    """A decode step on empty buffers under the rules of a captured region; the number of its operators."""
    models = TorchModels(spec, "float32", 1, "float32", DEVICE)
    counts = [sum(reader.model == model for reader in models.experts) for model in range(len(models.models))]
    shape = torch_step.StepShape(tuple(counts), "linear", 1.0, ("top_p",))
    with models.running():
        buffers = torch_step.StepBuffers(shape, 4, models, 8)
        kv = [torch_kv.DeviceKv(model.config, 16, torch.float32, models.device) for model in models.models]
        with DeviceRegion() as region:
            torch_step.decode_step(models, kv, buffers)
    return region.operators
