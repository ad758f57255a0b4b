"""Tokenizers for generated tasks: real ones, and one that counts thousands of long prompts in no time."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from ...data.conftest import bpe_tokenizer, byte_tokenizer, sentencepiece_tokenizer

__all__ = ["bpe_tokenizer", "byte_tokenizer", "sentencepiece_tokenizer"]


class WordTokenizer:
    """A token for every word, one more for each `e`, digit, stop and so on in it; its ids say nothing."""

    def __call__(
        self, texts: Sequence[str], add_special_tokens: bool = True, verbose: bool = True
    ) -> dict[str, list[range]]:
        return {
            "input_ids": [
                range(len(text.split()) + sum(map(text.count, "e0123456789.-\n")) + add_special_tokens)
                for text in texts
            ]
        }


@pytest.fixture(scope="session")
def word_tokenizer() -> WordTokenizer:
    return WordTokenizer()
