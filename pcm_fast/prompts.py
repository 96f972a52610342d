"""What each expert and the PCM read: token ids checked, system turns rendered, prompts put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pcm_fast.pcm import LearnedPCM
from pcm_fast.preference import ResolvedPreference
from pcm_fast.spec import ModelSpec
from pcm_fast.tokenizer import Tokenizer
from pcm_fast.vocabulary import vocab_size

Tokens = npt.NDArray[np.int64]
Rows = tuple[Tokens, ...]
Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Batch:
    """Prompts as they came in.

    Attributes:
        input_ids: [B, L] int64, padded on the left.
        rows: B arrays int64, the same without the padding; none is empty.
        torch: whether the caller passed a torch tensor, and gets torch tensors back.
    """

    input_ids: Tokens
    rows: Rows
    torch: bool


def read_batch(input_ids: Any, attention_mask: Any, vocab_size: int, pad_token_id: int) -> Batch:
    """Check input_ids [B, L] and attention_mask [B, L] (1 for text, 0 for padding on the left; None: no padding).

    Both may be nested lists, NumPy arrays or torch tensors. Without a mask, lists of different lengths are padded here.

    Raises:
        TypeError, ValueError: the message names the argument, what was expected and what came.
    """
    rows = read_rows("input_ids", input_ids, vocab_size)
    torch = hasattr(input_ids, "detach")
    if attention_mask is None:
        padded = np.full((len(rows), max(map(len, rows))), pad_token_id, dtype=np.int64)
        for row, target in zip(rows, padded, strict=True):
            target[len(target) - len(row) :] = row
        return Batch(padded, rows, torch)
    try:
        mask = np.asarray(to_numpy(attention_mask))
    except ValueError:
        raise ValueError("attention_mask: expected rows of one length") from None
    ids = np.stack(rows) if len({len(row) for row in rows}) == 1 else None
    if ids is None or mask.shape != ids.shape:
        expected = [len(rows), "L"] if ids is None else list(ids.shape)
        raise ValueError(f"attention_mask: expected the shape of input_ids, {expected}, got {list(mask.shape)}")
    if not np.isin(mask, (0, 1)).all():
        raise ValueError(f"attention_mask: expected 0 and 1 only, got {mask[~np.isin(mask, (0, 1))].flat[0]!r}")
    mask = mask.astype(bool)
    for index, row in enumerate(mask):
        if not row.any():
            raise ValueError(f"attention_mask: expected a token in every row, got only padding in row {index}")
        if not row[row.argmax() :].all():
            raise ValueError(
                f"attention_mask: expected padding on the left only, got {row.astype(int).tolist()} in row {index}"
            )
    return Batch(ids, tuple(row[keep] for row, keep in zip(ids, mask, strict=True)), torch)


def read_rows(name: str, ids: Any, vocab_size: int) -> Rows:
    """Rows of token ids [B, L], or B lists of different lengths, as int64 arrays, checked."""
    values = to_numpy(ids)
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, (Sequence, np.ndarray)):
        raise TypeError(f"{name}: expected token ids [B, L] as lists, a NumPy array or a torch tensor, got {values!r}")
    if len(values) == 0:
        raise ValueError(f"{name}: expected at least one row of token ids, got none")
    rows = []
    for index, value in enumerate(values):
        row = np.asarray(to_numpy(value))
        if row.ndim != 1:
            raise ValueError(f"{name}: expected token ids of shape [B, L], got {row.ndim + 1} dimensions")
        if row.size == 0:
            raise ValueError(f"{name}: expected at least one token in every row, got none in row {index}")
        if row.dtype.kind not in "iu":
            raise TypeError(f"{name}: expected integers, got {row.dtype} in row {index}")
        outside = row[(row < 0) | (row >= vocab_size)]
        if outside.size:
            raise ValueError(f"{name}: expected token ids in [0, {vocab_size}), got {int(outside[0])} in row {index}")
        rows.append(row.astype(np.int64))
    return tuple(rows)


def to_numpy(value: Any) -> Any:
    """A torch tensor as a NumPy array; anything else as it is."""
    return value.detach().cpu().numpy() if hasattr(value, "detach") else value


def expert_contexts(spec: ModelSpec, rows: Rows, own: Mapping[str, Any] | None) -> tuple[Rows, ...]:
    """What each of the K experts reads before the first token: K tuples of B arrays.

    Expert i reads its system turn (if it has a system prompt) and then the row, or what ``own`` gives for its name.
    """
    own = {} if own is None else own
    if not isinstance(own, Mapping):
        raise TypeError(f"expert_input_ids: expected a mapping from expert to token ids, got {own!r}")
    unknown = [name for name in own if name not in spec.expert_names]
    if unknown:
        known = ", ".join(map(repr, spec.expert_names))
        raise ValueError(f"expert_input_ids: expected names of experts ({known}), got {unknown[0]!r}")
    contexts = []
    for expert in spec.experts:
        if expert.name in own:
            contexts.append(_own_rows(f"expert_input_ids[{expert.name!r}]", own[expert.name], spec, len(rows)))
        elif expert.system is None:
            contexts.append(rows)
        else:
            prefix = system_prefix(
                f"experts[{expert.name!r}]", expert.system, spec.checkpoint.tokenizer, "expert_input_ids"
            )
            contexts.append(tuple(np.concatenate([prefix, row]) for row in rows))
    return tuple(contexts)


def pcm_contexts(spec: ModelSpec, rows: Rows, preference: ResolvedPreference, own: Any) -> Rows | None:
    """What a learned PCM reads before the first token, B arrays; None for a PCM that is no language model.

    It reads its system turn, with the preference in it, and then the row, or ``own``.
    """
    if not isinstance(spec.pcm, LearnedPCM):
        if own is not None:
            raise ValueError("pcm_input_ids: expected None, since the PCM of this model is no language model")
        return None
    if own is not None:
        return _own_rows("pcm_input_ids", own, spec, len(rows))
    turn = spec.pcm.system_turn(preference)
    prefix = system_prefix("pcm", turn, spec.checkpoint.tokenizer, "pcm_input_ids")
    return tuple(np.concatenate([prefix, row]) for row in rows)


def system_prefix(owner: str, system: str, tokenizer: Tokenizer | None, instead: str) -> Tokens:
    """Token ids of a system turn alone, as the chat template renders it."""
    if tokenizer is None or tokenizer.chat_template is None:
        lacking = "tokenizer" if tokenizer is None else "chat template"
        raise ValueError(f"{owner}: its system prompt needs a {lacking}, and the base has none; give {instead}")
    try:
        ids = tokenizer.apply_chat_template([{"role": "system", "content": system}], add_generation_prompt=False)
    except Exception as error:  # a template is a program of the model's author and raises what it likes
        raise ValueError(
            f"{owner}: the chat template renders no system turn alone ({error}); give {instead}"
        ) from error
    return np.asarray(ids, dtype=np.int64)


@dataclass(frozen=True)
class ChatPrompts:
    """One conversation as each reader sees it: the keywords of ``generate`` of the same names, one row each."""

    input_ids: list[list[int]]
    expert_input_ids: dict[str, list[list[int]]]
    pcm_input_ids: list[list[int]] | None


def chat_prompts(spec: ModelSpec, messages: Messages, preference: ResolvedPreference) -> ChatPrompts:
    """Render a conversation through the chat template: as it is, and with the system prompt of each expert and PCM.

    A system prompt goes ahead of the conversation; if this opens with a system message of its own, both become one
    turn.
    """
    tokenizer = spec.checkpoint.tokenizer
    if tokenizer is None or tokenizer.chat_template is None:
        raise ValueError("chat: the base has no chat template; render the conversation yourself and call generate")

    def render(system: str | None) -> list[list[int]]:
        turns = list(messages)
        if system is not None and turns[0]["role"] == "system":
            turns = [{"role": "system", "content": f"{system}\n\n{turns[0]['content']}"}, *turns[1:]]
        elif system is not None:
            turns = [{"role": "system", "content": system}, *turns]
        ids = tokenizer.apply_chat_template([dict(turn) for turn in turns], add_generation_prompt=True)
        return [list(map(int, ids))]

    return ChatPrompts(
        input_ids=render(None),
        expert_input_ids={e.name: render(e.system) for e in spec.experts if e.system is not None},
        pcm_input_ids=render(spec.pcm.system_turn(preference)) if isinstance(spec.pcm, LearnedPCM) else None,
    )


def read_messages(messages: str | Messages) -> Messages:
    """A conversation from one user message or a list of {"role": ..., "content": ...}, checked."""
    if isinstance(messages, str):
        if not messages.strip():
            raise ValueError(f"messages: expected some text, got {messages!r}")
        return [{"role": "user", "content": messages}]
    if not isinstance(messages, (list, tuple)):
        raise TypeError(f"messages: expected text or a list of messages, got {messages!r}")
    if not messages:
        raise ValueError("messages: expected at least one message, got none")
    for message in messages:
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise ValueError(f"messages: expected mappings with the keys 'role' and 'content', got {message!r}")
        if message["role"] not in ("system", "user", "assistant"):
            raise ValueError(f"messages: expected the role 'system', 'user' or 'assistant', got {message['role']!r}")
        if not isinstance(message["content"], str):
            raise TypeError(f"messages: expected text as content, got {message['content']!r}")
    return messages


def _own_rows(name: str, ids: Any, spec: ModelSpec, num_rows: int) -> Rows:
    rows = read_rows(name, ids, vocab_size(spec.checkpoint))
    if len(rows) != num_rows:
        raise ValueError(f"{name}: expected {num_rows} rows, as many as input_ids, got {len(rows)}")
    return rows
