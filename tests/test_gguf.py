"""GGUF files: headers, block formats, the order of rows, configurations, damage."""

import math
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFWriter, quants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pcm_fast.checkpoint import LoadError
from pcm_fast.gguf_file import scaling_of_factors
from pcm_fast.gguf_header import StringList, read_header
from pcm_fast.loader import load_checkpoint
from pcm_fast.quantization import CHUNK_BLOCKS, READABLE_DTYPES, block_layout, dequantize

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    module, _, suffix = name.rpartition(".")
    if module.startswith("model.layers."):
        layer, _, module = module.removeprefix("model.layers.").partition(".")
        return f"blk.{layer}.{GGUF_NAMES[module]}.{suffix}"
    return f"{GGUF_NAMES[module]}.{suffix}"


def llama_cpp_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """How llama.cpp's converter reorders the rows of q and k (LlamaModel.permute)."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


class TinyGGUF:
    """A GGUF file out of a transformers model directory; fields can be changed before it is written."""

    def __init__(self, directory: Path, kind: str) -> None:
        self.config = config = load_checkpoint(directory).config
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        self.arch = "llama" if config.family == "mistral" else config.family
        self.fields: dict[str, Any] = {
            f"{self.arch}.block_count": config.num_layers,
            f"{self.arch}.context_length": config.max_position_embeddings,
            f"{self.arch}.embedding_length": config.hidden_size,
            f"{self.arch}.feed_forward_length": config.intermediate_size,
            f"{self.arch}.attention.head_count": config.num_heads,
            f"{self.arch}.attention.head_count_kv": config.num_kv_heads,
            f"{self.arch}.attention.key_length": config.head_dim,
            f"{self.arch}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
            f"{self.arch}.rope.freq_base": config.rope_theta,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.padding_token_id": 0,
        }
        self.tensors: dict[str, tuple[np.ndarray, GGMLQuantizationType]] = {}
        self.expected: dict[str, np.ndarray] = {}
        heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
        for name, parameter in model.state_dict().items():
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            value = parameter.numpy()
            dtype = GGMLQuantizationType[kind if value.ndim == 2 else "F32"]
            stored = quants.quantize(value, dtype)
            self.expected[name] = quants.dequantize(stored, dtype)
            projection = name.split(".")[-2]
            if self.arch == "llama" and projection in heads:
                stored = quants.quantize(llama_cpp_order(value, heads[projection]), dtype)
            self.tensors[gguf_name(name)] = (stored, dtype)

    def write(self, path: Path) -> Path:
        writer = GGUFWriter(path, self.arch)
        for key, value in self.fields.items():
            if isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, int):
                writer.add_uint32(key, value)
            elif isinstance(value, float):
                writer.add_float32(key, value)
            elif isinstance(value, str):
                writer.add_string(key, value)
            elif value is not None:
                writer.add_array(key, value)
        for name, (stored, dtype) in self.tensors.items():
            writer.add_tensor(name, stored, raw_dtype=dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


@pytest.fixture
def tiny(tiny_models):
    """A tiny Llama as GGUF, Q8_0."""
    return TinyGGUF(tiny_models["llama"], "Q8_0")


def message_of(source) -> str:
    with pytest.raises(LoadError) as caught:
        load_checkpoint(source)
    assert "\n" not in str(caught.value)
    assert str(source) in str(caught.value)
    return str(caught.value)


# Whole files


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
@pytest.mark.parametrize("family", ["llama", "llama_biased", "qwen2", "qwen3"])
def test_weights_in_hugging_face_order(tiny_models, tmp_path, family, kind):
    tiny = TinyGGUF(tiny_models[family], kind)
    checkpoint = load_checkpoint(tiny.write(tmp_path / "tiny.gguf"))
    assert checkpoint.format == "gguf"
    assert checkpoint.tensors.keys() == tiny.expected.keys()
    for name, expected in tiny.expected.items():
        stored = checkpoint.tensors[name]
        np.testing.assert_array_equal(stored.dequantize(), expected)
        dtype = GGMLQuantizationType[stored.dtype]
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[dtype]
        rows = expected.shape[0] if expected.ndim == 2 else 1
        assert stored.blocks().shape == (rows, expected.shape[-1] // block_size * block_bytes)
        assert stored.blocks().dtype == np.uint8
        # Whole rows were moved, not requantised: the blocks are those of the unpermuted matrix.
        if expected.ndim == 2:
            reference = load_checkpoint(tiny_models[family]).tensors[name].dequantize()
            assert stored.blocks().tobytes() == quants.quantize(reference, dtype).tobytes()


@pytest.mark.parametrize("family", ["llama", "llama_biased", "qwen2", "qwen3"])
def test_config_comes_back(tiny_models, tmp_path, family):
    tiny = TinyGGUF(tiny_models[family], "F32")
    ours = load_checkpoint(tiny.write(tmp_path / "tiny.gguf")).config
    for name in (
        *("family", "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads"),
        *("head_dim", "rope_theta", "max_position_embeddings", "tie_word_embeddings", "attention_bias"),
        *("attention_out_bias", "mlp_bias", "qk_norm", "bos_token_id", "eos_token_ids", "pad_token_id"),
    ):
        assert getattr(ours, name) == getattr(tiny.config, name), name
    assert math.isclose(ours.rms_norm_eps, tiny.config.rms_norm_eps, rel_tol=1e-6)
    assert ours.linear_shapes() == tiny.config.linear_shapes()


def test_a_window_makes_a_mistral(tiny_models, tmp_path):
    tiny = TinyGGUF(tiny_models["mistral"], "F32")
    tiny.fields["llama.attention.sliding_window"] = 8
    config = load_checkpoint(tiny.write(tmp_path / "tiny.gguf")).config
    assert (config.family, config.sliding_window, config.sliding_layers) == ("mistral", 8, (True,) * 3)


def test_identity_of_gguf(tiny, tmp_path):
    first = load_checkpoint(tiny.write(tmp_path / "a.gguf")).identity
    assert load_checkpoint(tiny.write(tmp_path / "b.gguf")).identity == first
    tiny.tensors["blk.1.ffn_up.weight"][0][:] ^= 1
    assert load_checkpoint(tiny.write(tmp_path / "c.gguf")).identity != first


def test_lists_and_other_ends(tiny, tmp_path):
    tiny.fields["llama.attention.head_count_kv"] = [2, 2, 2]
    tiny.fields["tokenizer.ggml.eot_token_id"] = 9
    config = load_checkpoint(tiny.write(tmp_path / "tiny.gguf")).config
    assert (config.num_kv_heads, config.eos_token_ids) == (2, (2, 9))


def test_the_embedded_model(embedded_checkpoint):
    config = embedded_checkpoint.config
    assert (config.family, config.num_layers, config.hidden_size, config.vocab_size) == ("llama", 30, 576, 49152)
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.rope_theta) == (9, 3, 64, 1e5)
    assert config.tie_word_embeddings
    assert embedded_checkpoint.num_parameters == 134_515_008
    assert embedded_checkpoint.dtypes == {"Q4_1": 106_168_320, "Q8_0": 28_311_552, "F32": 35_136}
    assert embedded_checkpoint.num_bytes == 106_168_320 * 20 // 32 + 28_311_552 * 34 // 32 + 4 * 35_136


def test_the_embedded_weights_are_those_of_the_gguf_package(embedded_checkpoint, embedded_gguf):
    reader = gguf.GGUFReader(embedded_gguf)
    heads = {"attn_q.weight": 9, "attn_k.weight": 3}
    stored = {tensor.name: tensor for tensor in reader.tensors}
    for name in (
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.7.self_attn.q_proj.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.29.mlp.down_proj.weight",
    ):
        theirs = stored[gguf_name(name)]
        expected = quants.dequantize(theirs.data, theirs.tensor_type)
        count = heads.get(theirs.name.split(".", 2)[-1])
        if count is not None:
            # transformers' inverse, LlamaTensorProcessor._reverse_permute_weights
            expected = expected.reshape(count, -1, 2, 576).swapaxes(2, 1).reshape(expected.shape)
        np.testing.assert_array_equal(embedded_checkpoint.tensors[name].dequantize(), expected)


# The header, against gguf.GGUFReader


def check_against_the_reader(path: Path) -> None:
    ours, theirs = read_header(path), gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert ours.metadata.keys() == fields.keys()
    for key, expected in fields.items():
        value = ours.metadata[key]
        assert (value.read() if isinstance(value, StringList) else value) == expected, key
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        entry = ours.tensors[tensor.name]
        assert entry.shape == tuple(reversed(tensor.shape.tolist()))
        assert entry.dtype == tensor.tensor_type.name
        assert len(entry.data) == tensor.n_bytes
        assert entry.data.tobytes() == tensor.data.tobytes()
    assert len(ours.data) <= theirs.data_offset


def test_header_of_the_embedded_model(embedded_gguf):
    check_against_the_reader(embedded_gguf)


def test_header_with_every_kind_of_value(tmp_path, tiny):
    path = tmp_path / "kinds.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    for kind, low, high in (("uint8", 0, 255), ("int8", -128, 127), ("uint16", 0, 65535), ("int16", -32768, 32767)):
        getattr(writer, f"add_{kind}")(f"low.{kind}", low)
        getattr(writer, f"add_{kind}")(f"high.{kind}", high)
    for kind, low, high in (("uint32", 0, 2**32 - 1), ("int32", -(2**31), 2**31 - 1), ("uint64", 0, 2**64 - 1)):
        getattr(writer, f"add_{kind}")(f"low.{kind}", low)
        getattr(writer, f"add_{kind}")(f"high.{kind}", high)
    writer.add_int64("int64", -(2**63))
    writer.add_float32("float32", 0.1)
    writer.add_float64("float64", 0.1)
    writer.add_bool("bool", True)
    writer.add_string("string", "naïve 🦙")
    writer.add_array("strings", ["", "a", "日本"])
    writer.add_array("bools", [True, False])
    writer.add_array("floats", [0.5, -2.0])
    writer.add_array("integers", [1, -2, 3])
    for name, shape in (("scalar.row", (3,)), ("matrix", (5, 7)), ("cube", (2, 3, 4))):
        writer.add_tensor(name, np.arange(math.prod(shape), dtype=np.float32).reshape(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    check_against_the_reader(path)


# Block formats


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
@pytest.mark.parametrize("shape", [(1, 32), (3, 64), (CHUNK_BLOCKS + 1, 32), (257, 576)])
def test_dequantize_is_that_of_the_gguf_package(kind, shape):
    rng = np.random.default_rng(shape[0])
    dtype = GGMLQuantizationType[kind]
    values = rng.standard_normal(shape, dtype=np.float32) * np.exp(rng.standard_normal((shape[0], 1)) * 2)
    values[0, :32] = 0
    stored = quants.quantize(values.astype(np.float32), dtype).view(np.uint8)
    expected = quants.dequantize(stored, dtype)
    ours = dequantize(stored, kind)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, expected.reshape(shape))
    np.testing.assert_array_equal(np.signbit(ours), np.signbit(expected.reshape(shape)))


@pytest.mark.parametrize("kind", READABLE_DTYPES)
def test_every_readable_type_decodes_any_finite_bytes(kind):
    size, stored_bytes = block_layout(kind)
    stored = np.random.default_rng(3).integers(0, 60, (4, 2 * stored_bytes), dtype=np.uint8)
    decoded = dequantize(stored, kind)
    assert decoded.shape == (4, 2 * size)
    assert np.isfinite(decoded).all()
    # One row at a time, from memory that does not start on a multiple of four bytes.
    shifted = np.frombuffer(b"\0" + stored.tobytes(), np.uint8)[1:].reshape(stored.shape)
    for row in range(4):
        np.testing.assert_array_equal(dequantize(shifted[row : row + 1], kind)[0], decoded[row])


def test_unreadable_types_have_no_layout():
    with pytest.raises(ValueError, match=r"dtype: expected one of F32, .*, got 'I64'"):
        block_layout("I64")


def test_blocks_by_hand():
    """The layout of each format, from its definition in ggml-common.h."""
    half = lambda value: struct.pack("<e", value)  # noqa: E731
    codes = [(7 * i + 3) % 16 for i in range(32)]
    nibbles = bytes(codes[i] | codes[i + 16] << 4 for i in range(16))
    q4_1 = np.frombuffer(half(0.5) + half(-1.25) + nibbles, np.uint8)[None]
    assert dequantize(q4_1, "Q4_1").tolist() == [[0.5 * code - 1.25 for code in codes]]
    q4_0 = np.frombuffer(half(-0.25) + nibbles, np.uint8)[None]
    assert dequantize(q4_0, "Q4_0").tolist() == [[-0.25 * (code - 8) for code in codes]]
    signed = [-128, 127, *range(-15, 15)]
    q8_0 = np.frombuffer(half(2.0**-10) + struct.pack("<32b", *signed), np.uint8)[None]
    assert dequantize(q8_0, "Q8_0").tolist() == [[code / 1024 for code in signed]]
    bf16 = np.frombuffer(struct.pack("<4H", 0x3F80, 0xC020, 0x0001, 0x7F80), np.uint8)[None]
    assert dequantize(bf16, "BF16").tolist() == [[1.0, -2.5, 2.0**-133, math.inf]]


# Rotary scaling


def test_rope_scaling_keys(tiny, tmp_path):
    tiny.fields["llama.rope.scaling.type"] = "linear"
    tiny.fields["llama.rope.scaling.factor"] = 4.0
    path = tmp_path / "tiny.gguf"
    assert load_checkpoint(tiny.write(path)).config.rope_scaling == {"rope_type": "linear", "factor": 4.0}
    tiny.fields["llama.rope.scaling.type"] = "yarn"
    tiny.fields["llama.rope.scaling.original_context_length"] = 64
    expected = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert load_checkpoint(tiny.write(path)).config.rope_scaling == expected
    tiny.fields["llama.rope.scaling.type"] = "none"
    assert load_checkpoint(tiny.write(path)).config.rope_scaling is None
    tiny.fields["llama.rope.scaling.type"] = "longrope"
    assert "rope.scaling.type: expected none, linear or yarn, got 'longrope'" in message_of(tiny.write(path))
    tiny.fields["llama.rope.scaling.type"] = "linear"
    tiny.fields["llama.rope.scaling.factor"] = None
    assert "llama.rope.scaling.factor: expected a number, got nothing" in message_of(tiny.write(path))


def converter_factors(theta: float, head_dim: int, factor: float, low: float, high: float, context: int) -> np.ndarray:
    """The loop of llama.cpp's converter (LlamaModel.generate_extra_tensors)."""
    factors = []
    for frequency in (1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))).tolist():
        wavelength = 2 * math.pi / frequency
        if wavelength < context / high:
            factors.append(1.0)
        elif wavelength > context / low:
            factors.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, dtype=np.float32)


@pytest.mark.parametrize("head_dim, factor", [(128, 8.0), (64, 32.0), (32, 8.0)])
def test_llama3_scaling_is_recognised_in_its_factors(tiny_models, tmp_path, head_dim, factor):
    factors = converter_factors(5e5, head_dim, factor, 1.0, 4.0, 8192)
    expected = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert scaling_of_factors(factors, 5e5) == expected
    if head_dim == 32:
        tiny = TinyGGUF(tiny_models["llama_biased"], "F32")
        tiny.fields["llama.rope.freq_base"] = 5e5
        tiny.tensors["rope_freqs.weight"] = (factors, GGMLQuantizationType.F32)
        assert load_checkpoint(tiny.write(tmp_path / "tiny.gguf")).config.rope_scaling == expected
        tiny.tensors["rope_freqs.weight"] = (factors[:-1], GGMLQuantizationType.F32)
        assert message_of(tiny.write(tmp_path / "tiny.gguf")).endswith(
            "rope_freqs.weight: expected F32 [16], got F32 [15]"
        )


def test_other_factors_are_kept():
    factors = converter_factors(1e4, 32, 4.0, 1.0, 4.0, 64)
    assert scaling_of_factors(factors, 1e4) == {"rope_type": "factors", "factors": tuple(factors.tolist())}
    assert scaling_of_factors(np.ones(16, np.float32), 1e4) is None


# Bad input


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("llama.block_count", None, "llama.block_count: expected a number, got nothing"),
        ("llama.block_count", 4, "tensor model.layers.3.input_layernorm.weight is missing, expected shape [64]"),
        ("llama.block_count", 2**32 - 1, "expected 1 to 10000 layers and a head, got 4294967295 and 4"),
        ("llama.attention.head_count", "many", "llama.attention.head_count: expected a number, got 'many'"),
        ("llama.attention.head_count", 0, "expected 1 to 10000 layers and a head, got 3 and 0"),
        ("llama.attention.head_count_kv", [1, 2, 2], "llama.attention.head_count_kv: expected a number, got [1, 2, 2]"),
        ("llama.attention.head_count_kv", 3, "metadata: num_kv_heads: expected a divisor of 4, got 3"),
        ("llama.attention.layer_norm_rms_epsilon", None, "layer_norm_rms_epsilon: expected a number, got nothing"),
        ("llama.rope.dimension_count", 8, "llama.rope.dimension_count: expected the whole head of 16, got 8"),
        ("llama.attention.key_length", 8, "tensor model.layers.0.self_attn.q_proj.weight: expected 32 rows, got 64"),
        ("llama.feed_forward_length", 90, "mlp.gate_proj.weight: expected shape [90, 64], got [96, 64]"),
        ("llama.expert_count", 8, "llama.expert_count: expected a dense model, got a mixture-of-experts one"),
        ("split.count", 3, "expected a whole file, got one of 3 parts: merge them first"),
        ("general.alignment", 48, "general.alignment: expected a power of two, got 48"),
        ("tokenizer.ggml.tokens", ["x"] * 321, "tokenizer.ggml.tokens has 321 tokens, expected at most 320"),
    ],
)
def test_metadata_that_do_not_fit(tiny, tmp_path, field, value, message):
    tiny.fields[field] = value
    assert message in message_of(tiny.write(tmp_path / "tiny.gguf"))


def test_another_architecture(tiny, tmp_path):
    tiny.arch = "gemma3"
    message = message_of(tiny.write(tmp_path / "tiny.gguf"))
    assert "general.architecture: expected one of llama, mistral, qwen2, qwen3, got 'gemma3'" in message


@pytest.mark.parametrize("missing", ["token_embd.weight", "output_norm.weight", "blk.2.attn_v.weight"])
def test_missing_tensors(tiny, tmp_path, missing):
    del tiny.tensors[missing]
    name = next(name for name in tiny.expected if gguf_name(name) == missing)
    assert f"tensor {name}" in message_of(tiny.write(tmp_path / "tiny.gguf"))
    assert "is missing" in message_of(tmp_path / "tiny.gguf")


def test_unsupported_types_are_named(tiny, tmp_path):
    name = "blk.1.ffn_up.weight"
    blocks = np.zeros((96, 2 * 18), np.uint8)
    tiny.tensors[name] = (blocks.view(np.int32), GGMLQuantizationType.I32)
    message = message_of(tiny.write(tmp_path / "tiny.gguf"))
    assert "tensor model.layers.1.mlp.up_proj.weight: expected" in message
    tiny.tensors[name] = (np.zeros((96, 64), np.int32), GGMLQuantizationType.I32)
    message = message_of(tiny.write(tmp_path / "tiny.gguf"))
    assert message.endswith("got I32, which is not supported")
    content = bytearray((tmp_path / "tiny.gguf").read_bytes())
    content[content.index(name.encode()) + len(name) + 20] = 200  # after the number of dimensions and two of them
    (tmp_path / "tiny.gguf").write_bytes(content)
    assert message_of(tmp_path / "tiny.gguf").endswith(f"tensor {name}: type 200 is not supported: unknown to gguf")


def test_magic_and_version(tiny, tmp_path):
    path = tiny.write(tmp_path / "tiny.gguf")
    content = path.read_bytes()
    for head, message in (
        (b"GGML", "wrong magic: expected b'GGUF', got b'GGML'"),
        (b"GGUF\x01\0\0\0", "expected GGUF version 2 or 3, got 1"),
        (b"GGUF\0\0\0\x03", "expected GGUF version 2 or 3, got 50331648 (a big-endian file)"),
    ):
        path.write_bytes(head + content[len(head) :])
        assert message_of(path) == f"{path}: {message}"


def test_truncation_names_the_tensor(tiny, tmp_path):
    path = tiny.write(tmp_path / "tiny.gguf")
    content = path.read_bytes()
    header = read_header(path)
    last = list(header.tensors)[-1]
    position = len(content) - len(header.tensors[last].data) - 32
    assert position > len(header.data)
    path.write_bytes(content[:position])
    broken = next(
        name
        for name, entry in header.tensors.items()
        if entry.data.ctypes.data + len(entry.data) > header_end(header, position)
    )
    assert message_of(path).startswith(f"{path}: tensor {broken}: truncated: expected ")
    assert message_of(path).endswith(f"got a file of {position}")
    for length in (*range(0, 24, 5), *np.random.default_rng(0).integers(24, len(header.data), 40)):
        path.write_bytes(content[: int(length)])
        assert str(path) in message_of(path)


def header_end(header: Any, position: int) -> int:
    """The address in memory of a position of the mapped file."""
    return header.data.ctypes.data + position


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_headers_are_load_errors_or_load(tiny_llama_gguf, tmp_path, data):
    content = bytearray(tiny_llama_gguf.read_bytes())
    header_bytes = len(read_header(tiny_llama_gguf).data)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, header_bytes))] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.gguf"
    path.unlink(missing_ok=True)  # the last one may still be mapped
    path.write_bytes(content)
    try:
        checkpoint = load_checkpoint(path)
        checkpoint.tokenizer  # noqa: B018
    except LoadError:
        return
    assert checkpoint.identity
    for tensor in checkpoint.tensors.values():
        assert tensor.dequantize().shape == tensor.shape


@pytest.fixture(scope="module")
def tiny_llama_gguf(tiny_models, tmp_path_factory):
    """A tiny Llama in Q4_1 with a small vocabulary."""
    tiny = TinyGGUF(tiny_models["llama"], "Q4_1")
    letters = [chr(code) for code in range(33, 127)]
    tiny.fields |= {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": ["<|endoftext|>", "<s>", "</s>", *letters, "Ġ", "in", "the"][:100],
        "tokenizer.ggml.token_type": [3, 3, 3, *[1] * 97],
        "tokenizer.ggml.merges": ["i n"],
    }
    return tiny.write(tmp_path_factory.mktemp("gguf") / "tiny.gguf")
