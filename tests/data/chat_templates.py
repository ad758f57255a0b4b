"""Chat templates of real families, written down anew from what is known of their formats.

Each renders roles, tools and reasoning as its family does in what matters to training: where the system
message goes, what closes a turn, what a prompt ends with, and what is left out of earlier turns.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Family:
    """A template, its tokens, and what its turns must look like, as the family's users know it.

    Args:
        template: in Jinja.
        special: its tokens; the first begins and the second ends a sequence.
        answer: a turn as the model must produce it, of `content` and of reasoning: `thought` in its tags,
            `bare` without them, or `begun` by the prompt.
        call: a turn that calls the tool `look` for the place `Rome`; None where tools are left out.
        first: the prompt of a turn that begins the conversation; None where that is refused.
        system: whether a system message has a place.
        reasons: whether `reasoning_content` has a place.
        strips: whether its tokens take the white space behind them with them.
    """

    template: str
    special: str
    answer: str
    call: str | None = None
    first: str | None = None
    system: bool = True
    reasons: bool = False
    strips: bool = False


_ALTERNATES = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}{% endfor %}"
)
_CHATML_CALLS = (
    "{% for c in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}"
)
_CHATML_TOOLS = (
    "{% if tools %}<|im_start|>system\n# Tools\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}"
    "<|im_end|>\n{% endif %}"
)

FAMILIES: dict[str, Family] = {
    # Every role alike; tools in a system message of their own, as Hermes and Qwen 2.5 have them.
    "chatml": Family(
        _CHATML_TOOLS
        + "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        + _CHATML_CALLS
        # The end of a turn is not the end of a text.
        + "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|endoftext|> <|endoftext|> <|im_start|> <|im_end|>",
        answer="{thought}{content}<|im_end|>",
        call='<tool_call>\n{"name": "look", "arguments": {"place": "Rome"}}\n</tool_call><|im_end|>',
        first="<|im_start|>assistant\n",
    ),
    # Headers in tokens, content trimmed, tools in the first user's turn, their results in the role ipython.
    "llama3": Family(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}<|start_header_id|>ipython"
        "<|end_header_id|>\n\n{{ m.content | tojson }}<|eot_id|>{% else %}<|start_header_id|>{{ m.role }}"
        "<|end_header_id|>\n\n{% if tools and m.role == 'user' and loop.first %}"
        "{% for t in tools %}{{ t | tojson(indent=2) }}\n\n{% endfor %}{% endif %}"
        "{% if m.tool_calls %}{% set c = m.tool_calls[0].function %}"
        '{"name": "{{ c.name }}", "parameters": {{ c.arguments | tojson }}}'
        "{% else %}{{ m.content | trim }}{% endif %}<|eot_id|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        "<|begin_of_text|> <|end_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>",
        answer="{thought}{content}<|eot_id|>",
        call='{"name": "look", "parameters": {"place": "Rome"}}<|eot_id|>',
        first="<|begin_of_text|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    # The system message and the tools go before the last user's turn, wherever that is; no generation prompt.
    "mistral": Family(
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
        "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
        "{% set at = namespace(user=-1) %}{% for m in rest %}{% if m.role == 'user' %}"
        "{% set at.user = loop.index0 %}{% endif %}{% endfor %}{{ bos_token }}"
        "{% for m in rest %}{% if m.role == 'user' %}"
        "{% if tools and loop.index0 == at.user %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]"
        "{% endif %}[INST] {% if system and loop.index0 == at.user %}{{ system + '\n\n' }}{% endif %}"
        "{{ m.content }}[/INST]{% elif m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}"
        '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
        "{% endfor %}]{{ eos_token }}{% elif m.role == 'assistant' %} {{ m.content | trim }}{{ eos_token }}"
        "{% elif m.role == 'tool' %}[TOOL_RESULTS] {{ m.content }}[/TOOL_RESULTS]{% endif %}{% endfor %}",
        "<s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_CALLS] [TOOL_RESULTS]"
        " [/TOOL_RESULTS]",
        answer=" {thought}{content}</s>",
        call='[TOOL_CALLS] [{"name": "look", "arguments": {"place": "Rome"}}]</s>',
        # Nothing asks for a turn: what the template itself puts before it.
        first="<s>",
    ),
    # The system message in the first user's turn, in marks of plain text.
    "llama2": Family(
        "{% set rest = messages[1:] if messages[0].role == 'system' else messages %}"
        + _ALTERNATES.replace("in messages", "in rest")
        + "{% for m in rest %}{% if m.role == 'user' %}{{ bos_token }}[INST] "
        "{% if loop.first and messages[0].role == 'system' %}<<SYS>>\n{{ messages[0].content }}\n<</SYS>>\n\n"
        "{% endif %}{{ m.content | trim }} [/INST]{% else %} {{ m.content | trim }} {{ eos_token }}"
        "{% endif %}"
        "{% endfor %}",
        "<s> </s>",
        answer=" {thought}{content} </s>",
    ),
    # No system message, the assistant is called model.
    "gemma": Family(
        "{{ bos_token }}{% if messages[0].role == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        + _ALTERNATES
        + "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        "<bos> <eos> <start_of_turn> <end_of_turn>",
        answer="{thought}{content}<end_of_turn>",
        system=False,
    ),
    # Reasoning is shown from the last user's turn on, and then always, if only as an empty block.
    "qwen3": Family(
        _CHATML_TOOLS + "{% set at = namespace(user=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set at.user = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{% if m.role == 'assistant' %}{% set text = m.content %}"
        "{% set thought = m.reasoning_content or '' %}{% if '</think>' in text %}"
        "{% set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
        "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}<|im_start|>assistant\n"
        "{% if loop.index0 > at.user and (loop.last or thought) %}<think>\n{{ thought.strip('\n') }}\n"
        "</think>\n\n{% endif %}{{ text }}" + _CHATML_CALLS + "<|im_end|>\n"
        "{% elif m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n</tool_response>"
        "<|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        "<|endoftext|> <|endoftext|> <|im_start|> <|im_end|>",
        answer="<think>\n{bare}\n</think>\n\n{content}<|im_end|>",
        call='<think>\n\n</think>\n\n<tool_call>\n{"name": "look", "arguments": {"place": "Rome"}}\n'
        "</tool_call><|im_end|>",
        first="<|im_start|>assistant\n",
        reasons=True,
    ),
    # The prompt ends with an empty block of reasoning, which no turn shows.
    "hybrid": Family(
        "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n<think>\n\n</think>\n\n{% endif %}",
        "<s> </s> <|system|> <|user|> <|assistant|> <|end|>",
        answer="{thought}{content}<|end|>",
        first="<s><|assistant|>\n<think>\n\n</think>\n\n",
    ),
    # Tokens that take the white space behind them with them.
    "phi3": Family(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        "<s> <|endoftext|> <|system|> <|user|> <|assistant|> <|end|>",
        answer="{thought}{content}<|end|>\n<|endoftext|>",
        first="<|assistant|>\n",
        strips=True,
    ),
    # The same without an end of the text behind the last turn, as Phi 4 has it.
    "phi4": Family(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        "<s> <|endoftext|> <|system|> <|user|> <|assistant|> <|end|>",
        answer="{thought}{content}<|end|>",
        first="<|assistant|>\n",
        strips=True,
    ),
    # Reasoning is begun by the prompt and cut out of every turn.
    "deepseek_r1": Family(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
        "{% elif m.role == 'user' %}<|User|>{{ m.content }}{% elif m.tool_calls %}<|Assistant|>"
        "{% for c in m.tool_calls %}{{ '<|call|>' + c.function.name + '\n' + c.function.arguments }}"
        "{% endfor %}{{ eos_token }}{% elif m.role == 'assistant' %}"
        "<|Assistant|>{{ m.content.split('</think>')[-1].lstrip() }}{{ eos_token }}"
        "{% elif m.role == 'tool' %}<|output|>{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}",
        "<|begin|> <|end_of_sentence|> <|User|> <|Assistant|> <|call|> <|output|>",
        answer="{begun}{content}<|end_of_sentence|>",
        first="<|begin|><|Assistant|><think>\n",
    ),
    # Headers in plain text, turns closed by the end of a sequence.
    "zephyr": Family(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        "<s> </s>",
        answer="{thought}{content}</s>",
        first="<|assistant|>\n",
    ),
    # All in plain text: nothing but the content tells turns apart.
    "plain": Family(
        "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT: {% endif %}",
        "<s> </s>",
        answer="{thought}{content}\n\n",
        first="ASSISTANT: ",
    ),
}

# So that tokens would span the pieces of a conversation if they could.
MERGES = [("Ġ", "H"), ("Ċ", "Ċ"), (":", "Ġ"), (":Ġ", "H"), (".", "ĊĊ"), (">", "Ċ"), ("H", "e"), ("t", "h")]


def tokenizer_of(family: Family) -> PreTrainedTokenizerFast:
    """Bytes with a few merges, and the family's tokens and template."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*symbols, *("".join(pair) for pair in MERGES)]
    tokenizer = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(vocabulary)}, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = list(dict.fromkeys(family.special.split()))
    tokenizer.add_special_tokens([AddedToken(token, special=True, rstrip=family.strips) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[0],
        eos_token=family.special.split()[1],
        pad_token=family.special.split()[1],
        clean_up_tokenization_spaces=False,
        chat_template=family.template,
    )
