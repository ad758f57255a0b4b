"""Conversations as people write them to the messages and tools that chat templates take."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ssmlora_dist.data.chat_template import ChatTemplate
from ssmlora_dist.errors import DataError
from ssmlora_dist.records import nearest_name
from ssmlora_dist.tokenization import check_text

ASSISTANT = "assistant"
ROLES = ("system", "developer", "user", ASSISTANT, "tool")
# Other people's names for them.
ROLE_NAMES: Mapping[str, str] = {
    "human": "user",
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "model": ASSISTANT,
    "bot": ASSISTANT,
    "ai": ASSISTANT,
}
REASONING = ("reasoning_content", "reasoning", "thinking")
# Keys that are read here, or whose loss is an error; a template may know others.
_KEYS = ("role", "content", "tool_calls", "weight", "train")
# Names of the keys where conversations go by `from` and `value`.
_SHARED_KEYS = (("role", "from"), ("content", "value"))


@dataclass(frozen=True)
class Message:
    """One message.

    Args:
        values: what the template is given of it.
        is_trained: whether it is the model's and is to be learnt.
    """

    values: dict[str, Any]
    is_trained: bool

    @property
    def content(self) -> str:
        return str(self.values["content"]).strip()

    @property
    def is_assistant(self) -> bool:
        return bool(self.values["role"] == ASSISTANT)

    def calls(self) -> list[str]:
        """Names of the tools that it calls."""
        return [str(call["function"]["name"]) for call in self.values.get("tool_calls", ())]

    def with_text_arguments(self) -> Message:
        """The message with the arguments of its calls as JSON text."""
        if not self.calls():
            return self
        calls = []
        for call in self.values["tool_calls"]:
            arguments = call["function"]["arguments"]
            text = json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, Mapping) else arguments
            calls.append({**call, "function": {**call["function"], "arguments": text}})
        return replace(self, values={**self.values, "tool_calls": calls})

    def reasoning(self) -> str:
        return str(next((self.values[key] for key in REASONING if self.values.get(key)), "")).strip()


def read_messages(messages: Any, where: str, template: ChatTemplate) -> tuple[list[Message], set[str]]:
    """Reads a conversation, as objects with `role` and `content` or with `from` and `value`.

    Args:
        messages: the list of them.
        where: where it came from, for messages.
        template: which may know roles and keys of its own.

    Returns:
        The messages, and the keys of them that nobody reads.

    Raises:
        DataError: they are malformed, or have a role that is neither common nor known to the template.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise DataError(
            f"{where}: field 'messages' must be a list of at least one object with role and content; mend "
            "the record, or map `fields.messages` to the right field"
        )
    read = [_message(message, f"{where}: messages[{i}]", template) for i, message in enumerate(messages)]
    unread = {key for message in read for key in message.values if key not in _KEYS}
    parts = [part for message in messages for part in _parts(message)]
    of_parts = {f"content[].{key}" for part in parts for key in part if key not in ("type", "text")}
    return read, {key for key in unread if not template.knows_key(key)} | of_parts


def read_tools(tools: Any, where: str) -> list[dict[str, Any]] | None:
    """Definitions of tools: a list of objects, or the JSON text of one.

    Raises:
        DataError: they are something else.
    """
    tools = _from_json(tools) if isinstance(tools, str) and tools.strip() else tools
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(
            f"{where}: field 'tools' must be a list of objects that define functions, or the JSON text of "
            "one; mend the record"
        )
    return tools


def _parts(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What of the parts of a message holds something."""
    content = message.get("value") if message.get("content") is None else message["content"]
    parts = content if isinstance(content, list) else []
    return [{key: value for key, value in part.items() if value is not None} for part in parts]


def _message(message: Any, where: str, template: ChatTemplate) -> Message:
    if not isinstance(message, Mapping):
        raise DataError(f"{where} must be an object with role and content; mend the record")
    # Columns of a table give every message every key, null where it has none.
    values = {str(key): value for key, value in message.items() if value is not None}
    for name, shared in _SHARED_KEYS:
        if name not in values and shared in values:
            values[name] = values.pop(shared)
    values["role"] = _role(values.get("role"), where, template)
    calls = _tool_calls(values.pop("tool_calls", None), where)
    if calls:
        values["tool_calls"] = calls
    is_silent = values["role"] == ASSISTANT and (calls or any(values.get(key) for key in REASONING))
    content = _content(values.get("content"), "" if is_silent else None, where)
    check_text(content, where)
    values["content"] = content
    trained = _is_trained(values.pop("weight", None), values.pop("train", None), values["role"], where)
    has_turn = bool(values["content"].strip() or is_silent)
    return Message(values, is_trained=trained and has_turn and values["role"] == ASSISTANT)


def _role(role: Any, where: str, template: ChatTemplate) -> str:
    if not isinstance(role, str):
        raise DataError(f"{where} must be an object whose 'role' is text; mend the record")
    lower = role.strip().lower()
    if lower in ROLE_NAMES or lower in ROLES:
        return ROLE_NAMES.get(lower, lower)
    if template.knows_role(role):
        return role
    known = [*ROLES, *ROLE_NAMES]
    raise DataError(
        f"{where}: unknown role {role!r}{nearest_name(lower, known)}; known are {', '.join(known)}, and what "
        "the chat template names; mend the record"
    )


def _content(content: Any, otherwise: str | None, where: str) -> str:
    """Text as it is, parts of text joined."""
    if content in (None, []) and otherwise is not None:
        return otherwise
    if isinstance(content, list) and content:
        parts = [part.get("text") for part in content if isinstance(part, Mapping) and _is_text(part)]
        content = "".join(map(str, parts)) if len(parts) == len(content) else content
    if not isinstance(content, str):
        raise DataError(
            f"{where} must be an object whose 'content' is text, or a list of parts that are text; mend the "
            "record"
        )
    return content


def _is_text(part: Mapping[str, Any]) -> bool:
    return isinstance(part.get("text"), str) and part.get("type") in (None, "text")


def _is_trained(weight: Any, train: Any, role: str, where: str) -> bool:
    for key, value in (("weight", weight), ("train", train)):
        if value not in (None, 0, 1):
            raise DataError(
                f"{where}: {key!r} is {value!r}; allowed: 0 or false for a turn that is context only, 1 or "
                "true for one that is trained; mend the record"
            )
    if train and role != ASSISTANT:
        raise DataError(
            f"{where}: 'train' is {train!r} for the role {role!r}, and only the assistant's turns are "
            "trained; remove it, or give the message the role 'assistant'"
        )
    return weight in (None, 1) and train in (None, 1)


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Calls with their arguments as objects: templates write these as JSON, and would quote text again."""
    if calls is None:
        return []
    calls = _from_json(calls) if isinstance(calls, str) else calls
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise DataError(
            f"{where}: 'tool_calls' must be a list of objects, or the JSON text of one; mend the record"
        )
    read = []
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(f"{where}: a call in 'tool_calls' has no function with a name; mend the record")
        arguments = function.get("arguments") or {}
        given = _from_json(arguments) if isinstance(arguments, str) else arguments
        function = {**function, "arguments": given if isinstance(given, Mapping) else arguments}
        read.append({**(call if "function" in call else {}), "type": "function", "function": function})
    return read


def _from_json(text: str) -> Any:
    """What a text says in JSON; the text where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
