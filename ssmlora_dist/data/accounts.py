"""What became of the records of a source: kept, left out and why, cut, and what of them nobody reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from ssmlora_dist.records import unused_fields_text

LARGEST_SHARE = 0.1
"""Of rows left out, beyond which a warning is given."""


@dataclass(frozen=True)
class DatasetReport:
    """What became of the rows of one source.

    Args:
        num_rows: records read (or generated).
        num_examples: examples made of them; a record may give several (the queries of one meeting, the
            pieces of a text), so this is not always rows minus dropped.
        num_dropped_too_long: examples left out because they exceed the longest length allowed.
        num_truncated: examples of which the prompt was cut to fit.
        num_without_target: examples left out because no token of them would be trained.
        num_answers_too_long: examples left out because the answer, with the question about a document, is
            too long without the rest.
        num_split: texts cut into pieces of the longest length allowed.
        num_pieces: examples that these gave.
        unused_fields: names of fields that nobody reads, to the number of records that have them.
    """

    num_rows: int = 0
    num_examples: int = 0
    num_dropped_too_long: int = 0
    num_truncated: int = 0
    num_without_target: int = 0
    num_answers_too_long: int = 0
    num_split: int = 0
    num_pieces: int = 0
    unused_fields: Mapping[str, int] = field(default_factory=dict)

    def __add__(self, other: DatasetReport) -> DatasetReport:
        counts = {name: getattr(self, name) + getattr(other, name) for name in COUNTS}
        unused = self.unused_fields
        if other.unused_fields:
            unused = dict(Counter(unused) + Counter(other.unused_fields))
        return DatasetReport(**counts, unused_fields=unused)

    def counts(self) -> dict[str, int]:
        """All numbers by their names."""
        return {name: getattr(self, name) for name in COUNTS}

    @property
    def num_dropped(self) -> int:
        return self.num_dropped_too_long + self.num_answers_too_long + self.num_without_target

    def lines(self) -> list[str]:
        """What a person is to know, a line or two."""
        parts = [f"{self.num_examples} examples of {self.num_rows} rows"]
        left_out = ", ".join(reason for reason, _ in self._reasons())
        parts += [f"left out: {left_out}"] if left_out else []
        parts += [f"{self.num_truncated} cut in the middle of the prompt"] if self.num_truncated else []
        parts += [f"{self.num_split} texts split into {self.num_pieces} pieces"] if self.num_split else []
        unused = [unused_fields_text(self.unused_fields, self.num_rows)] if self.unused_fields else []
        return ["; ".join(parts), *unused]

    def warning(self) -> str | None:
        """A sentence where much is left out, with the reasons and what to do."""
        num_kept = self.num_examples - self.num_pieces + self.num_split
        if self.num_dropped <= LARGEST_SHARE * (self.num_dropped + num_kept):
            return None
        return f"{self.num_dropped} of {self.num_dropped + num_kept} rows are left out: {self.why()}"

    def why(self) -> str:
        """The reasons for which rows are left out, and what to do."""
        reasons = self._reasons()
        remedies = dict.fromkeys(remedy for _, remedy in reasons)
        return f"{', '.join(reason for reason, _ in reasons)}; {', and '.join(remedies)}"

    def _reasons(self) -> list[tuple[str, str]]:
        """For what rows are left out, with counts, and the remedies."""
        raise_limit = "raise `data.max_length`"
        reasons = [
            (
                self.num_dropped_too_long,
                "longer than max_length",
                f"{raise_limit} or set `data.too_long` to 'truncate'",
            ),
            (self.num_answers_too_long, "with an answer that alone is longer than max_length", raise_limit),
            (self.num_without_target, "without an answer", "check `fields` and `answer`"),
        ]
        return [(f"{count} {reason}", remedy) for count, reason, remedy in reasons if count]


COUNTS = tuple(each.name for each in fields(DatasetReport) if each.name != "unused_fields")
"""The numbers of a report, in order."""
