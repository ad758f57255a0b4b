"""Long texts to token ids piece by piece: a tokenizer needs some 250 bytes and 2 microseconds a character.

A text is cut where it makes no difference: before the space in front of a word, at a place of which its
surroundings, encoded as one and encoded apart, give the same tokens. Short texts are never cut.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from ssmlora_dist.tokenization import TextEncoder

PIECE = 1 << 16
"""The most characters that are encoded at once."""
SURROUNDINGS = 256
"""Characters on either side of a cut that are encoded to test it."""
NUM_TRIED = 64
"""Cuts that are tested before one is made that may make a difference: in a text without spaces, say."""


def encode_pieces(encoder: TextEncoder, text: str, follows: bool) -> Iterator[list[int]]:
    """The ids of a text, in pieces.

    Args:
        encoder: of the tokenizer.
        text: the text.
        follows: whether it follows another one in its sequence.
    """
    begin = 0
    while begin < len(text):
        end = _cut(encoder, text, begin + PIECE // 2, begin + PIECE)
        yield _encode(encoder, text[begin:end], follows or begin > 0)
        begin = end


def encode_ends(encoder: TextEncoder, text: str, follows: bool, limit: int) -> list[int]:
    """The ids of a text; of one with more than twice as many as `limit`, at least so many from both ends.

    Args:
        encoder: of the tokenizer.
        text: the text.
        follows: whether it follows another one in its sequence.
        limit: more tokens than this are not needed from either end.
    """
    if len(text) <= PIECE:
        return _encode(encoder, text, follows)
    head, tail = list[list[int]](), list[list[int]]()
    begin, end = 0, len(text)
    while begin < end and _num_tokens(head) <= limit:
        cut = _cut(encoder, text, begin + PIECE // 2, begin + PIECE)
        head.append(_encode(encoder, text[begin:cut], follows or begin > 0))
        begin = cut
    while begin < end and _num_tokens(tail) <= limit:
        cut = begin if end - begin <= PIECE else _cut(encoder, text, end - PIECE, end - PIECE // 2)
        tail.append(_encode(encoder, text[cut:end], True))
        end = cut
    return list(itertools.chain(*head, *reversed(tail)))


def _encode(encoder: TextEncoder, text: str, follows: bool) -> list[int]:
    return encoder.encode_continuation(text) if follows else encoder.encode(text)


def _cut(encoder: TextEncoder, text: str, first: int, last: int) -> int:
    """The last place from `first` to `last` where a cut makes no difference, or the end of the text."""
    if last >= len(text):
        return len(text)
    positions = range(last, first - 1, -1)
    before_words = (at for at in positions if text[at].isspace() and not text[at - 1].isspace())
    tried = itertools.chain(itertools.islice(before_words, NUM_TRIED), positions[:NUM_TRIED])
    return next((at for at in tried if _can_be_cut(encoder, text, at)), last)


def _can_be_cut(encoder: TextEncoder, text: str, at: int) -> bool:
    return is_boundary(encoder, text[max(0, at - SURROUNDINGS) : at], text[at : at + SURROUNDINGS])


def is_boundary(encoder: TextEncoder, left: str, right: str) -> bool:
    """Whether two texts have the tokens together that they have apart, as far as their surroundings tell."""
    left, right = left[-SURROUNDINGS:], right[:SURROUNDINGS]
    return encoder.encode(left + right) == encoder.encode(left) + encoder.encode_continuation(right)


def _num_tokens(pieces: Iterable[list[int]]) -> int:
    return sum(map(len, pieces))
