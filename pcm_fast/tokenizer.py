"""Text to token ids and back, and conversations to prompts, without transformers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, overload

import jinja2
import tokenizers
from tokenizers.processors import TemplateProcessing

from pcm_fast.chat_template import compile_template, render_chat
from pcm_fast.checkpoint import LoadError
from pcm_fast.hf_directory import read_json

SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass
class Tokenizer:
    """A tokenizer of the ``tokenizers`` library with its special tokens and its chat template.

    ``special_tokens`` go by their transformers names ("bos_token", "eos_token", ...); chat templates read them.
    """

    backend: tokenizers.Tokenizer
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    chat_template: str | None = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of the text; special tokens written out in it are recognised either way.

        ``add_special_tokens`` adds what the model expects around every text, such as a beginning-of-sequence token.
        """
        if not isinstance(text, str):
            raise TypeError(f"text: expected str, got {type(text).__name__}")
        ids: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that form no character yet become U+FFFD."""
        text: str = self.backend.decode([int(index) for index in ids], skip_special_tokens=skip_special_tokens)
        return text

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = ...,
        tokenize: Literal[True] = ...,
        **variables: Any,
    ) -> list[int]: ...

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = ...,
        *,
        tokenize: Literal[False],
        **variables: Any,
    ) -> str: ...

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tokenize: bool = True,
        **variables: Any,
    ) -> list[int] | str:
        """A conversation, ``[{"role": ..., "content": ...}, ...]``, as the prompt that the model was trained on.

        Args:
            messages: the turns, oldest first.
            add_generation_prompt: end with the opening of the assistant's turn.
            tokenize: return token ids; otherwise the text.
            variables: whatever else the template reads (``tools``, ``enable_thinking``, ...).

        Raises:
            ValueError: the tokenizer has no chat template, or the template refuses the conversation.
            TypeError: messages are not mappings of plain data.
        """
        text = render_chat(
            self.compiled_template,
            messages,
            add_generation_prompt=add_generation_prompt,
            variables={**self.special_tokens, **variables},
        )
        return self.encode(text, add_special_tokens=False) if tokenize else text

    @cached_property
    def compiled_template(self) -> jinja2.Template:
        """The chat template, compiled when first used."""
        if self.chat_template is None:
            raise ValueError("chat_template: this tokenizer has none; pass token ids or encode the text as it is")
        return compile_template(self.chat_template)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def bos_token_id(self) -> int | None:
        """The token that opens a text, if there is one."""
        return self.special_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text, if there is one."""
        return self.special_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        """The token that fills up short rows, if there is one."""
        return self.special_id("pad_token")

    def special_id(self, name: str) -> int | None:
        """The id of a special token by its transformers name."""
        token = self.special_tokens.get(name)
        index: int | None = None if token is None else self.backend.token_to_id(token)
        return index


def surround(backend: tokenizers.Tokenizer, bos: str | None, eos: str | None) -> None:
    """Make the backend put these tokens around every text that is encoded with special tokens."""
    around = [token for token in (bos, eos) if token is not None]
    backend.post_processor = TemplateProcessing(
        single=[*([bos] if bos else []), "$A", *([eos] if eos else [])],
        special_tokens=[(token, backend.token_to_id(token)) for token in dict.fromkeys(around)],
    )


def read_hf_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer of a Hugging Face directory, None where there is no tokenizer.json.

    Raises:
        LoadError: tokenizer.json or one of the files beside it is malformed.
    """
    path = directory / "tokenizer.json"
    if not path.exists():
        return None
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise LoadError(f"{path}: not a tokenizer that the tokenizers library can read: {error}") from error
    backend.no_padding()
    backend.no_truncation()
    config = read_json_if_there(directory / "tokenizer_config.json")
    special_tokens = read_special_tokens({**read_json_if_there(directory / "special_tokens_map.json"), **config})
    unknown = [token for token in special_tokens.values() if backend.token_to_id(token) is None]
    if unknown:
        raise LoadError(f"{directory / 'tokenizer_config.json'}: special token {unknown[0]!r} is not in {path.name}")
    if "add_bos_token" in config or "add_eos_token" in config:
        bos = special_tokens.get("bos_token") if config.get("add_bos_token") else None
        eos = special_tokens.get("eos_token") if config.get("add_eos_token") else None
        surround(backend, bos, eos)
    return Tokenizer(backend, special_tokens, read_chat_template(directory, config))


def read_json_if_there(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no such file."""
    return read_json(path) if path.exists() else {}


def read_special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens of a tokenizer_config.json, where each is text or a mapping with its content."""
    tokens: dict[str, str] = {}
    for name in SPECIAL_TOKEN_NAMES:
        value = config.get(name)
        content = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(content, str) and content:
            tokens[name] = content
    return tokens


def read_chat_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template: chat_template.jinja, or the one (called "default" among several) in tokenizer_config.json."""
    path = directory / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise LoadError(f"{path}: cannot be read as text: {error}") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {str(item.get("name")): item.get("template") for item in template if isinstance(item, Mapping)}
        template = named.get("default")
    return template if isinstance(template, str) else None
