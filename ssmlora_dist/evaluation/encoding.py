"""Prompts and answers to token ids as the standard harness (lm-eval) encodes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ssmlora_dist.errors import DataError


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

    Special tokens are those that the tokenizer itself adds, unless the text spells out the first of them. An
    empty prompt is the beginning-of-sequence token, or the end-of-sequence token where there is none.

    Args:
        tokenizer: a transformers tokenizer.
        max_length: tokens that the model takes; None where it has no limit.
        vocab_size: rows of the model's embedding.

    Raises:
        DataError: the tokenizer has neither a beginning- nor an end-of-sequence token.
    """

    def __init__(self, tokenizer: Any, max_length: int | None, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._max_length, self._vocab_size = max_length, vocab_size
        prefix_id = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if prefix_id is None:
            raise DataError(
                "model.tokenizer: the tokenizer has neither a beginning- nor an end-of-sequence token, so an "
                "empty prompt cannot be encoded; set `eos_token` in its tokenizer_config.json"
            )
        self._prefix_id = int(prefix_id)
        self._prefix_text = str(tokenizer.decode([self._prefix_id]))

    def choices(self, prompt: str, choices: Sequence[str]) -> EncodedChoices:
        """The ids of a prompt and of every choice.

        A choice is what it adds to the ids of the prompt: both are encoded together and the prompt's number
        of tokens is cut off. White space at the end of the prompt belongs to the choices, where tokenizers
        that begin words with a space expect it.

        Raises:
            DataError: a choice adds no token, or the model does not take as many.
        """
        stem = prompt.rstrip()
        space = prompt[len(stem) :]
        if stem:
            first, *whole = self._encode([stem, *(prompt + choice for choice in choices)])
            added = [ids[len(first) :] for ids in whole]
        else:
            first = []
            added = self._encode([space + choice for choice in choices], special=False)
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
        ids = self._encode([prompt])[0] if prompt else []
        ids = ids or [self._prefix_id]
        given = f"the prompt is {len(ids)} tokens, and {max_new_tokens} are to follow"
        self._check(len(ids) + max_new_tokens, given, ids)
        return ids

    def _encode(self, texts: Sequence[str], special: bool | None = None) -> list[list[int]]:
        """Ids of texts that begin alike."""
        if special is None:
            special = not texts[0].startswith(self._prefix_text)
        # verbose=False: what is too long is refused below.
        encoded = self._tokenizer(list(texts), add_special_tokens=special, verbose=False)
        return [list(ids) for ids in encoded["input_ids"]]

    def _check(self, length: int, given: str, *encoded: list[int]) -> None:
        if self._max_length is not None and length > self._max_length:
            raise DataError(
                f"{given}; the model takes {self._max_length}: shorten the item or "
                "choose a model that takes more"
            )
        largest = max(map(max, encoded))
        if largest >= self._vocab_size:
            raise DataError(
                f"the tokenizer gives the id {largest}, and the model's vocabulary has {self._vocab_size}: "
                "they do not belong together; name the model's own tokenizer"
            )
