"""Tokenizers and chat templates, against transformers."""

import dataclasses
import json
import os
import re
import shutil
import stat
from pathlib import Path

import pytest
import tokenizers
import transformers
from gguf import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from pcm_fast import gguf_tokenizer
from pcm_fast.checkpoint import LoadError, check_same_vocabulary
from pcm_fast.gguf_header import read_header
from pcm_fast.gguf_tokenizer import SPLITS, byte_spelling, cache_path, read_gguf_tokenizer
from pcm_fast.loader import load_checkpoint
from pcm_fast.tokenizer import Tokenizer, read_hf_tokenizer

CORPUS = [
    "",
    " ",
    "   \n\n\t x\r\n",
    "Hello, world!",
    "The quick brown fox doesn't jump; it's they'll, we'VE, I'M.",
    "  leading and trailing  ",
    "def f(x):\n    return x ** 2 + 10_000  # comment\n\n\nclass A:\n\tpass\n",
    "for (int i = 0; i < 1024; ++i) { a[i] += 3.14159e-10f; }",
    "1 12 123 1234 12345 2024-11-23 3,141.59 0x1F",
    "  12   345\n    0: zero",
    "x² + y³ = ½ · Ⅷ ١٢٣ १२३",
    "naïve café Ångström ß ŒÆ ﬁ",
    "cafe\u0301 e\u0301 (not composed)",
    "Привет, мир! Как дела?",
    "你好，世界。我喜欢机器学习。",
    "こんにちは世界 カタカナ",
    "안녕하세요 세계",
    "مرحبا بالعالم",
    "שלום עולם",
    "🙂 👩‍👩‍👧‍👦 🇫🇷 👍🏽",
    "zero\u200bwidth\u00a0nbsp\u3000ideographic",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "<|im_end|><|endoftext|> <|im_end|> text<|im_start|>text",
    "<s> </s> <unk> <|not_a_token|> <think> </think>",
    "\x00\x01\x7f control",
    "https://example.org/a?b=c&d=%20#e",
    "a" * 300,
    "!" * 50 + "..." + "-" * 40,
    "Mixed 中文 and English, números y más: ¿qué?",
    '{"key": [1, 2.5, null, true], \'k\': "v\\n"}',
]
CONVERSATIONS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"}],
    [
        {"role": "user", "content": "Hi\n\nthere <b>&amp;</b>"},
        {"role": "assistant", "content": "Hello! 'quoted' \"text\""},
        {"role": "user", "content": "  Grüße 🙂  "},
    ],
    [{"role": "assistant", "content": ""}],
]
TEMPLATES = {
    "chatml": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "blocks": (
        "{{ bos_token }}\n    {% set ns = namespace(count=0) %}\n{% for message in messages %}\n"
        "    {% if message.content is not defined %}{% continue %}{% endif %}\n"
        "  {% set ns.count = ns.count + 1 %}\n{{ ns.count }} {{ message.role | upper }}: {{ message.content | trim }}\n"
        "{% generation %}{{ message.content | tojson }}{% endgeneration %}\n"
        "{% if ns.count == 2 %}{% break %}{% endif %}\n{% endfor %}\n"
        "{{ messages | tojson(indent=2) }}{{ {'é': 1, 'a': '<'} | tojson(ensure_ascii=True, sort_keys=True) }}\n"
        "{% if tools %}{{ tools | tojson }}{% endif %}{{ dict(a=1, b=[2]) }}{{ eos_token }}"
        "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
        "{{ strftime_now('%Y') }}"
    ),
}


def check_same_ids(ours: Tokenizer, theirs) -> None:
    for text in CORPUS:
        for special in (True, False):
            ids = theirs.encode(text, add_special_tokens=special)
            assert ours.encode(text, add_special_tokens=special) == ids, text
            for skip in (True, False):
                assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


# The embedded model


@pytest.fixture(scope="session")
def their_embedded_tokenizer(embedded_gguf):
    return transformers.AutoTokenizer.from_pretrained(embedded_gguf.parent, gguf_file=embedded_gguf.name)


def test_the_embedded_tokenizer_is_that_of_transformers(embedded_checkpoint, their_embedded_tokenizer):
    ours, theirs = embedded_checkpoint.tokenizer, their_embedded_tokenizer
    check_same_ids(ours, theirs)
    assert ours.backend.get_vocab() == theirs.get_vocab()
    assert ours.special_tokens == theirs.special_tokens_map
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (1, 2, 2)
    assert ours.vocab_size == len(theirs) == 49152
    assert ours.chat_template == theirs.chat_template
    ours_added, their_added = (
        {index: repr(token) for index, token in backend.get_added_tokens_decoder().items()}
        for backend in (ours.backend, theirs.backend_tokenizer)
    )
    assert ours_added == their_added


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(codec="utf-8"), max_size=40))
def test_any_text_is_encoded_as_by_transformers(embedded_checkpoint, their_embedded_tokenizer, text):
    ids = embedded_checkpoint.tokenizer.encode(text)
    assert ids == their_embedded_tokenizer.encode(text)
    assert embedded_checkpoint.tokenizer.decode(ids) == their_embedded_tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_the_embedded_chat_template(embedded_checkpoint, their_embedded_tokenizer, messages, add_generation_prompt):
    ours = embedded_checkpoint.tokenizer
    text = their_embedded_tokenizer.apply_chat_template(
        messages, add_generation_prompt=add_generation_prompt, tokenize=False
    )
    assert ours.apply_chat_template(messages, add_generation_prompt, tokenize=False) == text
    ids = their_embedded_tokenizer.apply_chat_template(
        messages, add_generation_prompt=add_generation_prompt, return_dict=False
    )
    assert ours.apply_chat_template(messages, add_generation_prompt) == ids


# Other kinds of GGUF tokenizers, small ones


def write_gguf(path: Path, architecture: str, fields: dict) -> Path:
    writer = GGUFWriter(path, architecture)
    for key, value in {"model": "gpt2", "bos_token_id": 1, "eos_token_id": 2, **fields}.items():
        name = f"tokenizer.ggml.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif value is not None:
            writer.add_array(name, value)
    # What transformers wants to know before it makes a tokenizer.
    for key, number in (
        ("block_count", 1),
        ("context_length", 64),
        ("embedding_length", 32),
        ("feed_forward_length", 32),
    ):
        writer.add_uint32(f"{architecture}.{key}", number)
    for key in ("attention.head_count", "attention.head_count_kv"):
        writer.add_uint32(f"{architecture}.{key}", 2)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_float32(f"{architecture}.rope.freq_base", 1e4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
USER_DEFINED = ["<think>", "</think>"]


def byte_level_fields(pre: str) -> dict:
    """A byte-level vocabulary trained on the corpus."""
    backend = tokenizers.Tokenizer(models.BPE())
    split = SPLITS.get(pre)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    parts = [] if split is None else [pre_tokenizers.Split(Regex(split), "isolated")]
    backend.pre_tokenizer = pre_tokenizers.Sequence([*parts, to_bytes])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=CONTROL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS * 2, trainer)
    state = json.loads(backend.to_str())["model"]
    tokens = [*sorted(state["vocab"], key=state["vocab"].get), *USER_DEFINED]
    kinds = [3] * len(CONTROL) + [1] * (len(tokens) - len(CONTROL) - len(USER_DEFINED)) + [4] * len(USER_DEFINED)
    return {"pre": pre, "tokens": tokens, "token_type": kinds, "merges": [" ".join(pair) for pair in state["merges"]]}


def sentencepiece_fields() -> dict:
    """A scored vocabulary with byte tokens, as of Llama 2."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=500, limit_alphabet=150, show_progress=False)
    backend.train_from_iterator(CORPUS * 2, trainer)
    learned = sorted(backend.get_vocab(), key=backend.get_vocab().get)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *learned]
    kinds = [2, 3, 3, *[6] * 256, *[1] * len(learned)]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(learned))]
    return {"model": "llama", "tokens": tokens, "token_type": kinds, "scores": scores, "unknown_token_id": 0}


KINDS = {
    "default": ("llama", lambda: byte_level_fields("default")),
    "gpt-2": ("qwen2", lambda: byte_level_fields("gpt-2")),
    "smollm": ("llama", lambda: byte_level_fields("smollm")),
    "llama-bpe": ("llama", lambda: byte_level_fields("llama-bpe") | {"add_bos_token": True}),
    "llama-bpe-silent": ("llama", lambda: byte_level_fields("llama-bpe")),
    "qwen2": ("qwen2", lambda: byte_level_fields("qwen2") | {"add_bos_token": False, "padding_token_id": 0}),
    "qwen3": ("qwen3", lambda: byte_level_fields("qwen2")),
    "bos-and-eos": ("llama", lambda: byte_level_fields("llama3") | {"add_bos_token": True, "add_eos_token": True}),
    "sentencepiece": ("llama", sentencepiece_fields),
    "sentencepiece-no-bos": ("llama", lambda: sentencepiece_fields() | {"add_bos_token": False}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_gguf_tokenizers_are_those_of_transformers(tmp_path, kind):
    architecture, fields = KINDS[kind]
    path = write_gguf(tmp_path / "tiny.gguf", architecture, fields())
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    header = read_header(path)
    built, cached = read_gguf_tokenizer(header), read_gguf_tokenizer(header)
    assert cache_path(header).exists()
    assert built.backend.to_str() == cached.backend.to_str()
    for ours in (built, cached):
        check_same_ids(ours, theirs)
        assert ours.backend.get_vocab() == theirs.get_vocab()
        assert (ours.bos_token_id, ours.eos_token_id) == (1, 2)


def test_byte_spelling():
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    assert byte_spelling() == bytes_to_unicode()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"model": "bert"}, "tokenizer.ggml.model: expected 'gpt2' or 'llama', got 'bert'"),
        (
            {"pre": "tekken"},
            "tokenizer.ggml.pre: expected one of default, gpt-2, smollm, llama-bpe, llama3, llama-v3, qwen2",
        ),
        ({"merges": None}, "tokenizer.ggml.merges is missing, expected with tokenizer.ggml.model 'gpt2'"),
        ({"merges": ["zz zz"]}, "tokenizer.ggml: the metadata make no tokenizer: "),
        ({"model": "llama", "merges": None}, "expected tokenizer.ggml.merges, or a score for every token"),
    ],
)
def test_gguf_tokenizers_that_are_refused(tmp_path, fields, message):
    base = {"tokens": ["<s>", "a", "b"], "token_type": [3, 1, 1], "merges": ["a b"], "pre": "gpt-2"}
    path = write_gguf(tmp_path / "tiny.gguf", "llama", base | fields)
    with pytest.raises(LoadError, match=re.escape(message)) as caught:
        read_gguf_tokenizer(read_header(path))
    assert str(caught.value).startswith(f"{path}: tokenizer.ggml")


def test_a_file_without_a_tokenizer(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", "llama", {})
    assert read_gguf_tokenizer(read_header(path)) is None


# The cache


@pytest.fixture
def tiny_header(tmp_path, monkeypatch):
    monkeypatch.setenv("PCM_FAST_CACHE", str(tmp_path / "cache"))
    return read_header(write_gguf(tmp_path / "tiny.gguf", "llama", byte_level_fields("smollm")))


def refuse_to_build(*_):
    raise AssertionError("built again")


def test_the_second_time_nothing_is_built(tiny_header, tmp_path, monkeypatch):
    first = read_gguf_tokenizer(tiny_header)
    assert [path.suffix for path in (tmp_path / "cache" / "tokenizers").iterdir()] == [".json"]
    monkeypatch.setattr(gguf_tokenizer, "build_backend", refuse_to_build)
    assert read_gguf_tokenizer(tiny_header).encode("Hello 12") == first.encode("Hello 12")
    # The same tokenizer in another place is the same entry; another tokenizer is not.
    shutil.copy(tiny_header.path, tmp_path / "copy.gguf")
    assert read_gguf_tokenizer(read_header(tmp_path / "copy.gguf")) is not None
    other = read_header(write_gguf(tmp_path / "other.gguf", "llama", byte_level_fields("qwen2")))
    with pytest.raises(AssertionError, match="built again"):
        read_gguf_tokenizer(other)


@pytest.mark.parametrize("damage", [b"", b"{", b"half", b'{"version": "1.0"}', b"\xff\xfe"])
def test_a_damaged_cache_is_rebuilt(tiny_header, damage):
    expected = read_gguf_tokenizer(tiny_header).encode("Hello 12")
    path = cache_path(tiny_header)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if damage == b"half" else damage)
    assert read_gguf_tokenizer(tiny_header).encode("Hello 12") == expected
    assert path.read_bytes() == whole


def test_a_cache_of_another_vocabulary_is_rebuilt(tiny_header):
    expected = read_gguf_tokenizer(tiny_header).encode("Hello 12")
    cache_path(tiny_header).write_text(tokenizers.Tokenizer(models.BPE({"a": 0}, [])).to_str())
    assert read_gguf_tokenizer(tiny_header).encode("Hello 12") == expected


def test_a_cache_that_cannot_be_written_is_no_error(tiny_header, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("PCM_FAST_CACHE", str(tmp_path / "file"))
    assert read_gguf_tokenizer(tiny_header) is not None
    read_only = tmp_path / "read-only"
    read_only.mkdir(mode=stat.S_IRUSR | stat.S_IXUSR)
    monkeypatch.setenv("PCM_FAST_CACHE", str(read_only))
    assert read_gguf_tokenizer(tiny_header) is not None

    def full(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setenv("PCM_FAST_CACHE", str(tmp_path / "full"))
    monkeypatch.setattr(os, "replace", full)
    assert read_gguf_tokenizer(tiny_header) is not None
    assert list((tmp_path / "full" / "tokenizers").iterdir()) == []  # nothing half-written stays behind


# Hugging Face directories


@pytest.fixture
def hf_tokenizer(tmp_path):
    """A small tokenizer saved by transformers; returns theirs and its directory."""

    def save(**settings):
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.normalizer = normalizers.NFC()
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=300, special_tokens=CONTROL, initial_alphabet=alphabet, show_progress=False
        )
        backend.train_from_iterator(CORPUS, trainer)
        backend.add_tokens([AddedToken(token, special=False) for token in USER_DEFINED])
        backend.enable_padding()
        backend.enable_truncation(5)
        special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **{**special, **settings})
        theirs.save_pretrained(tmp_path)
        return theirs, tmp_path

    return save


@pytest.mark.parametrize("settings", [{}, {"add_bos_token": True}, {"add_bos_token": True, "add_eos_token": True}])
def test_hf_tokenizers_are_those_of_transformers(hf_tokenizer, settings):
    theirs, directory = hf_tokenizer(chat_template=TEMPLATES["chatml"], **settings)
    theirs.backend_tokenizer.no_padding()
    theirs.backend_tokenizer.no_truncation()
    ours = read_hf_tokenizer(directory)
    check_same_ids(ours, theirs)
    assert ours.special_tokens == theirs.special_tokens_map
    assert ours.pad_token_id == 0
    assert ours.chat_template == TEMPLATES["chatml"]
    # As older versions of transformers saved it.
    (directory / "chat_template.jinja").unlink()
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text())
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    for template, expected in (("old", "old"), (named, "yes"), (None, None)):
        config |= {"chat_template": template, "eos_token": {"__type": "AddedToken", "content": "<|im_end|>"}}
        path.write_text(json.dumps(config))
        assert read_hf_tokenizer(directory).chat_template == expected
        assert read_hf_tokenizer(directory).eos_token_id == 2


def test_hf_tokenizers_that_are_refused(hf_tokenizer):
    _, directory = hf_tokenizer()
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({"eos_token": "<nowhere>"}))
    with pytest.raises(LoadError, match=r"tokenizer_config\.json: special token '<nowhere>' is not in tokenizer\.json"):
        read_hf_tokenizer(directory)
    (directory / "chat_template.jinja").write_bytes(b"\xff")
    path.write_text("{}")
    with pytest.raises(LoadError, match=r"chat_template\.jinja: cannot be read as text"):
        read_hf_tokenizer(directory)
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(LoadError, match=r"tokenizer\.json: not a tokenizer that the tokenizers library can read"):
        read_hf_tokenizer(directory)
    (directory / "tokenizer.json").unlink()
    assert read_hf_tokenizer(directory) is None


def test_vocabulary_mismatch(hf_tokenizer, make_tiny_model, tmp_path):
    _, directory = hf_tokenizer()
    small, fitting, same, other = (
        make_tiny_model("llama", seed=seed, vocab_size=size) for seed, size in enumerate((200, 310, 310, 310))
    )
    for model in (small, fitting, same, other):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(directory / name, model / name)
    with pytest.raises(LoadError) as caught:
        load_checkpoint(small).tokenizer  # noqa: B018
    assert str(caught.value) == (
        f"{small}: vocabulary mismatch: the tokenizer has 302 tokens, "
        "expected at most 200, the rows of model.embed_tokens.weight"
    )
    assert load_checkpoint(fitting).tokenizer.vocab_size == 302
    check_same_vocabulary(load_checkpoint(fitting), load_checkpoint(same))
    path = other / "tokenizer.json"
    path.write_text(path.read_text().replace("<think>", "<thunk>"))
    with pytest.raises(LoadError, match=r"expected token id 300 to be '<think>', as in .*, got '<thunk>'"):
        check_same_vocabulary(load_checkpoint(fitting), load_checkpoint(other))


@pytest.mark.parametrize(
    "vocabulary, conflict",
    [
        ({"a": 0, "b": 1, "c": 3}, None),
        ({"a": 0, "b": 1}, None),
        ({"a": 0, "b": 1, "more": 2, "c": 3, "even more": 4}, None),
        ({"a": 1, "b": 0, "c": 3}, "expected token id 0 to be 'a', as in {base}, got 'b'"),
        ({"a": 0, "b": 1, "c": 2}, "expected token id 3 to be 'c', as in {base}, got None"),
        ({"a": 0, "b": 1, "d": 3}, "expected token id 3 to be 'c', as in {base}, got 'd'"),
    ],
)
def test_same_vocabulary(tiny_llama_dir, vocabulary, conflict):
    def with_tokens(tokens):
        return dataclasses.replace(
            load_checkpoint(tiny_llama_dir),
            read_tokenizer=lambda: Tokenizer(tokenizers.Tokenizer(models.BPE(tokens, []))),
        )

    base, other = with_tokens({"a": 0, "b": 1, "c": 3}), with_tokens(vocabulary)
    if conflict is None:
        check_same_vocabulary(base, other)
        check_same_vocabulary(other, base)
    else:
        with pytest.raises(LoadError, match=re.escape("vocabulary mismatch: " + conflict.format(base=tiny_llama_dir))):
            check_same_vocabulary(base, other)


# Chat templates


@pytest.mark.parametrize("variables", [{}, {"tools": [{"name": "f", "x": 1.5}], "enable_thinking": False}])
@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_render_as_in_transformers(hf_tokenizer, template, messages, variables):
    theirs, directory = hf_tokenizer(chat_template=TEMPLATES[template])
    theirs.backend_tokenizer.no_truncation()
    ours = read_hf_tokenizer(directory)
    for prompt in (True, False):
        text = theirs.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False, **variables)
        assert ours.apply_chat_template(messages, prompt, tokenize=False, **variables) == text
        ids = ours.apply_chat_template(messages, prompt, **variables)
        assert ids == theirs.encode(text, add_special_tokens=False)


@pytest.fixture
def templated():
    return lambda template: Tokenizer(tokenizers.Tokenizer(models.BPE({}, [])), chat_template=template)


@pytest.mark.parametrize(
    "template, messages, error, message",
    [
        (None, [{"role": "user"}], ValueError, "chat_template: this tokenizer has none"),
        ("{% if %}", [{"role": "user"}], ValueError, "chat_template: not a valid Jinja template"),
        ("x", [], ValueError, "messages: expected at least one, got none"),
        ("x", "hello", TypeError, "messages: expected a list of mappings with role and content, got str"),
        ("x", ["hello"], TypeError, "messages[0]: expected a mapping with role and content, got str"),
        (
            "x",
            [{"role": "user", "content": {1, 2}}],
            TypeError,
            "messages[0]['content']: expected text, numbers, lists",
        ),
        ("{{ raise_exception('no system turn') }}", [{"role": "system"}], ValueError, "messages: refused by the chat "),
        ("{{ messages.__class__.__mro__ }}", [{"role": "user"}], ValueError, "is unsafe"),
        ("{{ messages.append(1) }}", [{"role": "user"}], ValueError, "is unsafe"),
        ("{{ dict.__subclasses__() }}", [{"role": "user"}], ValueError, "has no attribute '__subclasses__'"),
        (
            "{{ messages[0].content + 1 }}",
            [{"role": "user", "content": "x"}],
            ValueError,
            "messages: refused by the chat ",
        ),
    ],
)
def test_bad_conversations_and_templates(templated, template, messages, error, message):
    with pytest.raises(error) as caught:
        templated(template).apply_chat_template(messages, tokenize=False)
    assert message in str(caught.value)


def test_absent_content_is_left_out(templated):
    tokenizer = templated("{{ messages[0].content is defined }}")
    assert tokenizer.apply_chat_template([{"role": "user", "content": None}], tokenize=False) == "False"


def test_encode_wants_text(embedded_checkpoint):
    with pytest.raises(TypeError, match="text: expected str, got int"):
        embedded_checkpoint.tokenizer.encode(3)
