"""The texts of the study, as token ids with the positions that are scored.

    needles   people under look-alike names (4 first x 4 last), each in a room: where is ...? One hop.
    tracking  people walk, take and leave things: where is the thing? Where its holder went last. Two hops.
    prose     held-out prose of the Python language reference; the second half of every text is scored.
    qa2, qa3  stories of bAbI with their questions, from files (not part of the package)

In the generated tasks and bAbI several questions are asked in one text, and of an answer the first token is
scored, which tells it from all others: most answers for least tokens. What is left of a length is filled with
sentences of prose between the facts, and the rest with end-of-sequence tokens behind the text, which nothing
before them sees.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ssmlora_dist.errors import DataError
from ssmlora_dist.evaluation.tasks.babilong import SEPARATOR
from ssmlora_dist.prose import sentences
from ssmlora_dist.tokenization import TextEncoder

FIRST_NAMES = ("Mary", "John", "Daniel", "Sandra")
LAST_NAMES = ("Stone", "Wood", "Hill", "Lake")
THINGS = ("ball", "book", "key", "cup", "lamp")
ROOMS = ("kitchen", "garden", "office", "bedroom", "bathroom", "garage", "library", "attic")
NUM_PEOPLE, NUM_NEEDLE_QUESTIONS, NUM_TRACKING_QUESTIONS = 9, 6, 5
# Of the prose: of equal sentences the first alone is in it, so that the splits share none.
PROSE_SHARES = {"train": (0.0, 0.5), "validation": (0.5, 2 / 3), "test": (2 / 3, 1.0)}
# Characters of a sentence between facts.
LEAST_FILLER = 30
# Texts that are drawn before a length is refused, and sentences of filler that
# may be too long for what is left.
NUM_TRIED = 20


@dataclass
class Text:
    """Token ids, and the positions of those that are scored."""

    ids: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)

    def append(self, other: Text) -> None:
        """Puts another text behind."""
        self.targets += [len(self.ids) + position for position in other.targets]
        self.ids += other.ids


class Writer:
    """Pieces of text in the tokens of one tokenizer."""

    def __init__(self, encoder: TextEncoder) -> None:
        self.encoder = encoder

    def say(self, text: str) -> Text:
        """A piece that is not scored."""
        return Text(self.encoder.encode_continuation(text))

    def ask(self, question: str, answer: str) -> Text:
        """A question and its answer, of which the first token is scored."""
        piece = self.say(question)
        piece.append(Text(self.encoder.encode_continuation(f" {answer}"), [0]))
        piece.append(self.say("."))
        return piece

    def check(self, answers: Iterable[str]) -> None:
        """Finds answers that begin with the same token.

        Raises:
            DataError: there are some.
        """
        by_token: dict[int, str] = {}
        for answer in answers:
            other = by_token.setdefault(self.encoder.encode_continuation(f" {answer}")[0], answer)
            if other != answer:
                raise DataError(
                    f"benchmarks/accuracy: the answers {other!r} and {answer!r} begin with the same token of "
                    "this tokenizer, and the first is scored; use a model with a larger vocabulary"
                )


def texts(
    task: str, split: str, count: int, length: int, encoder: TextEncoder, babi: Path | None
) -> list[Text]:
    """Texts of `length` tokens, number i always the same whatever `count`.

    Args:
        task: its name.
        split: `train`, `validation` or `test`.
        count: how many.
        length: tokens of each.
        encoder: of the model's tokenizer.
        babi: directory of the bAbI files.

    Raises:
        DataError: there are not so many, or a text does not fit.
    """
    if task == "prose":
        return _prose(split, count, length, encoder)
    if task in ("qa2", "qa3"):
        return _babi(task, split, count, length, encoder, babi)
    generate = {"needles": _needles, "tracking": _tracking}[task]
    writer = Writer(encoder)
    writer.check(ROOMS)
    return [_generated(generate, writer, length, random.Random(f"{task}/{split}/{i}")) for i in range(count)]


Generate = Callable[[Writer, random.Random], list[Text]]


def _generated(generate: Generate, writer: Writer, length: int, rng: random.Random) -> Text:
    """One that fits, of several that are drawn, filled up with prose."""
    bos = Text(list(writer.encoder.bos_ids))
    for _ in range(NUM_TRIED):
        pieces = [bos, *generate(writer, rng)]
        room = length - sum(len(piece.ids) for piece in pieces)
        if room >= 0:
            break
    else:
        raise DataError(f"--length {length}: cannot hold the facts and questions of a text; use a larger one")
    filler_sentences = [one for one in sentences() if len(one) >= LEAST_FILLER]
    for _ in range(NUM_TRIED):
        while len(filler := writer.say(f" {rng.choice(filler_sentences)}").ids) <= room:
            pieces.insert(rng.randrange(1, len(pieces)), Text(filler))
            room -= len(filler)
    return _joined(pieces, length, writer.encoder.eos_id)


def _joined(pieces: Sequence[Text], length: int, eos_id: int) -> Text:
    whole = Text()
    for piece in pieces:
        whole.append(piece)
    whole.ids += [eos_id] * (length - len(whole.ids))
    return whole


def _needles(writer: Writer, rng: random.Random) -> list[Text]:
    people = rng.sample([f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES], NUM_PEOPLE)
    rooms = {person: rng.choice(ROOMS) for person in people}
    facts = [writer.say(f" {person} is in the {room}.") for person, room in rooms.items()]
    asked = rng.sample(people, NUM_NEEDLE_QUESTIONS)
    return facts + [writer.ask(f" Where is {person}? In the", rooms[person]) for person in asked]


def _tracking(writer: Writer, rng: random.Random) -> list[Text]:
    place: dict[str, str] = {}
    holder: dict[str, str] = {}
    left: dict[str, str] = {}
    pieces: list[Text] = []

    def move(person: str) -> None:
        place[person] = rng.choice(ROOMS)
        pieces.append(writer.say(f" {person} went to the {place[person]}."))

    def hand_over(thing: str) -> None:
        if thing in holder:
            person = holder.pop(thing)
            left[thing] = place[person]
            pieces.append(writer.say(f" {person} left the {thing}."))
        else:
            person = holder[thing] = rng.choice(FIRST_NAMES)
            left.pop(thing, None)
            pieces.append(writer.say(f" {person} took the {thing}."))

    for person in FIRST_NAMES:
        move(person)
    for thing in rng.sample(THINGS, 2):
        hand_over(thing)
    # Something happens after every question, and the next is about another thing: no answer is copied.
    asked = ""
    for _ in range(NUM_TRACKING_QUESTIONS):
        for _ in range(rng.choice((1, 2))):
            move(rng.choice(FIRST_NAMES)) if rng.random() < 0.55 else hand_over(rng.choice(THINGS))
        asked = rng.choice(sorted({*holder, *left} - {asked}))
        answer = place[holder[asked]] if asked in holder else left[asked]
        pieces.append(writer.ask(f" Where is the {asked}? In the", answer))
    return pieces


def _prose(split: str, count: int, length: int, encoder: TextEncoder) -> list[Text]:
    distinct = list(dict.fromkeys(sentences()))
    first, last = (round(share * len(distinct)) for share in PROSE_SHARES[split])
    ids = [token for one in distinct[first:last] for token in encoder.encode_continuation(f" {one}")]
    bos = encoder.bos_ids
    step = length - len(bos)
    if count * step > len(ids):
        raise DataError(
            f"prose: {count} texts of {length} tokens asked for, and there are {len(ids) // step} for "
            f"{split}; use fewer, or shorter ones"
        )
    starts = range(0, count * step, step)
    return [Text([*bos, *ids[at : at + step]], list(range(length // 2, length))) for at in starts]


def _babi(
    task: str, split: str, count: int, length: int, encoder: TextEncoder, babi: Path | None
) -> list[Text]:
    """Stories with all their questions; the file for training is cut into training and validation."""
    if babi is None:
        raise DataError(f"{task}: needs its files; give their directory with --babi")
    pattern = f"{task}_*{'test' if split == 'test' else 'train'}*.txt"
    found = sorted(babi.glob(pattern))
    if len(found) != 1:
        raise DataError(f"{babi}: {len(found)} files are called {pattern}; allowed: one; name another --babi")
    stories = _stories(found[0], Writer(encoder))
    fitting = [story for story in stories if sum(len(piece.ids) for piece in story) <= length]
    cut = len(fitting) if split == "test" else len(fitting) * 3 // 4
    fitting = fitting[cut:] if split == "validation" else fitting[:cut]
    if len(fitting) < count:
        raise DataError(
            f"{found[0]}: {count} stories of up to {length} tokens asked for, and there are {len(fitting)} "
            f"for {split}; use fewer, or a larger --length"
        )
    return [_joined(story, length, encoder.eos_id) for story in fitting[:count]]


def _stories(path: Path, writer: Writer) -> list[list[Text]]:
    stories: list[list[Text]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        count, _, rest = line.partition(" ")
        if not count.isdecimal() or (not stories and count != "1"):
            raise DataError(f"{path}:{number}: {line[:80]!r} is no line of bAbI: `NUMBER FACT`; correct it")
        if count == "1":
            stories.append([Text(list(writer.encoder.bos_ids))])
        said, *answer = (part.strip() for part in SEPARATOR.split(rest))
        stories[-1].append(writer.ask(f" {said}", answer[0]) if answer else writer.say(f" {said}"))
    return stories
