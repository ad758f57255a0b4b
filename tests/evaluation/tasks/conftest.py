"""Tokenizers for generated tasks: real ones, and one that counts thousands of long prompts in no time."""

from __future__ import annotations

import pytest

from ...data.conftest import bpe_tokenizer, byte_tokenizer, sentencepiece_tokenizer

__all__ = ["bpe_tokenizer", "byte_tokenizer", "sentencepiece_tokenizer"]


class WordTokenizer:
    """A token for every word, one more for each `e`, digit, stop and so on in it, and one before a text."""

    def __call__(
        self, text: str, add_special_tokens: bool = True, verbose: bool = True
    ) -> dict[str, list[int]]:
        num_tokens = len(text.split()) + sum(map(text.count, "e0123456789.-\n"))
        return {"input_ids": [1] * add_special_tokens + [0] * num_tokens}


@pytest.fixture(scope="session")
def word_tokenizer() -> WordTokenizer:
    return WordTokenizer()
