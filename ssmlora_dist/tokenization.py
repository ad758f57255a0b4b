"""Text to token ids: how sequences begin, how pieces follow each other, and what ends an answer."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

from ssmlora_dist.errors import DataError

# A character that tokenizers neither drop nor merge with the start of a word.
ANCHOR = "\n"
LONGEST_TOKEN = 256
"""Characters that no token of a vocabulary has more of."""


def end_token_ids(*sources: int | Iterable[int] | None) -> list[int]:
    """Every token that ends an answer: those of all sources, a token, several or none each.

    The sources are the tokenizer's end-of-sequence token, those of the model's generation configuration, and
    those that an adapter was trained to answer (see `TextEncoder.endings`).
    """
    lists = [[source] if isinstance(source, int) else source or () for source in sources]
    return sorted({int(token) for tokens in lists for token in tokens})


def check_text(text: str, where: str) -> None:
    """Finds halves of characters, which UTF-8 has not and no tokenizer takes.

    Raises:
        DataError: there is one, with its place.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: is not valid UTF-8 (U+{ord(text[error.start]):04X} at character {error.start + 1}); "
            "convert it to UTF-8, or remove what is damaged"
        ) from None


class TextEncoder:
    """Encodes text without special tokens, and knows which ones the tokenizer puts around a sequence.

    Args:
        tokenizer: a transformers tokenizer.

    Attributes:
        bos_ids: what the tokenizer itself puts before a text; empty for the models that want nothing there.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        plain = self.encode("a")
        framed = list(tokenizer("a")["input_ids"])
        starts = range(len(framed) - len(plain) + 1)
        first = next((k for k in starts if framed[k : k + len(plain)] == plain), 0)
        self.bos_ids: list[int] = framed[:first]
        self._anchor_ids = self.encode(ANCHOR)
        self._marks_start = self.encode(ANCHOR + "a") != self._anchor_ids + plain

    @property
    def eos_id(self) -> int:
        """The token that ends an answer.

        Raises:
            DataError: the tokenizer has none.
        """
        eos_id = self._tokenizer.eos_token_id
        if eos_id is None:
            raise DataError(
                "model.tokenizer: the tokenizer has no end-of-sequence token, so nothing can tell the model "
                "where an answer ends; set `eos_token` in its tokenizer_config.json or name another tokenizer"
            )
        return int(eos_id)

    @property
    def prefix_id(self) -> int | None:
        """What an empty prompt is: the beginning-of-sequence token, else the end-of-sequence token."""
        bos_id: int | None = self._tokenizer.bos_token_id
        eos_id: int | None = self._tokenizer.eos_token_id
        return eos_id if bos_id is None else bos_id

    @property
    def eos_token(self) -> str | None:
        """As the tokenizer writes the token that ends an answer."""
        token: str | None = self._tokenizer.eos_token
        return token

    def begin(self, text: str) -> list[int]:
        """Ids of a prompt, and before them what the tokenizer puts there, unless the text spells it out."""
        ids = self.encode(text)
        return ids if ids[: len(self.bos_ids)] == self.bos_ids else [*self.bos_ids, *ids]

    def encode(self, text: str) -> list[int]:
        """Ids of a text that begins a sequence, without what goes before it."""
        # verbose=False: a long text is no mistake here, it is cut or refused later by a policy of our own.
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of a text that follows another one.

        Tokenizers of the SentencePiece kind mark the start of every text with a space; in the middle of a
        sequence that would be a space nobody wrote, so the text is encoded behind an anchor there.
        """
        if not text or not self._marks_start:
            return self.encode(text) if text else []
        anchored = self.encode(ANCHOR + text)
        if anchored[: len(self._anchor_ids)] == self._anchor_ids:
            return anchored[len(self._anchor_ids) :]
        return self.encode(text)

    def endings(self, closings: Iterable[str]) -> dict[str, list[Any]]:
        """What ends the answers of a model that has been trained on such text, as adapters record it.

        Args:
            closings: of turns. One that is a token of its own ends an answer, as does the end-of-sequence
                token; any other ends it as a text; white space ends none, as answers may hold it.

        Returns:
            `end_token_ids` and `stop_texts`.
        """
        eos_id = self._tokenizer.eos_token_id
        tokens, texts = {eos_id} - {None}, set()
        for closing in closings:
            ids = self.encode_continuation(closing)
            if len(ids) == 1 and ids[0] in self._added:
                tokens.add(ids[0])
            elif closing.strip():
                texts.add(closing)
        return {"end_token_ids": sorted(tokens), "stop_texts": sorted(texts)}

    def doubt(self, closings: Iterable[str]) -> str | None:
        """What to know of turns with such closings, if they are no tokens of their own."""
        closings = sorted(closings)
        if not all(closing.strip() for closing in closings):
            return (
                "the chat template ends turns with white space or nothing, which answers may hold too: only "
                "their greatest length ends them; use a template that closes turns"
            )
        if texts := self.endings(closings)["stop_texts"]:
            return (
                f"the chat template ends turns with {' or '.join(map(repr, texts))}, which is no token of "
                "its own: answers end there, but other programs must be told (as `stop_strings`, say)"
            )
        return None

    def spelled_end(self, text: str) -> str | None:
        """The added token, as the tokenizer writes it, that a text ends with, white space behind it aside."""
        stripped = text.rstrip()
        if not stripped.endswith(self._added_texts):
            return None
        return max(filter(stripped.endswith, self._added_texts), key=len)

    @functools.cached_property
    def _added_texts(self) -> tuple[str, ...]:
        return tuple(self._tokenizer.get_added_vocab())

    @functools.cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self._tokenizer.get_added_vocab().values())

    def added_token(self, text: str) -> str | None:
        """The token that a text ends with, if it was added to a vocabulary of words, as `<|im_end|>`."""
        # Of a long text its end tells, which is longer than any such token.
        ids = self.encode_continuation(text[-LONGEST_TOKEN:])
        return str(self._tokenizer.convert_ids_to_tokens(ids[-1])) if ids and ids[-1] in self._added else None
