"""Keys and values of generated tasks, drawn at random from those that a split owns."""

from __future__ import annotations

import functools
import string
from collections.abc import Callable
from random import Random

from ssmlora_dist.errors import DataError
from ssmlora_dist.prose import KEYS, split_of


@functools.cache
def owned_pairs(split: str) -> tuple[str, ...]:
    """The pairs of words that a split owns, such as `quiet-harbor`."""
    return tuple(key.replace(" ", "-") for key in KEYS if split_of(key) == split)


def draw_names(kind: str, count: int, split: str, rng: Random, avoid: str = "") -> list[str]:
    """Draws distinct keys or values.

    Args:
        kind: `words` (pairs of them), `numbers` (seven digits) or `uuids`.
        count: how many.
        split: whose they are.
        rng: is advanced.
        avoid: what occurs in this text is not drawn.

    Raises:
        DataError: the split has too few pairs of words.
    """
    if kind != "words":
        return draw_owned(_DRAWS[kind], count, split, rng, avoid)
    supply = [name for name in owned_pairs(split) if name not in avoid]
    if count > len(supply):
        raise DataError(
            f"{count} keys or values of kind `words` are needed and the {split} split has {len(supply)}; ask "
            "for fewer, for shorter inputs or for `uuids`"
        )
    return rng.sample(supply, count)


def draw_owned(
    draw: Callable[[Random], str], count: int, split: str, rng: Random, avoid: str = ""
) -> list[str]:
    """Draws until there are enough distinct names that the split owns, out of a plentiful supply."""
    names: dict[str, None] = {}
    while len(names) < count:
        name = draw(rng)
        if name not in avoid and split_of(name) == split:
            names[name] = None
    return list(names)


def draw_number(rng: Random, num_digits: int = 7) -> str:
    """A number without leading zeros."""
    return str(rng.randrange(10 ** (num_digits - 1), 10**num_digits))


def draw_letters(rng: Random, num_letters: int, alphabet: str = string.ascii_lowercase) -> str:
    """A word that means nothing."""
    return "".join(rng.choices(alphabet, k=num_letters))


def _draw_uuid(rng: Random) -> str:
    """A random one: of version 4 and of the usual variant."""
    digits = f"{rng.getrandbits(124):031x}"
    variant = "89ab"[int(digits[30], 16) % 4]
    return f"{digits[:8]}-{digits[8:12]}-4{digits[12:15]}-{variant}{digits[15:18]}-{digits[18:30]}"


_DRAWS: dict[str, Callable[[Random], str]] = {"numbers": draw_number, "uuids": _draw_uuid}
