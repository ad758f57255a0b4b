"""Conversations: exactly the assistant's turns are trained, whatever the template does."""

from __future__ import annotations

import json

import pytest

from ssmlora_dist.data.chat_template import ChatTemplate
from ssmlora_dist.data.formats import make_renderer
from ssmlora_dist.errors import DataError
from ssmlora_dist.records import Record

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hi."},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye."},
    {"role": "assistant", "content": "Farewell."},
]
CALL = {"function": {"name": "look", "arguments": '{"at": "it"}'}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}

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
# Leaves out what it does not know, as many do.
SILENT_TEMPLATE = (
    "{% for m in messages %}{% if m.role in ['user', 'assistant'] %}<{{ m.role }}>{{ m.content }}<|eos|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
KNOWING_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.thinking or '' }}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
    "<|eos|>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}{# 'critic' mood #}"
)


@pytest.fixture
def with_template(bpe_tokenizer, monkeypatch):
    def set_template(template):
        monkeypatch.setattr(bpe_tokenizer, "chat_template", template)
        return bpe_tokenizer

    return set_template


def rows_of(messages, tokenizer, **record):
    return make_renderer("chat", tokenizer)(Record({"messages": messages, **record}, "rows.jsonl:3"))


def targets(messages, tokenizer, **record):
    rows = rows_of(messages, tokenizer, **record)
    return [segment.text for row in rows for segment in row.segments if segment.is_target]


def test_every_assistant_turn_is_trained_with_its_end(bpe_tokenizer):
    [row] = rows_of(TALK, bpe_tokenizer)
    trained = [segment.text for segment in row.segments if segment.is_target]
    assert trained == ["Hello!<|eos|>", "Farewell.<|eos|>"]
    whole = bpe_tokenizer.apply_chat_template(TALK, tokenize=False)
    assert "".join(segment.text for segment in row.segments) == whole.rstrip("\n")
    assert row.closings == ("<|eos|>",)


@pytest.mark.parametrize("end", ["<|eos|>", "<|eos|>\n"])
def test_an_end_that_a_turn_spells_is_there_once(bpe_tokenizer, with_template, end):
    for template in (bpe_tokenizer.chat_template, SILENT_TEMPLATE):
        tokenizer = with_template(template)
        talk = [TALK[1], TALK[2], TALK[3], TALK[4]]
        spelled = [m | {"content": m["content"] + end} if m["role"] == "assistant" else m for m in talk]
        assert rows_of(spelled, tokenizer) == rows_of(talk, tokenizer)
    # A template that closes no turn leaves it to the text.
    tokenizer = with_template(COUNTING_TEMPLATE)
    assert targets([TALK[2] | {"content": "Hello!<|eos|>"}], tokenizer)[0].endswith("Hello!<|eos|>")


def test_what_follows_the_last_assistant_turn_is_left_out(bpe_tokenizer):
    [row] = rows_of([*TALK[:3], {"role": "user", "content": "x" * 99}], bpe_tokenizer)
    assert row.segments[-1].text == "Hello!<|eos|>"


def test_turns_that_the_whole_conversation_shows_otherwise_have_rows_of_their_own(with_template):
    tokenizer = with_template(REASONING_TEMPLATE)
    own, shared = rows_of(TALK, tokenizer)
    assert [segment.text for segment in own.segments] == [
        "[system]Be kind.[end]\n[user]Hi.[end]\n[assistant]",
        "<think></think>Hello![end]",
    ]
    assert [segment.text for segment in shared.segments] == [
        "[system]Be kind.[end]\n[user]Hi.[end]\n[assistant]Hello![end]\n[user]Bye.[end]\n[assistant]",
        "<think></think>Farewell.[end]",
    ]
    assert own.closings == ("[end]",)
    assert targets(TALK[1:], with_template(INSTRUCT_TEMPLATE)) == [" Hello!</s>", " Farewell.</s>"]
    rows = rows_of(TALK[1:], with_template(COUNTING_TEMPLATE))
    assert [[segment.text for segment in row.segments] for row in rows] == [
        ["1Hi.", "Hello!"],
        ["3Hi.Hello!Bye.", "Farewell."],
    ]


def test_a_turn_without_content_is_not_trained(bpe_tokenizer):
    silent = [*TALK[:2], {"role": "assistant", "content": " "}, *TALK[3:]]
    assert targets(silent, bpe_tokenizer) == ["Farewell.<|eos|>"]
    assert targets(TALK[:2], bpe_tokenizer) == []


def test_null_keys_of_tables_are_ignored(bpe_tokenizer):
    table = [{**message, "tool_calls": None, "weight": None} for message in TALK]
    assert rows_of(table, bpe_tokenizer, tools=None) == rows_of(TALK, bpe_tokenizer)


def test_weights_say_which_turns_are_trained(bpe_tokenizer):
    for mark in ({"weight": 0}, {"weight": 0.0}, {"train": False}, {"weight": 1, "train": False}):
        assert targets([*TALK[:2], TALK[2] | mark, *TALK[3:]], bpe_tokenizer) == ["Farewell.<|eos|>"]
    for mark in ({"weight": 1}, {"train": True}):
        assert len(targets([*TALK[:2], TALK[2] | mark, *TALK[3:]], bpe_tokenizer)) == 2


@pytest.mark.parametrize(
    ("user", "assistant"), [("human", "gpt"), ("User", "model"), (" user ", "Bot"), ("HUMAN", "ai")]
)
def test_roles_go_by_the_names_that_people_give_them(bpe_tokenizer, user, assistant):
    names = {"system": "system", "user": user, "assistant": assistant}
    renamed = [{**message, "role": names[message["role"]]} for message in TALK]
    assert rows_of(renamed, bpe_tokenizer) == rows_of(TALK, bpe_tokenizer)
    shared = [{"from": message["role"], "value": message["content"]} for message in renamed]
    assert rows_of(shared, bpe_tokenizer) == rows_of(TALK, bpe_tokenizer)
    mixed = [{"from": message["role"], "content": message["content"]} for message in renamed]
    assert rows_of(mixed, bpe_tokenizer) == rows_of(TALK, bpe_tokenizer)


def test_a_role_or_key_that_the_template_names_is_its_own(with_template):
    tokenizer = with_template(KNOWING_TEMPLATE)
    messages = [{"role": "critic", "content": "No."}, *TALK[1:3]]
    assert targets(messages, tokenizer) == ["Hello!<|eos|>"]
    assert targets([TALK[1], TALK[2] | {"thinking": "Hm. "}], tokenizer) == ["Hm. Hello!<|eos|>"]


def test_words_of_a_template_are_no_roles(with_template):
    for role, template in (("function", KNOWING_TEMPLATE), ("content", COUNTING_TEMPLATE)):
        with pytest.raises(DataError, match=rf"messages\[1\]: unknown role '{role}'"):
            rows_of([TALK[1], {"role": role, "content": "x"}, TALK[2]], with_template(template))


def test_keys_that_templates_often_know_are_named_where_this_one_does_not(bpe_tokenizer):
    context = TALK[2] | {"reasoning": "Hm.", "weight": 0}
    result = {"role": "tool", "content": "x", "name": "look", "tool_call_id": "1"}
    both = TALK[3] | {"from": "human", "value": "Bye."}
    parts = [{"type": "text", "text": "Fare", "id": 1, "image": None}, {"text": "well."}]
    messages = [TALK[1], context, result, both, TALK[4] | {"content": parts}]
    record = Record({"messages": messages}, "x")
    make_renderer("chat", bpe_tokenizer)(record)
    unread = ["content[].id", "from", "name", "reasoning", "tool_call_id", "value"]
    assert record.unused() == [f"messages[].{key}" for key in unread]


def test_keys_of_messages_that_nobody_reads_are_named(with_template):
    messages = [TALK[1] | {"id": 1, "mood": None}, TALK[2] | {"mood": "glad", "weight": 1, "critic": ""}]
    for template, unread in ((KNOWING_TEMPLATE, ["id"]), (COUNTING_TEMPLATE, ["critic", "id", "mood"])):
        record = Record({"messages": messages, "tools": None, "source": "x"}, "x")
        make_renderer("chat", with_template(template))(record)
        assert record.unused() == ["source", *(f"messages[].{key}" for key in unread)]


def test_parts_of_text_are_joined(bpe_tokenizer):
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo!"}]
    assert targets([TALK[1], {"role": "assistant", "content": parts}], bpe_tokenizer) == ["Hello!<|eos|>"]


@pytest.mark.parametrize("calls", [[CALL], json.dumps([CALL]), [CALL["function"]]])
def test_calls_of_tools_are_trained(with_template, calls):
    tokenizer = with_template(KNOWING_TEMPLATE)
    for content in ({}, {"content": None}, {"content": ""}):
        turn = {"role": "assistant", "tool_calls": calls, **content}
        assert targets([TALK[1], turn], tokenizer) == ['look{"at": "it"}<|eos|>']


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", r"rows\.jsonl:3: field 'messages' must be a list"),
        ([], r"field 'messages' must be a list of at least one"),
        (["hello"], r"rows\.jsonl:3: messages\[0\] must be an object with role and content"),
        ([{"content": "Hi."}], r"messages\[0\] must be an object whose 'role' is text"),
        ([TALK[1], {"role": "assistant"}], r"messages\[1\] must be an object whose 'content' is text"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"messages\[0\] .* 'content' is text"),
        (
            [{"role": "user", "content": [{"type": "image", "text": "x"}]}],
            r"messages\[0\] .* 'content' is text",
        ),
        ([TALK[1], TALK[2] | {"role": "asistant"}], r"messages\[1\]: unknown role 'asistant' \(nearest: ass"),
        ([TALK[1], TALK[2] | {"weight": 0.5}], r"messages\[1\]: 'weight' is 0\.5; allowed: 0 or false"),
        ([TALK[1], TALK[2] | {"train": "no"}], r"messages\[1\]: 'train' is 'no'; allowed"),
        ([TALK[1] | {"train": True}, TALK[2]], r"messages\[0\]: 'train' .* only the assistant's turns"),
        ([TALK[1], {"role": "assistant", "tool_calls": "look"}], r"'tool_calls' must be a list of objects"),
        ([TALK[1], {"role": "assistant", "tool_calls": [{"id": 1}]}], "has no function with a name"),
        (
            [TALK[1], {"role": "assistant", "tool_calls": [CALL]}],
            r"messages\[1\]: .* leaves out 'tool_calls'",
        ),
        ([TALK[1], TALK[2] | {"reasoning": "Hm."}], r"messages\[1\]: .* leaves out 'reasoning' of the role"),
    ],
)
def test_malformed_messages(bpe_tokenizer, messages, message):
    with pytest.raises(DataError, match=message):
        rows_of(messages, bpe_tokenizer)


def test_nothing_is_left_out_silently(with_template):
    tokenizer = with_template(SILENT_TEMPLATE)
    with pytest.raises(
        DataError, match=r"messages\[0\]: .* leaves out 'content' of the role 'system'; use a"
    ):
        rows_of(TALK, tokenizer)
    with pytest.raises(DataError, match=r"rows\.jsonl:3: .* leaves out 'tools'"):
        rows_of(TALK[1:], tokenizer, tools=[TOOL])
    with pytest.raises(DataError, match=r"messages\[2\]: .* leaves out 'content' of the role 'tool'"):
        rows_of([TALK[1], TALK[2], {"role": "tool", "content": "x"}, TALK[4]], tokenizer)


def test_what_is_left_out_is_found_where_another_message_says_the_same(with_template):
    tokenizer = with_template(SILENT_TEMPLATE)
    said = [{"role": "system", "content": "Hi."}, *TALK[1:3]]
    with pytest.raises(DataError, match=r"messages\[0\]: .* leaves out 'content' of the role 'system'"):
        rows_of(said, tokenizer)
    assert targets([{"role": "system", "content": ""}, *TALK[1:3]], tokenizer) == ["Hello!<|eos|>"]


def test_every_call_must_be_shown(with_template):
    first = KNOWING_TEMPLATE.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")
    turn = {"role": "assistant", "tool_calls": [CALL, {"function": {"name": "see", "arguments": {}}}]}
    assert targets([TALK[1], turn], with_template(KNOWING_TEMPLATE)) == ['look{"at": "it"}see{}<|eos|>']
    with pytest.raises(DataError, match=r"messages\[1\]: .* leaves out 'tool_calls' of the role 'assistant'"):
        rows_of([TALK[1], turn], with_template(first))


def test_calls_that_a_template_would_write_in_another_language_are_no_calls(with_template):
    pythonic = KNOWING_TEMPLATE.replace("c.function.arguments | tojson", "c.function.arguments")
    turn = {"role": "assistant", "tool_calls": [CALL]}
    assert targets([TALK[1], turn], with_template(pythonic)) == ['look{"at": "it"}<|eos|>']


@pytest.mark.parametrize("tools", ["look", [1], {"name": "look"}])
def test_malformed_tools(bpe_tokenizer, tools):
    with pytest.raises(DataError, match=r"rows\.jsonl:3: field 'tools' must be a list of objects"):
        rows_of(TALK, bpe_tokenizer, tools=tools)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (INSTRUCT_TEMPLATE, r"\(no place for a system\)"),
        ("{{ messages[9].content + 'x' }}", r"\(UndefinedError: "),
        ("{{ 1 + messages[0].content }}", r"\(TypeError: unsupported operand"),
        ("{{ 1 // 0 }}", r"\(ZeroDivisionError"),
        ("{% for m in %}", r"\(TemplateSyntaxError"),
    ],
)
def test_whatever_goes_wrong_in_a_template_is_an_error_of_the_record(with_template, template, reason):
    with pytest.raises(DataError, match=rf"rows\.jsonl:3: .* refuses the conversation {reason}.*; mend its"):
        rows_of(TALK, with_template(template))


def test_several_templates(with_template):
    named = {"default": INSTRUCT_TEMPLATE, "tool_use": KNOWING_TEMPLATE}
    assert targets(TALK[1:3], with_template(named)) == [" Hello!</s>"]
    with pytest.raises(
        DataError, match=r"several chat templates \(rag, tool_use\) and none .* 'default'; re"
    ):
        ChatTemplate(with_template({"tool_use": "", "rag": ""}))


def test_no_template(byte_tokenizer):
    with pytest.raises(DataError, match=r"no chat template; use the tokenizer of a chat model"):
        make_renderer("chat", byte_tokenizer)


def test_half_a_character_is_refused(bpe_tokenizer):
    with pytest.raises(DataError, match=r"rows\.jsonl:3: messages\[1\]: is not valid UTF-8 \(U\+D800 at"):
        rows_of([TALK[1], {"role": "assistant", "content": "\ud800"}], bpe_tokenizer)
