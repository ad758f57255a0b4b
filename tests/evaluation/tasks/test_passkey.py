"""The pass key's own form."""

from __future__ import annotations

import re

from ssmlora_dist.evaluation.tasks.haystack import NOISE

from .generated import make


def test_a_key_of_five_digits_in_noise_or_in_a_text(word_tokenizer):
    for item in make("passkey", word_tokenizer, [512], 20):
        assert re.fullmatch(r"[1-9]\d{4}", item.references[0])
        assert item.prompt.count(NOISE[0]) > 3
        assert item.prompt.endswith("The pass key is")
        assert item.max_new_tokens > 5
    for item in make("passkey", word_tokenizer, [512], 5, text="It was late. Nobody spoke."):
        assert "It was late. Nobody spoke. It was late." in item.prompt
        assert "rain" not in item.prompt
