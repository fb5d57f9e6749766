"""Conversations: messages in the two forms that data sets have, and the tokenizer's chat template, which makes them text.

    OpenAI      [{"role": "user", "content": "..."}, ...]; content may be a list of text parts
    ShareGPT    [{"from": "human", "value": "..."}, ...]

What each message says is found again in the text by rendering the conversation a second time with placeholders: a template is
asked, not parsed.
"""

import datetime
import json
import re
from collections.abc import Callable, Iterable
from typing import Any

import jinja2

from everyscope.base.errors import TextError, first_line

Messages = tuple[dict[str, Any], ...]
Span = tuple[int, int]
"""Begin and end in a text [characters]."""

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
"""ShareGPT's names of roles, as chat templates call them; others are kept."""
TODAY = datetime.datetime(2025, 1, 1, tzinfo=datetime.UTC)
"""The date of templates that write today's, so that the same conversation is the same text tomorrow."""
DATE = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")
"""Where a template asks for today's date."""
PLACEHOLDER = re.compile("\ue000(\\d+)\ue001")
"""Private-use characters around a message's number: no template changes them."""


def messages_of(cell: Any, name: str) -> Messages | None:
    """The messages in a cell of either form; None where there are none, TextError for anything else."""
    if isinstance(cell, dict):  # a table of messages: each field a list
        lengths = {len(values) for values in cell.values() if isinstance(values, list)}
        if len(lengths) != 1 or not all(isinstance(values, list) for values in cell.values()):
            raise TextError(f"{name}: an object with {sorted(cell)}, not a conversation; give a list of messages")
        cell = [dict(zip(cell, values, strict=True)) for values in zip(*cell.values(), strict=True)]
    messages = tuple(_message(message, f"{name}: message {number}") for number, message in enumerate(cell, start=1))
    return messages if any(message["content"].strip() for message in messages) else None


def _message(message: Any, name: str) -> dict[str, Any]:
    given = {key: value for key, value in message.items() if value is not None} if isinstance(message, dict) else {}
    if "from" in given and "value" in given:
        role, content = given["from"], given["value"]
        role, others = ROLES.get(str(role).lower(), role), {}
    elif "role" in given:
        role, content = given["role"], given.get("content", "")  # null where a tool is called
        others = {key: value for key, value in given.items() if key not in ("role", "content")}
    else:
        got = sorted(message) if isinstance(message, dict) else type(message).__name__
        raise TextError(f"{name} is {got}; expected an object with role and content, or with from and value")
    if isinstance(content, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(role, str) or not isinstance(content, str):
        raise TextError(f"{name} has role {role!r} and content of type {type(content).__name__}; expected two texts")
    return {"role": role, "content": content} | others


def plain_text(messages: Messages) -> str:
    """What is said, line by line."""
    return "\n".join(message["content"] for message in messages)


def split_key(messages: Messages) -> str:
    """What decides the split of a conversation: who says what, whatever the template."""
    return json.dumps([[message["role"], message["content"]] for message in messages], ensure_ascii=False)


def rendered(tokenizer: Any, messages: Messages, name: str) -> str:
    """The conversation as the model reads it; TextError, naming the document, where there is no template or it refuses."""
    if not getattr(tokenizer, "chat_template", None):
        raise TextError(
            f"{name}: holds messages, but tokenizer {tokenizer.name_or_path!r} has no chat template; "
            "take an instruction-tuned model, or give conversations that are rendered to text"
        )
    try:
        template = DATE.sub(lambda call: repr(TODAY.strftime(call[2])), tokenizer.get_chat_template())
        text = tokenizer.apply_chat_template(list(messages), chat_template=template, tokenize=False)
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, RecursionError) as error:
        roles = ", ".join(message["role"] for message in messages[:6])
        raise TextError(
            f"{name}: the chat template of {tokenizer.name_or_path!r} refuses the conversation ({first_line(error)}); "
            f"its roles are {roles}{', ...' if len(messages) > 6 else ''}; leave it out, or change its roles"
        ) from error
    return text.encode("utf-8", "replace").decode("utf-8")


def spans_of(tokenizer: Any, messages: Messages, text: str, is_wanted: Callable[[str], bool], name: str) -> list[Span]:
    """Where in the rendered `text` stands what wanted roles say; TextError where the template writes something else instead."""
    marked = tuple(message | {"content": f"\ue000{number}\ue001"} for number, message in enumerate(messages))
    parts = PLACEHOLDER.split(rendered(tokenizer, marked, name))  # frame, number, frame, number, ..., frame
    numbers = list(map(int, parts[1::2]))
    spans, place = [], len(parts[0])
    is_found = numbers == list(range(len(messages))) and text.startswith(parts[0])
    for number, frame in zip(numbers, parts[2::2], strict=True):
        content = messages[number]["content"] if number < len(messages) else ""
        content_text = next((form for form in _forms(content) if text.startswith(form + frame, place)), None)
        if not is_found or content_text is None:
            is_found = False
            break
        if content_text and is_wanted(messages[number]["role"]):
            spans.append((place, place + len(content_text)))
        place += len(content_text) + len(frame)
    if not is_found or place != len(text):
        raise TextError(
            f"{name}: the chat template of {tokenizer.name_or_path!r} does not write every message as it is, so that roles "
            "cannot be distinguished; leave roles out"
        )
    return spans


def _forms(content: str) -> Iterable[str]:
    """What templates make of a message: themselves, or without the space around them."""
    content = content.encode("utf-8", "replace").decode("utf-8")
    return dict.fromkeys((content, content.strip(), content.rstrip(), content.lstrip()))
