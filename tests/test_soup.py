"""The mean of adapters is the mean of what they change, in numbers and in what the model says."""

import numpy as np
import pytest

from pcm_fast import MixtureModel
from pcm_fast.adapter import Adapter, AdapterSite
from pcm_fast.evaluate.soup import average_adapters
from pcm_fast.experts import Expert
from pcm_fast.loader import load_checkpoint
from pcm_fast.pcm import NamedPCM
from pcm_fast.spec import ModelSpec


@pytest.fixture(scope="module")
def checkpoint(tiny_models):
    return load_checkpoint(tiny_models["llama"])


@pytest.fixture(scope="module")
def adapters(checkpoint, random_adapter):
    """Of different ranks, and on different sites."""
    return [
        random_adapter(checkpoint.config, seed=1, rank=4, modules=("q_proj", "v_proj")),
        random_adapter(checkpoint.config, seed=2, rank=7, modules=("q_proj", "down_proj")),
        random_adapter(checkpoint.config, seed=3, rank=2),
    ]


def test_it_changes_every_weight_by_the_mean(checkpoint, adapters):
    soup = average_adapters(adapters)
    assert set(soup.sites) == set().union(*(adapter.sites for adapter in adapters))
    for module, shape in checkpoint.config.linear_shapes().items():
        deltas = [adapter.sites[module].delta() if module in adapter.sites else np.zeros(shape) for adapter in adapters]
        if module in soup.sites:
            np.testing.assert_allclose(soup.sites[module].delta(), np.mean(deltas, axis=0), atol=1e-6)
    assert soup.sites["model.layers.0.self_attn.q_proj"].rank == 4 + 7 + 2


def test_scaling_counts():
    one = np.ones((1, 2), np.float32), np.ones((3, 1), np.float32)
    soup = average_adapters(
        [Adapter(None, {"m": AdapterSite(*one, 3.0)}), Adapter(None, {"m": AdapterSite(*one, 1.0)})]
    )
    np.testing.assert_array_equal(soup.sites["m"].delta(), np.full((3, 2), 2.0))


def test_one_adapter_is_its_own_mean(adapters):
    soup = average_adapters(adapters[:1])
    for module, site in adapters[0].sites.items():
        np.testing.assert_allclose(soup.sites[module].delta(), site.delta(), atol=1e-6)


def test_a_model_with_the_soup_is_one_with_averaged_weights(checkpoint, adapters):
    """Against the definition: transformers, with the mean of the merged weights put in by hand."""
    import torch
    import transformers

    ids = np.random.default_rng(0).integers(3, 320, size=(1, 12))
    spec = ModelSpec(checkpoint, (Expert("soup", average_adapters(adapters)),), NamedPCM())
    ours = MixtureModel(spec, backend="native", num_threads=1).log_probs(ids)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)
    layers = dict(model.named_modules())
    with torch.no_grad():
        for adapter in adapters:
            for module, site in adapter.sites.items():
                layers[module].weight += torch.from_numpy(site.delta() / len(adapters))
        theirs = torch.log_softmax(model(torch.from_numpy(ids)).logits, dim=-1).numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
