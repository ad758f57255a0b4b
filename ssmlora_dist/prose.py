"""What tasks are generated from: sentences, words, and which split owns which of the keys and values.

The text is the Python language reference that comes with the interpreter, so it differs a little between
Python versions.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import re

SPLITS = ("train", "validation", "test")
# Tenths of the key and value spaces, and who owns them.
_OWNERS = ("train",) * 6 + ("validation",) * 2 + ("test",) * 2

QUALITIES = """
    amber azure black blue brave bright broad bronze brown calm chilly clear clever cold copper cosy crimson
    curly dark deep dusty eager early faint fancy fast fine fresh gentle giant gold grand grey happy heavy
    hollow humble icy ivory jolly keen large late lean little lively long loud lucky mellow mild misty modest
    narrow noble odd olive orange pale patient pink plain polite proud purple quick quiet rapid rare red rosy
    rough round royal rusty sandy scarlet sharp shiny short silent silver simple sleepy slim slow small smart
    smooth snowy soft solid spare steady steep stout strong sunny sweet swift tall tame tidy tiny tough vast
    violet warm wide wild wise witty young
""".split()
THINGS = """
    acorn anchor arrow badger barn basket beacon bell bench birch boat bottle bridge brook bucket button
    cabin camel candle canoe castle cedar chapel cliff clock cloud comet compass coral cottage crane creek
    crow desk dove drum eagle falcon farm fern ferry field finch flute forest fountain fox garden gate
    goat goose grove hammer harbor harp hawk hill horse island jacket jar kettle kite ladder lake lamp
    lantern lemon lion lizard lynx maple market meadow mill mirror moon moose oak orchard otter owl palace
    panda parrot path pearl pier pine pond pony quarry rabbit raven reef ridge river robin saddle seal
    ship spoon stable star stone swan tiger tower train trout tulip tunnel valley village wagon walnut
    whale willow window wolf zebra
""".split()
KEYS = [f"{quality} {thing}" for quality, thing in itertools.product(QUALITIES, THINGS)]


def split_of(name: str) -> str:
    """The split that owns a key or a value: a fixed hash, whatever the seed."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return _OWNERS[int.from_bytes(digest, "big") % 10]


@functools.cache
def sentences() -> tuple[str, ...]:
    """The prose of the language reference, sentence by sentence."""
    from pydoc_data.topics import topics

    found: list[str] = []
    for name in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            text = " ".join(paragraph.split())
            # Code, grammar and tables are no prose: a fact among them would stand out.
            if len(text) < 80 or text[-1] not in ".:" or ">>>" in text or "::=" in text:
                continue
            found.extend(re.split(r"(?<=[.:]) (?=[A-Z])", text))
    return tuple(found)


@functools.cache
def words() -> tuple[str, ...]:
    """Plain English words in lower case, four to ten letters each, in a fixed order."""
    found = re.findall(r"(?<![^\s(])[a-z]{4,10}(?=[,.;:)]?(?:\s|$))", " ".join(sentences()))
    return tuple(sorted({*QUALITIES, *THINGS, *found}))
