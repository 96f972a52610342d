"""What experts and PCMs read."""

import math

import numpy as np
import pytest
import torch

from pcm_fast.experts import Expert
from pcm_fast.pcm import LearnedPCM, UniformPCM
from pcm_fast.preference import resolve_preference
from pcm_fast.prompts import chat_prompts, expert_contexts, pcm_contexts, read_batch, read_messages
from pcm_fast.spec import ModelSpec

# Token ids


def batch(input_ids, attention_mask=None):
    return read_batch(input_ids, attention_mask, vocab_size=10, pad_token_id=0)


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_ids_come_in_any_array(kind):
    read = batch(kind([[0, 0, 3], [1, 2, 4]]), kind([[0, 0, 1], [0, 1, 1]]))
    assert read.input_ids.dtype == np.int64
    np.testing.assert_array_equal(read.input_ids, [[0, 0, 3], [1, 2, 4]])
    assert [row.tolist() for row in read.rows] == [[3], [2, 4]]
    assert read.torch == (kind is torch.tensor)


def test_without_a_mask_all_is_text():
    assert [row.tolist() for row in batch([[0, 0, 3]]).rows] == [[0, 0, 3]]


def test_lists_of_different_lengths_are_padded():
    read = batch([[1], [2, 3, 4]])
    np.testing.assert_array_equal(read.input_ids, [[0, 0, 1], [2, 3, 4]])
    assert [row.tolist() for row in read.rows] == [[1], [2, 3, 4]]


@pytest.mark.parametrize(
    "input_ids, mask, error, message",
    [
        ("text", None, TypeError, r"input_ids: expected token ids \[B, L\] as lists, .*, got 'text'"),
        (3, None, TypeError, r"input_ids: expected token ids \[B, L\]"),
        ([], None, ValueError, "input_ids: expected at least one row of token ids, got none"),
        ([[1], []], None, ValueError, "input_ids: expected at least one token in every row, got none in row 1"),
        ([1, 2], None, ValueError, r"input_ids: expected token ids of shape \[B, L\], got 1 dimensions"),
        ([[[1]]], None, ValueError, r"input_ids: expected token ids of shape \[B, L\], got 3 dimensions"),
        ([[1.0]], None, TypeError, "input_ids: expected integers, got float64 in row 0"),
        ([[True]], None, TypeError, "input_ids: expected integers, got bool in row 0"),
        ([[1, 2], [3, 10]], None, ValueError, r"input_ids: expected token ids in \[0, 10\), got 10 in row 1"),
        ([[-1]], None, ValueError, r"input_ids: expected token ids in \[0, 10\), got -1 in row 0"),
        ([[1, 2]], [[1]], ValueError, r"attention_mask: expected the shape of input_ids, \[1, 2\], got \[1, 1\]"),
        ([[1, 2]], [1, 1], ValueError, r"attention_mask: expected the shape of input_ids, \[1, 2\], got \[2\]"),
        ([[1, 2], [1]], [[1, 1], [1, 1]], ValueError, "attention_mask: expected the shape of input_ids"),
        ([[1, 2], [1, 2]], [[1, 1], [1]], ValueError, "attention_mask: expected rows of one length"),
        ([[1, 2]], [[1, 2]], ValueError, "attention_mask: expected 0 and 1 only, got .*2"),
        ([[1, 2]], [[math.nan, 1]], ValueError, "attention_mask: expected 0 and 1 only, got .*nan"),
        ([[1, 2]], [[0, 0]], ValueError, "attention_mask: expected a token in every row, got only padding in row 0"),
        ([[1, 2]], [[1, 0]], ValueError, r"attention_mask: expected padding on the left only, got \[1, 0\] in row 0"),
        ([[1, 2, 3]], [[1, 0, 1]], ValueError, "attention_mask: expected padding on the left only"),
    ],
)
def test_bad_batches(input_ids, mask, error, message):
    with pytest.raises(error, match=message):
        batch(input_ids, mask)


# Contexts


TEMPLATE = "The person wants: {preference}."


@pytest.fixture(scope="module")
def spec(embedded_checkpoint):
    experts = (Expert("plain"), Expert("kind", system="Be kind."), Expert("brief", system="Be brief."))
    return ModelSpec(embedded_checkpoint, experts, UniformPCM())


@pytest.fixture(scope="module")
def learned_spec(spec):
    head = np.zeros((3, 576), np.float32), np.zeros(3, np.float32)
    return ModelSpec(spec.checkpoint, spec.experts, LearnedPCM("shared", spec.expert_names, TEMPLATE, *head))


def text_of(spec, ids):
    return spec.checkpoint.tokenizer.decode(list(ids), skip_special_tokens=False)


def test_an_expert_reads_its_system_turn_first(spec):
    rows = (np.array([500, 501]), np.array([502]))
    plain, kind, brief = expert_contexts(spec, rows, None)
    assert plain is rows
    for contexts, system in ((kind, "Be kind."), (brief, "Be brief.")):
        for row, context in zip(rows, contexts, strict=True):
            assert text_of(spec, context[: -len(row)]) == f"<|im_start|>system\n{system}<|im_end|>\n"
            np.testing.assert_array_equal(context[-len(row) :], row)


def test_an_expert_may_be_given_all_it_reads(spec):
    rows = (np.array([500, 501]), np.array([502]))
    plain, kind, _ = expert_contexts(spec, rows, {"kind": [[1, 2, 3], [4]]})
    assert plain is rows
    assert [context.tolist() for context in kind] == [[1, 2, 3], [4]]


@pytest.mark.parametrize(
    "own, error, message",
    [
        ([[1]], TypeError, r"expert_input_ids: expected a mapping from expert to token ids, got \[\[1\]\]"),
        ({"rude": [[1]]}, ValueError, r"expert_input_ids: expected names of experts \('plain', .*\), got 'rude'"),
        ({"kind": [[1], [2]]}, ValueError, r"expert_input_ids\['kind'\]: expected 1 rows, as many as input_ids, got 2"),
        ({"kind": [[49152]]}, ValueError, r"expert_input_ids\['kind'\]: expected token ids in \[0, 49152\), got 49152"),
    ],
)
def test_bad_own_prompts(spec, own, error, message):
    with pytest.raises(error, match=message):
        expert_contexts(spec, (np.array([5]),), own)


def test_a_learned_pcm_reads_the_preference_first(learned_spec):
    preference = resolve_preference({"kind": 1.0}, learned_spec.expert_names)
    (context,) = pcm_contexts(learned_spec, (np.array([500, 501]),), preference, None)
    assert text_of(learned_spec, context[:-2]) == "<|im_start|>system\nThe person wants: kind.<|im_end|>\n"
    assert context[-2:].tolist() == [500, 501]
    (context,) = pcm_contexts(learned_spec, (np.array([500, 501]),), preference, [[7, 8]])
    assert context.tolist() == [7, 8]


def test_only_a_learned_pcm_reads(spec):
    preference = resolve_preference(None, spec.expert_names)
    assert pcm_contexts(spec, (np.array([5]),), preference, None) is None
    with pytest.raises(ValueError, match=r"pcm_input_ids: expected None, since the PCM .* is no language model"):
        pcm_contexts(spec, (np.array([5]),), preference, [[7]])


def test_a_system_prompt_needs_a_chat_template(tiny_llama_dir):
    from pcm_fast.loader import load_checkpoint

    spec = ModelSpec(load_checkpoint(tiny_llama_dir), (Expert("kind", system="Be kind."),), UniformPCM())
    with pytest.raises(
        ValueError, match=r"experts\['kind'\]: its system prompt needs a tokenizer, .* expert_input_ids"
    ):
        expert_contexts(spec, (np.array([5]),), None)
    with pytest.raises(ValueError, match="chat: the base has no chat template"):
        chat_prompts(spec, [{"role": "user", "content": "Hi"}], resolve_preference(None, ["kind"]))


# Conversations


USER = {"role": "user", "content": "Why?"}


def test_a_conversation_is_rendered_for_each_reader(learned_spec):
    prompts = chat_prompts(learned_spec, [USER], resolve_preference("be kind", learned_spec.expert_names))
    turn = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    plain = text_of(learned_spec, prompts.input_ids[0])
    assert plain.endswith(turn)
    assert set(prompts.expert_input_ids) == {"kind", "brief"}
    for name, system in (("kind", "Be kind."), ("brief", "Be brief.")):
        text = text_of(learned_spec, prompts.expert_input_ids[name][0])
        assert text == f"<|im_start|>system\n{system}<|im_end|>\n{turn}"
    pcm_text = text_of(learned_spec, prompts.pcm_input_ids[0])
    assert pcm_text == f"<|im_start|>system\nThe person wants: be kind.<|im_end|>\n{turn}"


def test_system_prompts_become_one_turn(spec):
    conversation = [{"role": "system", "content": "You are a pirate."}, USER]
    prompts = chat_prompts(spec, conversation, resolve_preference(None, spec.expert_names))
    assert text_of(spec, prompts.input_ids[0]).startswith(
        "<|im_start|>system\nYou are a pirate.<|im_end|>\n<|im_start|>user"
    )
    text = text_of(spec, prompts.expert_input_ids["kind"][0])
    assert text.startswith("<|im_start|>system\nBe kind.\n\nYou are a pirate.<|im_end|>\n<|im_start|>user")
    assert prompts.pcm_input_ids is None
    assert conversation[0]["content"] == "You are a pirate."


@pytest.mark.parametrize(
    "messages, error, message",
    [
        (3, TypeError, "messages: expected text or a list of messages, got 3"),
        ([], ValueError, "messages: expected at least one message, got none"),
        ([{"role": "user"}], ValueError, "messages: expected mappings with the keys 'role' and 'content', got"),
        (["hello"], ValueError, "messages: expected mappings with the keys 'role' and 'content', got 'hello'"),
        ([{"role": "king", "content": "x"}], ValueError, "messages: expected the role 'system', .* got 'king'"),
        ([{"role": "user", "content": 3}], TypeError, "messages: expected text as content, got 3"),
        ("", ValueError, "messages: expected some text"),
    ],
)
def test_bad_conversations(messages, error, message):
    with pytest.raises(error, match=message):
        read_messages(messages)


def test_text_is_one_user_message():
    assert read_messages("Why?") == [USER]
