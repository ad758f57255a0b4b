"""Rows of text to examples, with the boundaries of prompt and answer exact and too long rows dealt with."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssmlora_dist.data.accounts import DatasetReport
from ssmlora_dist.data.examples import Example
from ssmlora_dist.errors import DataError
from ssmlora_dist.long_texts import PIECE, encode_ends, encode_pieces
from ssmlora_dist.tokenization import TextEncoder, check_text

Ids = list[int] | NDArray[np.int32]


@dataclass(frozen=True)
class Segment:
    """A stretch of a row's text.

    Args:
        text: the text.
        is_target: whether it is trained.
        may_shrink: whether it alone may be cut in a row that is too long, rather than all before the answer.
    """

    text: str
    is_target: bool = False
    may_shrink: bool = False


@dataclass(frozen=True)
class Row:
    """One example as text.

    Args:
        where: where it came from, for messages.
        segments: its text in order.
        is_framed: whether the tokenizer's beginning and end of a sequence go around it.
        may_split: whether it is a document to be cut into pieces of the longest length allowed.
        closings: what ends the turns of its conversation, in whichever row they are.
        metadata: of its example; by default its length, as the smallest power of two that is no less.
    """

    where: str
    segments: tuple[Segment, ...]
    is_framed: bool = True
    may_split: bool = False
    closings: tuple[str, ...] = ()
    metadata: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Part:
    """Token ids that are all trained or all not."""

    ids: Ids
    is_target: bool


class RowEncoder:
    """Turns rows into examples and counts what became of them.

    Each run of context and each run of target is encoded on its own, so no token spans the boundary and a
    prompt has the ids that it has at generation (cut documents aside). The end-of-sequence token is trained
    with the answer, but not scored.

    Args:
        encoder: the tokenizer.
        max_length: the most tokens of an example.
        too_long: what happens to a row that is longer and no document. `drop`: left out. `truncate`: the
            middle of what may shrink is cut out, or without such a part that of all before the last answer;
            a row that still does not fit is left out, so no answer is cut. `refuse`: an error.
    """

    def __init__(self, encoder: TextEncoder, max_length: int, too_long: str) -> None:
        self._encoder = encoder
        # The questions about one long document come one after another: it is encoded once for all of them.
        self._encode_again = functools.lru_cache(maxsize=1)(self._encode_text)
        self._max_length = max_length
        self._too_long = too_long
        self._counts: Counter[str] = Counter()

    def take_report(self, num_rows: int, num_examples: int) -> DatasetReport:
        """What became of the rows since it was last asked for."""
        counts: dict[str, Any] = dict(self._counts)
        report = DatasetReport(num_rows, num_examples, **counts)
        self._counts.clear()
        return report

    def encode(self, row: Row) -> list[Example]:
        """The examples of one row: none, one, or the pieces of a document.

        Raises:
            DataError: the row is too long and that is refused, its text is not Unicode, or the tokenizer has
                no end-of-sequence token.
        """
        for segment in row.segments:
            check_text(segment.text, row.where)
        if not any(segment.is_target and segment.text.strip() for segment in row.segments):
            self._counts["num_without_target"] += 1
            return []
        row = self._without_space_behind_end(row) if row.is_framed else row
        if row.may_split:
            return self._split(row)
        parts = self._encode_parts(row.segments, row.is_framed)
        is_too_long = _num_tokens(parts) > self._max_length
        parts = self._shorten(row, parts) if is_too_long else self._join(row, parts)
        if not parts:
            is_cut = self._too_long == "truncate"
            self._counts["num_answers_too_long" if is_cut else "num_dropped_too_long"] += 1
            return []
        has_answer = row.is_framed and not row.segments[0].is_target
        num_scored = len(parts[-2].ids) if has_answer else None
        example = _make_example(parts, num_scored, row.metadata)
        if example.num_targets == 0:
            self._counts["num_without_target"] += 1
            return []
        self._counts["num_truncated"] += is_too_long
        return [example]

    def _without_space_behind_end(self, row: Row) -> Row:
        """The row without white space behind an end-of-sequence token that it spells: there it ends."""
        *before, last = row.segments
        end = self._encoder.spelled_end(last.text)
        if not last.is_target or end is None or end != self._encoder.eos_token:
            return row
        return replace(row, segments=(*before, replace(last, text=last.text.rstrip())))

    def _encode_parts(self, segments: Iterable[Segment], is_framed: bool) -> list[Part]:
        """Encodes each segment on its own and frames the whole."""
        parts: list[Part] = []
        for segment in segments:
            encode = self._encode_again if segment.may_shrink else self._encode_text
            follows = any(len(part.ids) for part in parts)
            parts.append(Part(encode(segment.text, follows), segment.is_target))
        return self._frame(parts) if is_framed else parts

    def _frame(self, parts: list[Part]) -> list[Part]:
        """Puts beginning and end of a sequence around it, each once where the text spells it too.

        Before an answer without a prompt there is what evaluation puts there, or its first token would have
        nothing to follow.
        """
        begin, end = self._encoder.bos_ids, [self._encoder.eos_id]
        filled = [index for index, part in enumerate(parts) if len(part.ids)]
        if not parts[0].is_target and filled and parts[filled[0]].is_target and not begin:
            begin = [end[0] if self._encoder.prefix_id is None else self._encoder.prefix_id]
        if filled and list(parts[filled[0]].ids[: len(begin)]) == begin:
            first = parts[filled[0]]
            parts[filled[0]] = Part(first.ids[len(begin) :], first.is_target)
        if filled and parts[filled[-1]].is_target and list(parts[filled[-1]].ids[-1:]) == end:
            parts[filled[-1]] = Part(parts[filled[-1]].ids[:-1], True)
        return [Part(begin, False), *parts, Part(end, True)]

    def _encode_text(self, text: str, follows: bool) -> list[int]:
        # What a row has beyond its longest length is not looked at, but for the ends that may be kept.
        return encode_ends(self._encoder, text, follows, self._max_length)

    def _join(self, row: Row, parts: list[Part]) -> list[Part]:
        """Encodes neighbours of one kind together, as a prompt is encoded at generation."""
        groups = itertools.groupby(row.segments, key=lambda segment: segment.is_target)
        runs = [Segment("".join(s.text for s in group), is_target) for is_target, group in groups]
        if len(runs) == len(row.segments):
            return parts
        joined = self._encode_parts(runs, row.is_framed)
        # Together they are hardly ever more tokens than apart, but nothing guarantees it.
        return joined if _num_tokens(joined) <= self._max_length else parts

    def _shorten(self, row: Row, parts: list[Part]) -> list[Part]:
        """Applies the policy to a row that is too long; nothing is left of one that is dropped."""
        if self._too_long == "refuse":
            at_least = "at least " if any(len(segment.text) > PIECE for segment in row.segments) else ""
            raise DataError(
                f"{row.where}: {at_least}{_num_tokens(parts)} tokens are more than max_length "
                f"{self._max_length}; shorten the row, raise `data.max_length`, or set `data.too_long` to "
                "'drop' or 'truncate'"
            )
        return [] if self._too_long == "drop" else self._cut_middle(row, parts)

    def _cut_middle(self, row: Row, parts: list[Part]) -> list[Part]:
        """Cuts the middle out of what may shrink; nothing is left of a row that does not fit without it."""
        shrinking = [index for index, segment in enumerate(row.segments) if segment.may_shrink]
        answer = max(index for index, segment in enumerate(row.segments) if segment.is_target)
        first, last = (shrinking[0], shrinking[0] + 1) if shrinking else (0, answer)
        num_framing = int(row.is_framed)
        before, after = parts[: num_framing + first], parts[num_framing + last :]
        middle = parts[num_framing + first : num_framing + last]
        room = self._max_length - _num_tokens([*before, *after])
        if room < 1:
            return []
        begin, end = room - room // 2, _num_tokens(middle) - room // 2
        shrunk: list[Part] = []
        at = 0
        for part in middle:
            ids = [*part.ids[: max(0, begin - at)], *part.ids[max(0, end - at) :]]
            # Of an earlier answer that is cut nothing is trained.
            shrunk.append(Part(ids, part.is_target and len(ids) == len(part.ids)))
            at += len(part.ids)
        return [*before, *shrunk, *after]

    def _split(self, row: Row) -> list[Example]:
        """A document, cut where it is longer than allowed into pieces that each begin as a sequence does."""
        text = "".join(segment.text for segment in row.segments)
        pieces = [np.asarray(ids, dtype=np.int32) for ids in encode_pieces(self._encoder, text, False)]
        begin, body, end = self._frame([Part(np.concatenate(pieces), True)])
        ids = np.concatenate([body.ids, np.asarray(end.ids, dtype=np.int32)])
        step = self._max_length - len(begin.ids)
        cuts = [*range(0, len(ids), step), len(ids)]
        if len(cuts) > 2 and cuts[-1] - cuts[-2] == 1:
            # A single token, which nothing might precede, takes the one before it along.
            cuts[-2] -= 1
        if len(cuts) > 2:
            self._counts["num_split"] += 1
            self._counts["num_pieces"] += len(cuts) - 1
        examples = [_make_example([begin, Part(ids[a:b], True)]) for a, b in itertools.pairwise(cuts)]
        # Of a text that is nothing but the end of a sequence.
        kept = [example for example in examples if example.num_targets]
        self._counts["num_without_target"] += len(examples) - len(kept)
        return kept


def _num_tokens(parts: Sequence[Part]) -> int:
    return sum(len(part.ids) for part in parts)


def _make_example(
    parts: Sequence[Part], num_scored: int | None = None, metadata: Mapping[str, Any] | None = None
) -> Example:
    ids = [token for part in parts for token in part.ids]
    is_target = [part.is_target for part in parts for _ in part.ids]
    return Example.from_tokens(ids, is_target, num_scored, metadata or {"length": _length_bucket(len(ids))})


def _length_bucket(num_tokens: int) -> int:
    """The smallest power of two that is no less."""
    return 1 << max(num_tokens - 1, 0).bit_length()
