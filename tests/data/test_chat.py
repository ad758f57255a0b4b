"""Conversations: exactly the assistant's turns are trained, whatever the template does."""

from __future__ import annotations

import pytest

from ssmlora_dist.data.chat import chat_segments
from ssmlora_dist.data.formats import make_renderer
from ssmlora_dist.data.rows import RowEncoder
from ssmlora_dist.errors import DataError
from ssmlora_dist.records import Record
from ssmlora_dist.tokenization import TextEncoder

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi."},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye."},
    {"role": "assistant", "content": "Farewell."},
]

# Only the last turn shows its reasoning, as reasoning models' templates do.
REASONING_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]"
    "{% if message['role'] == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ message['content'] | trim }}[end]\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
# The prompt of Llama 2 and Mistral ends with the user's turn; nothing asks for an answer.
INSTRUCT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]"
    "{% elif message['role'] == 'assistant' %} {{ message['content'] }}</s>"
    "{% else %}{{ raise_exception('no place for a ' + message['role']) }}{% endif %}{% endfor %}"
)
COUNTING_TEMPLATE = "{{ messages | length }}{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture
def with_template(bpe_tokenizer, monkeypatch):
    def set_template(template):
        monkeypatch.setattr(bpe_tokenizer, "chat_template", template)
        return bpe_tokenizer

    return set_template


def targets(messages, tokenizer):
    return [segment.text for segment in chat_segments(messages, tokenizer, "x") if segment.is_target]


def test_every_assistant_turn_is_trained_with_its_end(bpe_tokenizer):
    segments = chat_segments(TALK, bpe_tokenizer, "x")
    assert [segment.text for segment in segments if segment.is_target] == [
        "Hello!<|eos|>",
        "Farewell.<|eos|>",
    ]
    whole = bpe_tokenizer.apply_chat_template(TALK, tokenize=False)
    assert "".join(segment.text for segment in segments) == whole.rstrip("\n")


def test_what_follows_the_last_assistant_turn_is_left_out(bpe_tokenizer):
    segments = chat_segments([*TALK[:3], {"role": "user", "content": "x" * 99}], bpe_tokenizer, "x")
    assert segments[-1].text == "Hello!<|eos|>"


def test_other_templates(with_template):
    assert targets(TALK, with_template(REASONING_TEMPLATE)) == [
        "Hello![end]",
        "<think></think>Farewell.[end]",
    ]
    assert targets(TALK[1:], with_template(INSTRUCT_TEMPLATE)) == [" Hello!</s>", " Farewell.</s>"]


def test_a_turn_without_content_is_not_trained(bpe_tokenizer):
    silent = [*TALK[:2], {"role": "assistant", "content": " "}, *TALK[3:]]
    assert targets(silent, bpe_tokenizer) == ["Farewell.<|eos|>"]
    assert targets(TALK[:2], bpe_tokenizer) == []


def test_tokens_of_a_turn_are_those_of_generation(bpe_tokenizer):
    rows = make_renderer("chat", bpe_tokenizer)(Record({"messages": TALK}, "x"))
    (example,) = RowEncoder(TextEncoder(bpe_tokenizer), 1000, "drop").encode(rows[0])
    prompt = bpe_tokenizer.apply_chat_template(TALK[:2], tokenize=True, add_generation_prompt=True)[
        "input_ids"
    ]
    answer = bpe_tokenizer("Hello!<|eos|>", add_special_tokens=False)["input_ids"]
    assert example.input_ids[: len(prompt)].tolist() == prompt
    trained = example.labels[example.labels != -100].tolist()
    assert example.labels[len(prompt) : len(prompt) + len(answer)].tolist() == answer
    assert trained == answer + bpe_tokenizer("Farewell.<|eos|>", add_special_tokens=False)["input_ids"]
    assert example.num_scored is None


def test_null_keys_of_tables_are_ignored(bpe_tokenizer):
    table = [{**message, "tool_calls": None} for message in TALK]
    assert chat_segments(table, bpe_tokenizer, "x") == chat_segments(TALK, bpe_tokenizer, "x")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", r"rows\.jsonl:3: field 'messages' must be a list"),
        ([], r"field 'messages' must be a list of at least one"),
        (["hello"], r"rows\.jsonl:3: messages\[0\] must be an object whose 'role' is text"),
        ([TALK[1], {"role": "assistant"}], r"messages\[1\] must be an object whose 'content' is text"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"messages\[0\] .* 'content' is text"),
    ],
)
def test_malformed_messages(bpe_tokenizer, messages, message):
    with pytest.raises(DataError, match=message):
        chat_segments(messages, bpe_tokenizer, "rows.jsonl:3")


def test_templates_that_cannot_be_used(with_template):
    with pytest.raises(
        DataError, match=r"rows\.jsonl:3: .* refuses the conversation \(no place for a system\)"
    ):
        chat_segments(TALK, with_template(INSTRUCT_TEMPLATE), "rows.jsonl:3")
    with pytest.raises(DataError, match=r"rows\.jsonl:3: .* renders messages\[2\] differently"):
        chat_segments(TALK, with_template(COUNTING_TEMPLATE), "rows.jsonl:3")


def test_no_template(byte_tokenizer):
    with pytest.raises(DataError, match=r"no chat template; use the tokenizer of a chat model"):
        make_renderer("chat", byte_tokenizer)
