"""Pieces of text to token ids, such that the pieces' boundaries are token boundaries."""

from __future__ import annotations

from typing import Any

from ssmlora_dist.errors import DataError

# A character that tokenizers neither drop nor merge with the start of a word.
ANCHOR = "\n"


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
