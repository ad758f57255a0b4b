"""Chat templates of real families: every turn is trained as it must be generated, token for token."""

from __future__ import annotations

from typing import Any

import pytest

from ssmlora_dist.data.formats import make_renderer
from ssmlora_dist.data.rows import RowEncoder
from ssmlora_dist.errors import DataError
from ssmlora_dist.records import Record
from ssmlora_dist.tokenization import TextEncoder

from .chat_templates import FAMILIES, tokenizer_of

SYSTEM = {"role": "system", "content": "Be kind."}
USER = [{"role": "user", "content": text} for text in ("Hi there.", "Bye.", "He left.")]
# Said before by the user, and the beginning of another: to be found nonetheless.
SAID = ("Hello!", "Hello! He left.", "Hi there.")
ASSISTANT = [{"role": "assistant", "content": text} for text in SAID]
THOUGHT = "<think>\nhm\n</think>\n\n"
REASONED = [{"role": "assistant", "content": THOUGHT + text} for text in SAID]
APART = [{"role": "assistant", "content": text, "reasoning_content": "hm"} for text in SAID]
FORGOTTEN = [{**ASSISTANT[0], "weight": 0}, {**ASSISTANT[1], "train": False}, {**ASSISTANT[2], "weight": 1}]


def alternating(answers: list[dict[str, Any]], turns: int) -> list[dict[str, Any]]:
    return [message for pair in zip(USER, answers[:turns], strict=False) for message in pair]


CONVERSATIONS = {
    "single": alternating(ASSISTANT, 1),
    "multi": alternating(ASSISTANT, 3),
    "system": [SYSTEM, *alternating(ASSISTANT, 2)],
    "assistant first": [ASSISTANT[0], *alternating(ASSISTANT[1:], 2)],
    "reasoning": alternating(REASONED, 3),
    "reasoning apart": alternating(APART, 3),
    "some turns are context": alternating(FORGOTTEN, 3),
    "ends with a user": [*alternating(ASSISTANT, 2), USER[2]],
}
TOOLS = [
    {"type": "function", "function": {"name": "look", "description": "Looks up.", "parameters": {}}},
]
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": '{"place": "Rome"}'}}],
}
WITH_TOOLS = [USER[0], CALL, {"role": "tool", "content": '{"it": "is \u00e9"}'}, ASSISTANT[0]]


def examples_of(name: str, **record: Any) -> tuple[Any, list[tuple[list[int], list[int]]]]:
    """The family's tokenizer; every stretch of trained tokens with all tokens before it."""
    tokenizer = tokenizer_of(FAMILIES[name])
    rows = make_renderer("chat", tokenizer)(Record(record, "rows.jsonl:3"))
    encoder = RowEncoder(TextEncoder(tokenizer), 10_000, "refuse")
    stretches = []
    for row in rows:
        [example] = encoder.encode(row)
        ids, trained = example.input_ids.tolist(), (example.labels != -100).tolist()
        begins = [i for i in range(1, len(ids)) if trained[i] and not trained[i - 1]]
        for begin in begins:
            end = next((i for i in range(begin, len(ids)) if not trained[i]), len(ids))
            stretches.append((ids[:begin], ids[begin:end]))
    return tokenizer, stretches


def asked(tokenizer: Any, messages: list[dict[str, Any]], first: str | None, **tools: Any) -> list[int]:
    if not messages:
        return tokenizer(first, add_special_tokens=False)["input_ids"]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, **tools)["input_ids"]


def wanted_turns(name: str, messages: list[dict[str, Any]]) -> list[tuple[list[int], list[int]]]:
    """Prompt and answer of each turn, by transformers and by what is known of the family."""
    family, wanted = FAMILIES[name], []
    tokenizer = tokenizer_of(family)
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or message.get("weight") == 0 or message.get("train") is False:
            continue
        content = message["content"].removeprefix(THOUGHT)
        thinks = content != message["content"] or "reasoning_content" in message
        parts = {
            "thought": THOUGHT if thinks else "",
            "bare": "hm" if thinks else "",
            "begun": THOUGHT.removeprefix("<think>\n") if thinks else "",
        }
        answer = family.answer.format(content=content, **parts)
        prompt = asked(tokenizer, messages[:index], family.first)
        wanted.append((prompt, tokenizer(answer, add_special_tokens=False)["input_ids"]))
    return wanted


def refusal(name: str, kind: str) -> str | None:
    """What a family that has no place for such a conversation says."""
    family = FAMILIES[name]
    if kind == "system" and not family.system:
        return r"refuses the conversation \(System role not supported\).* can go into the first user's"
    if kind == "assistant first" and family.first is None:
        return "refuses the conversation .*roles must alternate"
    if kind == "reasoning apart" and not family.reasons:
        return r"messages\[1\]: .* leaves out 'reasoning_content' of the role 'assistant'"
    return None


@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_turn_is_trained_as_it_must_be_generated(name: str, kind: str) -> None:
    messages = CONVERSATIONS[kind]
    if (message := refusal(name, kind)) is not None:
        with pytest.raises(DataError, match=rf"rows\.jsonl:3: .*{message}|rows\.jsonl:3: {message}"):
            examples_of(name, messages=messages)
        return
    _, trained = examples_of(name, messages=messages)
    assert sorted(trained) == sorted(wanted_turns(name, messages))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("as_text", [False, True])
def test_tools_and_their_calls_are_trained_or_refused(name: str, as_text: bool) -> None:
    import json

    family = FAMILIES[name]
    tools = json.dumps(TOOLS) if as_text else TOOLS
    if family.call is None:
        with pytest.raises(DataError, match=r"rows\.jsonl:3.*(leaves out 'tool|refuses the conversation)"):
            examples_of(name, messages=WITH_TOOLS, tools=tools)
        return
    tokenizer, trained = examples_of(name, messages=WITH_TOOLS, tools=tools)
    call = {"function": {"name": "look", "arguments": {"place": "Rome"}}}
    messages = [USER[0], {"role": "assistant", "content": "", "tool_calls": [call]}, *WITH_TOOLS[2:]]
    answer = family.answer.format(content=SAID[0], thought="", bare="", begun="")
    wanted = [
        (
            asked(tokenizer, messages[:index], None, tools=TOOLS),
            tokenizer(text, add_special_tokens=False)["input_ids"],
        )
        for index, text in ((1, family.call), (3, answer))
    ]
    assert sorted(trained) == sorted(wanted)


def test_arguments_go_as_text_where_a_template_takes_no_other() -> None:
    tokenizer, trained = examples_of("deepseek_r1", messages=WITH_TOOLS[:2])
    assert tokenizer.decode(trained[0][1]).endswith('<|call|>look\n{"place": "Rome"}<|end_of_sentence|>')


def test_turns_share_a_row_where_the_conversation_shows_them_as_they_are_asked_for() -> None:
    def num_rows(name: str, messages: list[dict[str, Any]]) -> int:
        renderer = make_renderer("chat", tokenizer_of(FAMILIES[name]))
        return len(renderer(Record({"messages": messages}, "x")))

    for name in ("chatml", "llama3", "mistral", "llama2", "gemma", "phi4", "zephyr"):
        assert num_rows(name, CONVERSATIONS["multi"]) == 1, name
    assert num_rows("mistral", CONVERSATIONS["system"]) == 2
    assert num_rows("qwen3", CONVERSATIONS["reasoning"]) == 3
    assert num_rows("hybrid", CONVERSATIONS["multi"]) == 3
