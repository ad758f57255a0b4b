"""Parts of a tokenizer told apart wherever it lies, and the date that its templates print."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from ssmlora_dist.models import fix_date, load_tokenizer, tokenizer_digests

MOMENT = datetime(2025, 3, 4, 5, 6, 7)
MESSAGES = [{"role": "user", "content": "x"}]


def test_saved_used_and_loaded_again_it_is_the_same(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("bytes")
    digests = tokenizer_digests(tokenizer)
    tokenizer(["a", "longer"], padding=True, truncation=True, max_length=4)
    assert tokenizer_digests(tokenizer) == digests
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_digests(load_tokenizer(str(tmp_path))) == digests


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ strftime_now('%d %b %Y') }}", "04 Mar 2025"),
        ("{{ strftime_now('%-d.%-m.%y, %H:%M:%S, %A') }}", "4.3.25, 05:06:07, Tuesday"),
        ("{% macro now() %}{{ strftime_now('%Y') }}{% endmacro %}{{ now() + '!' }}", "2025!"),
        ("\n  {% if strftime_now is defined %}\n{{ strftime_now('%B') }}{% endif %}", "\nMarch"),
        ("{{ messages[0]['content'] }}", "x"),
    ],
)
def test_templates_print_the_moment_that_is_fixed(template: str, text: str) -> None:
    tokenizer = load_tokenizer("bytes")
    tokenizer.chat_template = template
    fix_date(tokenizer, MOMENT)
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False) == text


def test_moments_that_a_template_prints_alike_are_the_same() -> None:
    digests = []
    for moment in (MOMENT, MOMENT.replace(hour=20), MOMENT.replace(day=5)):
        tokenizer = load_tokenizer("bytes")
        tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}"
        fix_date(tokenizer, moment)
        digests.append(tokenizer_digests(tokenizer)["chat template"])
    assert digests[0] == digests[1] != digests[2]


def test_every_one_of_several_templates() -> None:
    tokenizer = load_tokenizer("bytes")
    tokenizer.chat_template = {"default": "{{ strftime_now('%Y') }}", "tool_use": "{{ strftime_now('%m') }}"}
    fix_date(tokenizer, MOMENT)
    texts = [
        tokenizer.apply_chat_template(MESSAGES, tokenize=False, chat_template=name)
        for name in ("default", "tool_use")
    ]
    assert texts == ["2025", "03"]
