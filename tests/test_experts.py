import numpy as np
import pytest
from tokenizers import Tokenizer, models

from pcm_fast.adapter import save_adapter
from pcm_fast.experts import Expert, load_experts
from pcm_fast.loader import LoadError, load_checkpoint


@pytest.fixture(scope="module")
def base(tiny_llama_dir):
    return load_checkpoint(tiny_llama_dir)


@pytest.fixture(scope="module")
def adapter_dir(base, random_adapter, tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapter")
    save_adapter(random_adapter(base.config, seed=1), directory)
    return directory


def test_no_spec_is_the_base_alone(base):
    assert load_experts(None, base) == (Expert("base"),)


def test_every_form_in_the_order_given(base, adapter_dir, tiny_llama_dir):
    experts = load_experts(
        {
            "b": None,
            "a": adapter_dir,
            "text path": str(adapter_dir),
            "prompted": {"system": "Be kind."},
            "prompted adapter": {"adapter": adapter_dir, "system": "Be kind."},
            "full": tiny_llama_dir,
            "prompted full": {"model": str(tiny_llama_dir), "system": "Be kind."},
            "nothing": {"adapter": None, "system": None},
        },
        base,
    )
    assert [e.name for e in experts] == [
        *("b", "a", "text path", "prompted", "prompted adapter", "full", "prompted full", "nothing"),
    ]
    assert [e.adapter is not None for e in experts] == [False, True, True, False, True, False, False, False]
    assert [e.checkpoint is not None for e in experts] == [False, False, False, False, False, True, True, False]
    assert [e.system for e in experts] == [None, None, None, "Be kind.", "Be kind.", None, "Be kind.", None]


def test_what_experts_share_is_loaded_once(base, adapter_dir, tiny_llama_dir):
    experts = load_experts(
        {
            "a": adapter_dir,
            "b": {"adapter": str(adapter_dir), "system": "B."},
            "c": tiny_llama_dir,
            "d": tiny_llama_dir,
        },
        base,
    )
    assert experts[0].adapter is experts[1].adapter
    assert experts[2].checkpoint is experts[3].checkpoint


@pytest.mark.parametrize(
    "spec, error, message",
    [
        (["a"], TypeError, r"experts: expected a mapping from name to expert, got \['a'\]"),
        ({}, ValueError, "experts: expected at least one expert, got an empty mapping"),
        ({"": None}, ValueError, "experts: expected names without surrounding blanks, got ''"),
        ({" a": None}, ValueError, "experts: expected names without surrounding blanks, got ' a'"),
        ({1: None}, ValueError, "experts: expected names without surrounding blanks, got 1"),
        ({"a": 3}, TypeError, r"experts\['a'\]: expected None \(the base\), the path of .*, got 3"),
        ({"a": {"sytem": "x"}}, ValueError, r"experts\['a'\]: expected the keys 'adapter', .* only, got 'sytem'"),
        ({"a": {"adapter": 3}}, TypeError, r"experts\['a'\]\['adapter'\]: expected a path or None, got 3"),
        ({"a": {"system": 3}}, TypeError, r"experts\['a'\]\['system'\]: expected text or None, got 3"),
        ({"a": {"system": " "}}, ValueError, r"experts\['a'\]\['system'\]: expected some text, got an empty string"),
        (
            {"a": {"adapter": "x", "model": "y"}},
            ValueError,
            r"experts\['a'\]: expected an adapter or a model, got both",
        ),
        ({"a": "no/such/place"}, LoadError, "no/such/place: expected a Hugging Face directory, .* got no such file"),
        ({"a": {"adapter": "no/such/place"}}, LoadError, "no/such/place: expected a PEFT adapter directory"),
    ],
)
def test_bad_specs(base, spec, error, message):
    with pytest.raises(error, match=message):
        load_experts(spec, base)


def test_a_full_model_has_the_bases_number_of_tokens(base, make_tiny_model):
    other = make_tiny_model("qwen3", vocab_size=300)
    with pytest.raises(LoadError, match=r"vocabulary mismatch: expected the 320 tokens of .*, got 300"):
        load_experts({"a": other}, base)


def test_a_full_model_has_the_bases_tokens(make_tiny_model):
    directories = []
    for seed in (1, 2):
        directories.append(make_tiny_model("llama", seed=seed))
        order = np.random.default_rng(seed).permutation(320)
        vocabulary = {f"token{t}": i for i, t in enumerate(order.tolist())}
        Tokenizer(models.WordLevel(vocabulary, unk_token="token0")).save(str(directories[-1] / "tokenizer.json"))
    with pytest.raises(LoadError, match="vocabulary mismatch: expected token id 0 to be"):
        load_experts({"a": directories[1]}, load_checkpoint(directories[0]))


def test_an_adapter_for_another_base(make_tiny_model, adapter_dir):
    wider = load_checkpoint(make_tiny_model("llama", hidden_size=96))
    with pytest.raises(LoadError, match="adapter for another base"):
        load_experts({"a": adapter_dir}, wider)


def test_an_adapter_on_an_architecture_that_is_none_of_ours(tmp_path, adapter_dir):
    import transformers

    config = transformers.GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"experts\['a'\]: .*: an adapter cannot be put on this base: .*gpt2"):
        load_experts({"a": adapter_dir}, load_checkpoint(tmp_path))
