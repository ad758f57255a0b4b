"""Prompts and answers to token ids as the standard harness (lm-eval) encodes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ssmlora_dist.errors import DataError
from ssmlora_dist.long_texts import PIECE, encode_ends
from ssmlora_dist.tokenization import TextEncoder


@dataclass(frozen=True)
class EncodedChoices:
    """A prompt and the choices that may follow it, in token ids; neither is ever empty."""

    prompt: list[int]
    choices: tuple[list[int], ...]

    @property
    def num_extra(self) -> int:
        """Tokens that the model reads beyond the prompt to know the longest choice: its last is not read."""
        return max(map(len, self.choices)) - 1


class PromptEncoder:
    """Encodes prompts, and answers as they follow them.

    A prompt begins as sequences do in training: with what the tokenizer puts before a text, unless the text
    spells it out. An empty prompt is the beginning-of-sequence token, or the end-of-sequence token where
    there is none.

    Args:
        tokenizer: a transformers tokenizer.
        max_length: tokens that the model takes; None where it has no limit.
        vocab_size: rows of the model's embedding.

    Raises:
        DataError: the tokenizer has neither a beginning- nor an end-of-sequence token.
    """

    def __init__(self, tokenizer: Any, max_length: int | None, vocab_size: int) -> None:
        self._encoder = TextEncoder(tokenizer)
        self._max_length, self._vocab_size = max_length, vocab_size
        if self._encoder.prefix_id is None:
            raise DataError(
                "model.tokenizer: the tokenizer has neither a beginning- nor an end-of-sequence token, so an "
                "empty prompt cannot be encoded; set `eos_token` in its tokenizer_config.json"
            )
        self._prefix_id = self._encoder.prefix_id

    def choices(self, prompt: str, choices: Sequence[str]) -> EncodedChoices:
        """The ids of a prompt and of every choice.

        A choice is what it adds to the ids of the prompt: both are encoded together and the prompt's number
        of tokens is cut off. White space at the end of the prompt belongs to the choices, where tokenizers
        that begin words with a space expect it.

        Raises:
            DataError: a choice adds no token, or the model does not take as many.
        """
        for name, text in (("the prompt", prompt), *(("a choice", choice) for choice in choices)):
            self._check_size(name, text)
        stem = prompt.rstrip()
        space = prompt[len(stem) :]
        if stem:
            first = self._encoder.begin(stem)
            added = [self._encoder.begin(prompt + choice)[len(first) :] for choice in choices]
        else:
            first = []
            added = [self._encoder.encode(space + choice) for choice in choices]
            # Not said twice by a choice that spells it out itself.
            added = [ids[1:] if ids[:1] == [self._prefix_id] else ids for ids in added]
        encoded = EncodedChoices(first or [self._prefix_id], tuple(added))
        for choice, ids in zip(choices, added, strict=True):
            if not ids:
                raise DataError(f"the choice {choice!r} adds no token to the prompt; give it a text")
        num_read = len(encoded.prompt) + encoded.num_extra
        given = f"the prompt and its longest choice are {num_read} tokens"
        self._check(num_read, given, encoded.prompt, *added)
        return encoded

    def prompt(self, prompt: str, max_new_tokens: int) -> list[int]:
        """The ids of a prompt that the model is to continue.

        Raises:
            DataError: the model does not take as many and the new ones.
        """
        self._check_size("the prompt", prompt)
        ids = (self._encoder.begin(prompt) if prompt else []) or [self._prefix_id]
        given = f"the prompt is {len(ids)} tokens, and {max_new_tokens} are to follow"
        self._check(len(ids) + max_new_tokens, given, ids)
        return ids

    def _check_size(self, name: str, text: str) -> None:
        """Refuses a text that is far too long by its beginning and its end."""
        if self._max_length is not None and len(text) > PIECE:
            num_tokens = len(encode_ends(self._encoder, text, False, self._max_length))
            self._check(num_tokens, f"{name} is at least {num_tokens} tokens")

    def _check(self, length: int, given: str, *encoded: list[int]) -> None:
        if self._max_length is not None and length > self._max_length:
            raise DataError(
                f"{given}; the model takes {self._max_length}: shorten the item, choose a model that takes "
                "more or, where it has a RoPE, set model.rope_parameters"
            )
        largest = max(map(max, encoded), default=0)
        if largest >= self._vocab_size:
            raise DataError(
                f"the tokenizer gives the id {largest}, and the model's vocabulary has {self._vocab_size}: "
                "they do not belong together; name the model's own tokenizer"
            )
