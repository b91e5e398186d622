"""Task families: how a record looks in the text, and how it is asked for at the end.

A **record** ties a name to a value on a line of its own; a **query** repeats the name and leaves
the value to be predicted. Names and values are drawn at random, so nothing but the record, many
tokens earlier, tells the answer.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

_WORD_LIST = """
act action add address after all allow already also always any argument attribute back base
because before being between block both bound break buffer build byte call callback case change
character check child chunk class close code color column command compile connection contain
content context continue copy count create current data date debug default defined dictionary
directory display document done each either element empty encoding end entry error event example
except exception expression extension extra field file filename find first fix flag follow form
format found frame full function future give global group handle handler header help here host
idle implement import include indent index information initial input instance instead integer
interface item just key keyword last length level like line link list local logger long look
loop main make map mapping mark master match member message method mode module more most must
name namespace need new next node number object offset old one only open option order other
output over package pair parameter parent parse parser part pass path pattern point port
position possible prefix print process protocol raise range raw read record reference remove
replace represent request response result return root run same search section see self sequence
server set should sign single size skip socket some source stack standard start state statement
stop stream string subclass such support system tag take target test text that them then thread
time timeout token top tree true tuple turtle two type under until use user using valid value
variable version wait want when where which while widget width will window with without word
work wrap write yield you
"""

WORDS = tuple(_WORD_LIST.split())
"""Names and values. Common words, so that most are one token even in a vocabulary of 2,048."""


@dataclass(frozen=True)
class Family:
    """The surface of one task.

    The value follows ``record`` (and ``query``) at once and is closed by ``record_end`` (and
    ``query_end``); ``{name}`` stands for the name.

    Attributes:
        name: how the family is called in results.
        value: ``"token"`` is `` word`` or `` 4821``, half each; ``"arguments"`` is ``word, word``.
        writes: records per name. With 2, a second record replaces the first one's value, and only
            the latest is right.
    """

    name: str
    record: str
    record_end: str
    query: str
    query_end: str
    value: str = "token"
    writes: int = 1

    def draw_value(self, rng: np.random.Generator) -> str:
        """A random value, with the white space that stands before it."""
        if self.value == "arguments":
            return ", ".join(rng.choice(WORDS, size=2, replace=False))
        if rng.random() < 0.5:
            return f" {rng.choice(WORDS)}"
        return f" {rng.integers(1000, 10_000)}"


def _same(name: str, line: str, end: str, value: str = "token", writes: int = 1) -> Family:
    """A family whose query repeats the record's own line."""
    return Family(name, line, end, line, end, value, writes)


FAMILIES = {
    family.name: family
    for family in (
        _same("assign", "{name} =", "\n"),
        _same("prose", "The code of {name} is", ".\n"),
        _same("mapping", 'registry["{name}"]:', "\n"),
        _same("latest", "state {name}:", ";\n", writes=2),
        Family("call", 'set_option("{name}",', ")\n", 'get_option("{name}") =', "\n"),
        _same("signature", "def {name}(", "):\n", value="arguments"),
        _same("export", "export {name} =", "\n"),
    )
}

EVOLUTION_FAMILIES = ("assign", "prose", "mapping", "latest")
"""What a memory is evolved on."""

HELD_OUT_FAMILIES = ("call", "signature")
"""What the bundled language models have learned, and no memory was ever evolved on."""

UNSEEN_FAMILIES = ("export",)
"""A line that neither the language models nor the memories have met, with a separator they have."""

_LEADS = ("", "- ", "* ", "[", "<", "(", "@", "let ", "the ", "key ", "set ", "item ", "x.", "'")
_MARKS = (" :", "]", ">", ")", " :=", " has", " as", " to", " gets", " |", "'", " ==", " ..", " /")
_ENDS = ("\n", ";\n", ".\n", ",\n")

VARIED_FAMILIES = {
    f"varied-{i}": _same(f"varied-{i}", f"{lead}{{name}}{mark}", _ENDS[i % len(_ENDS)])
    for i, (lead, mark) in enumerate(itertools.product(_LEADS, _MARKS))
}
"""Many surfaces of one kind, for training a language model: with few, it would learn these few
lines by heart and recall from no other. Not for measuring."""


def family_named(name: str) -> Family:
    """The family called ``name``.

    Raises:
        ValueError: if there is none.
    """
    family = FAMILIES.get(name) or VARIED_FAMILIES.get(name)
    if family is None:
        raise ValueError(f"family must be one of {tuple(FAMILIES)}, got {name!r}")
    return family
