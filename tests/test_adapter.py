"""LoRA adapters: what PEFT reads is what we read, and what we save PEFT reads."""

import json
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file as load_numpy
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file

from pcm_fast.adapter import Adapter, AdapterSite, load_adapter, save_adapter
from pcm_fast.checkpoint import LoadError
from pcm_fast.loader import load_checkpoint

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base_model(directory: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def save_with_peft(base: Path, target: Path, dtype=torch.float32, embeddings=False, **options) -> None:
    """A random adapter, made and saved by PEFT."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = peft.LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "target_modules": ALL_LINEAR, **options})
        model = peft.get_peft_model(base_model(base), config)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    model.to(dtype).save_pretrained(target, save_embedding_layers=embeddings)


def merged_by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    model = peft.PeftModel.from_pretrained(base_model(base), str(adapter))
    return model.merge_and_unload().state_dict()


def check_merged_weights(base: Path, adapter: Adapter, merged: dict[str, torch.Tensor]) -> None:
    checkpoint = load_checkpoint(base)
    tied = checkpoint.config.tie_word_embeddings
    for module in checkpoint.config.linear_shapes():
        stored = checkpoint.head if module == "lm_head" else checkpoint.tensors[f"{module}.weight"]
        weight = stored.dequantize()
        if module in adapter.sites:
            weight = weight + adapter.sites[module].delta()
        elif module == "lm_head" and tied:
            continue
        np.testing.assert_allclose(weight, merged[f"{module}.weight"].numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora_alpha": 32, "r": 16, "target_modules": ["q_proj", "v_proj"]},
        {"target_modules": r".*\.[02]\.(mlp|self_attn)\.(down_proj|o_proj)"},
        {"target_modules": "all-linear", "use_rslora": True, "r": 3, "lora_alpha": 5},
        {"target_modules": ["lm_head", "up_proj"]},
        {"layers_to_transform": [1], "target_modules": ["k_proj"]},
        {"exclude_modules": ["model.layers.0.mlp.up_proj"], "lora_dropout": 0.1},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 7}, "alpha_pattern": {"down_proj": 3, "q_proj": 9}},
        # The first pattern that matches decides; patterns are regular expressions matched at the end.
        {"rank_pattern": {r"layers\.[01]\..*": 2, "q_proj": 6}, "alpha_pattern": {r".*_proj": 5, "q_proj": 1}},
        {"rank_pattern": {r"^model\.layers\.2\.mlp\.gate_proj": 5, "proj": 6, "rot": 9}},
        {"rank_pattern": {"v_proj": 9}, "alpha_pattern": {"v_proj": 2, "gate_proj": 30}, "use_rslora": True},
    ],
)
def test_adapters_are_those_of_peft(tiny_qwen3_dir, tmp_path, options):
    save_with_peft(tiny_qwen3_dir, tmp_path, **options)
    adapter = load_adapter(tmp_path, load_checkpoint(tiny_qwen3_dir).config)
    assert adapter.sites
    assert adapter.path == tmp_path
    check_merged_weights(tiny_qwen3_dir, adapter, merged_by_peft(tiny_qwen3_dir, tmp_path))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_adapters(tiny_llama_dir, tmp_path, dtype):
    save_with_peft(tiny_llama_dir, tmp_path, dtype=dtype)
    adapter = load_adapter(tmp_path, load_checkpoint(tiny_llama_dir).config)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    for module, site in adapter.sites.items():
        for factor, value in (("A", site.A), ("B", site.B)):
            tensor = stored[f"base_model.model.{module}.lora_{factor}.weight"]
            assert tensor.dtype == dtype
            np.testing.assert_array_equal(value, tensor.float().numpy())
            assert value.dtype == np.float32


def test_saved_adapters_are_read_by_peft(tiny_model, tmp_path, random_adapter):
    config = load_checkpoint(tiny_model).config
    parts = [
        random_adapter(config, 0, rank=4, modules=("q_proj", "up_proj")),
        random_adapter(config, 1, rank=2, modules=("down_proj", "1.self_attn.k_proj")),
    ]
    sites = {**parts[0].sites, **parts[1].sites}
    for module in list(sites):
        if ".2." in module:
            sites[module] = AdapterSite(sites[module].A, sites[module].B, scaling=0.3)
    adapter = Adapter(None, sites)
    save_adapter(adapter, tmp_path / "new" / "adapter", base_model_name_or_path="tiny")
    check_merged_weights(tiny_model, adapter, merged_by_peft(tiny_model, tmp_path / "new" / "adapter"))
    again = load_adapter(tmp_path / "new" / "adapter", config)
    assert again.sites.keys() == adapter.sites.keys()
    for module, site in adapter.sites.items():
        np.testing.assert_array_equal(again.sites[module].A, site.A)
        np.testing.assert_array_equal(again.sites[module].B, site.B)
        assert again.sites[module].scaling == pytest.approx(site.scaling, rel=1e-15)
    assert again.num_parameters == adapter.num_parameters == sum(s.A.size + s.B.size for s in sites.values())


def test_an_adapter_of_one_scaling_survives_exactly(tiny_llama_dir, tmp_path, random_adapter):
    config = load_checkpoint(tiny_llama_dir).config
    adapter = random_adapter(config, 3)
    save_adapter(adapter, tmp_path)
    options = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (options["rank_pattern"], options["alpha_pattern"]) == ({}, {})
    assert (options["r"], options["lora_alpha"]) == (4, 8.0)
    assert load_adapter(tmp_path, config).identity == adapter.identity


def test_an_adapter_is_saved_over_the_file_it_reads(tiny_llama_dir, tmp_path, random_adapter):
    config = load_checkpoint(tiny_llama_dir).config
    save_adapter(random_adapter(config, 3), tmp_path)
    adapter = load_adapter(tmp_path, config)
    before = {module: (site.A, site.B) for module, site in adapter.sites.items()}
    save_adapter(random_adapter(config, 4, rank=2), tmp_path)
    for module, (a, b) in before.items():
        np.testing.assert_array_equal(adapter.sites[module].A, a)
        np.testing.assert_array_equal(adapter.sites[module].B, b)
    save_adapter(adapter, tmp_path)
    assert load_adapter(tmp_path, config).identity == adapter.identity
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_identity(tiny_llama_dir, tmp_path, random_adapter):
    config = load_checkpoint(tiny_llama_dir).config
    adapter = random_adapter(config, 0)
    assert random_adapter(config, 0).identity == adapter.identity
    module, site = next(iter(adapter.sites.items()))
    changed = site.A.copy()
    changed[0, 0] = np.nextafter(changed[0, 0], np.float32(1))
    for other in (
        AdapterSite(changed, site.B, site.scaling),
        AdapterSite(site.A, site.B, 2.5),
        AdapterSite(site.A, -site.B, site.scaling),
    ):
        assert Adapter(None, {**adapter.sites, module: other}).identity != adapter.identity
    assert Adapter(None, adapter.sites, identity="mine").identity == "mine"


@pytest.mark.parametrize(
    "a, b, error",
    [
        (np.zeros((2, 3), np.float32), np.zeros((4, 3), np.float32), ValueError),
        (np.zeros((0, 3), np.float32), np.zeros((4, 0), np.float32), ValueError),
        (np.zeros(3, np.float32), np.zeros((4, 3), np.float32), ValueError),
        (np.zeros((2, 3), np.float64), np.zeros((4, 2), np.float32), TypeError),
    ],
)
def test_sites_check_themselves(a, b, error):
    with pytest.raises(error, match="A, B: expected"):
        AdapterSite(a, b, 1.0)


def test_saving_nothing():
    with pytest.raises(ValueError, match="adapter: expected at least one site, got none"):
        save_adapter(Adapter(None, {}), "anywhere")


# Bad input


@pytest.fixture
def saved(tiny_llama_dir, tmp_path, random_adapter):
    """A saved adapter for the tiny Llama, and that Llama's configuration."""
    config = load_checkpoint(tiny_llama_dir).config
    save_adapter(random_adapter(config, 0, modules=("q_proj", "down_proj")), tmp_path)
    return tmp_path, config


def message_of(path, config) -> str:
    with pytest.raises(LoadError) as caught:
        load_adapter(path, config)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"use_dora": True}, "use_dora: expected it unset, got True, which is not supported"),
        ({"bias": "all"}, "bias: expected 'none', got 'all', which is not supported"),
        ({"bias": "lora_only"}, "bias: expected 'none', got 'lora_only', which is not supported"),
        ({"lora_bias": True}, "lora_bias: expected it unset, got True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: expected it unset, got ['lm_head']"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out: expected it unset, got True"),
        ({"layer_replication": [[0, 2]]}, "layer_replication: expected it unset, got [[0, 2]]"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices: expected it unset, got [3]"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens: expected it unset, got [1]"),
        ({"target_parameters": ["x"]}, "target_parameters: expected it unset, got ['x']"),
        ({"peft_type": "IA3"}, "peft_type: expected 'LORA', got 'IA3'"),
        ({"peft_type": "PREFIX_TUNING"}, "peft_type: expected 'LORA', got 'PREFIX_TUNING'"),
        ({"peft_type": None}, "peft_type: expected 'LORA', got None"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: 'pissa_niter_4' changes the base weights too"),
        ({"init_lora_weights": "olora"}, "init_lora_weights: 'olora' changes the base weights too"),
        ({"r": 0}, "r of model.layers.0.self_attn.q_proj: expected a positive integer, got 0"),
        ({"r": 2.5}, "r of model.layers.0.self_attn.q_proj: expected a positive integer, got 2.5"),
        ({"lora_alpha": None}, "lora_alpha of model.layers.0.self_attn.q_proj: expected a number, got None"),
        ({"lora_alpha": float("nan")}, "lora_alpha of model.layers.0.self_attn.q_proj: expected a number, got nan"),
        (
            {"rank_pattern": ["q_proj"]},
            "rank_pattern: expected a mapping from module patterns to numbers, got ['q_proj']",
        ),
        ({"alpha_pattern": {"(": 2}}, "alpha_pattern: '(' is not a regular expression"),
        ({"r": 8}, "self_attn.q_proj.lora_A.weight: expected rank 8, as adapter_config.json says, got shape [4, 64]"),
        (
            {"rank_pattern": {"down_proj": 2}},
            "mlp.down_proj.lora_A.weight: expected rank 2, as adapter_config.json says",
        ),
    ],
)
def test_options_that_are_refused(saved, change, message):
    directory, config = saved
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert message in message_of(directory, config)


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"bias": "lora_only"},
        {"modules_to_save": ["norm"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["embed_tokens"], "embeddings": True},
        {"target_modules": ["lm_head"], "embeddings": True},
    ],
)
def test_what_peft_really_saves_is_refused(tiny_mistral_dir, tmp_path, options):
    save_with_peft(tiny_mistral_dir, tmp_path, **options)
    assert "not supported" in message_of(tmp_path, load_checkpoint(tiny_mistral_dir).config)


def test_an_adapter_for_another_base(saved, make_tiny_model, tiny_qwen3_dir):
    directory, config = saved
    wide = load_checkpoint(make_tiny_model("llama", hidden_size=128)).config
    assert message_of(directory, wide) == (
        f"{directory / 'adapter_model.safetensors'}: tensor base_model.model.model.layers.0.self_attn.q_proj.lora_A."
        "weight: adapter for another base: expected shape [4, 128], got [4, 64]"
    )
    assert "q_proj.lora_B.weight: adapter for another base: expected shape [128, 4], got [64, 4]" in message_of(
        directory, load_checkpoint(tiny_qwen3_dir).config
    )
    short = load_checkpoint(make_tiny_model("llama", num_hidden_layers=2)).config
    assert "adapter for another base: this one has no linear layer model.layers.2." in message_of(directory, short)
    load_adapter(directory, config)


def test_weights_that_do_not_fit(saved):
    directory, config = saved
    path = directory / "adapter_model.safetensors"
    stored = load_numpy(path)
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
    save_numpy({key: value for key, value in stored.items() if key != name}, path)
    assert message_of(directory, config) == f"{path}: tensor {name} is missing, expected shape [64, 4]"
    save_numpy({**stored, name.replace("lora_B", "lora_C"): stored[name]}, path)
    assert "lora_C.weight: expected base_model.model.<layer>.lora_A.weight or lora_B.weight" in message_of(
        directory, config
    )
    save_numpy({**stored, name: stored[name].reshape(-1)}, path)
    assert "adapter for another base: expected shape [64, 4], got [256]" in message_of(directory, config)
    save_numpy({**stored, name: stored[name].astype(np.int32)}, path)
    assert message_of(directory, config).endswith("expected F32, F16 or BF16, got I32")
    save_numpy({}, path)
    assert message_of(directory, config).endswith("expected LoRA weights, got an empty file")
    save_numpy(stored, path)
    path.write_bytes(path.read_bytes()[:-7])
    assert "truncated: expected " in message_of(directory, config)
    path.unlink()
    assert message_of(directory, config) == f"{path}: missing, expected beside adapter_config.json"
    (directory / "adapter_model.bin").write_bytes(b"")
    assert "adapter_model.bin: pickled weights can run code when loaded and are refused" in message_of(
        directory, config
    )


def test_what_is_no_adapter(saved, tmp_path, tiny_llama_dir):
    _, config = saved
    message = message_of(tiny_llama_dir, config)
    assert message == f"{tiny_llama_dir}: expected a PEFT adapter directory, got no adapter_config.json"
    shutil.rmtree(tmp_path / "nowhere", ignore_errors=True)
    assert "expected a PEFT adapter directory" in message_of(tmp_path / "nowhere", config)
    (tmp_path / "adapter_config.json").write_text("not json")
    assert "adapter_config.json: cannot be read as JSON" in message_of(tmp_path, config)


def test_embedding_weights_in_the_file(saved):
    directory, config = saved
    path = directory / "adapter_model.safetensors"
    stored = {key: torch.from_numpy(value) for key, value in load_numpy(path).items()}
    stored["base_model.model.model.embed_tokens.lora_embedding_A"] = torch.zeros(4, 320)
    save_file(stored, path)
    assert "LoRA on an embedding is not supported" in message_of(directory, config)
