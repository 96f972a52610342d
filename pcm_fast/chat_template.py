"""Chat templates: Jinja in a sandbox, set up so that a template renders as it does in transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class GenerationTag(Extension):
    """``{% generation %} ... {% endgeneration %}`` marks what to train on; here it is its content."""

    tags: set[str] = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The nodes inside the tag."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def compile_template(source: str) -> jinja2.Template:
    """A chat template as a Jinja template; ValueError if it is malformed."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    environment.globals["dict"] = new_dict
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ValueError(f"chat_template: not a valid Jinja template: {error}") from error


def render_chat(
    template: jinja2.Template,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool,
    variables: Mapping[str, Any],
) -> str:
    """The conversation as text; ``variables`` are the special tokens and whatever else the template reads.

    Raises:
        ValueError: no messages, or the template refuses them.
        TypeError: a message is not a mapping, or holds something else than text, numbers, lists and mappings.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise TypeError(f"messages: expected a list of mappings with role and content, got {type(messages).__name__}")
    if not messages:
        raise ValueError("messages: expected at least one, got none")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise TypeError(
                f"messages[{index}]: expected a mapping with role and content, got {type(message).__name__}"
            )
    # A missing key is what templates handle; None they would print.
    conversation = [{key: value for key, value in message.items() if value is not None} for message in messages]
    context = {"tools": None, "documents": None, **variables, "messages": conversation}
    plain_context = {name: plain(value, name) for name, value in context.items()}
    try:
        return template.render(plain_context, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # a template is a program, and may fail in any way
        raise ValueError(f"messages: refused by the chat template: {error}") from error


def plain(value: Any, where: str) -> Any:
    """A copy of JSON-like data: a template comes from a stranger and must not reach the methods of other objects."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise TypeError(f"{where}: expected text, numbers, lists and mappings, got {type(value).__name__}")


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str) -> NoReturn:
    """How templates refuse a conversation."""
    raise jinja2.TemplateError(message)


def strftime_now(layout: str) -> str:
    """Today's date, for templates that state it."""
    return datetime.now().strftime(layout)


def new_dict(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """``dict(...)`` without the attributes of the class."""
    return dict(*args, **kwargs)
