"""The example's tasks: questions whose answers the Python standard library knows.

Each task draws examples from a stream of random numbers, in the wording of its sub-dataset or in
other wordings, which the base model is pre-trained on. An example's ``fact`` names what is asked,
whatever the wording, so that facts can be kept apart.

Only facts that are the same in every Python from 3.10 on are used, and of ``random`` only
``random()``, whose sequence for a seed is guaranteed not to change.

Example::

    rng = stream("an example")
    TASKS["weekday"].draw(rng)   # Example(fact='2007-05-19', prompt='weekday of 2007-05-19:', …)
"""

from __future__ import annotations

import datetime
import http
import mimetypes
import operator
import random
import string
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html.entities import html5
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Example:
    """A question and its answer."""

    fact: str
    """The subject of the question, without its wording."""
    prompt: str
    completion: str
    """Begins with a space, so that it is tokenized alike with and without the prompt before it."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A kind of question."""

    name: str
    train: int
    """Training examples in the sub-dataset."""
    validation: int = 64
    test: int = 64
    fact: Callable[[random.Random], tuple[str, ...]]
    """Draws the fields of the wordings, and after them the answer."""
    wordings: tuple[str, ...]
    """Format strings of the sub-dataset."""
    related_fact: Callable[[random.Random], tuple[str, ...]] | None = None
    """Draws for pre-training, where that is something else; ``None``: ``fact``."""
    related_wordings: tuple[str, ...]
    """Format strings that only the base model sees."""
    own_wording: float = 0.1
    """Probability of the sub-dataset's wordings in pre-training."""
    known_facts: bool = False
    """True if the base model sees the sub-dataset's facts; then only in other wordings."""

    def draw(self, rng: random.Random) -> Example:
        """Return a random example for the sub-dataset."""
        return self._example(self.fact(rng), choose(rng, self.wordings))

    def draw_related(self, rng: random.Random) -> Example:
        """Return a random example for pre-training."""
        wordings = self.wordings if rng.random() < self.own_wording else self.related_wordings
        return self._example((self.related_fact or self.fact)(rng), choose(rng, wordings))

    def _example(self, fact: tuple[str, ...], wording: str) -> Example:
        *fields, answer = fact
        return Example(
            fact=f"{self.name}: {' '.join(fields)}",
            prompt=wording.format(*fields),
            completion=f" {answer}",
        )


def stream(name: str) -> random.Random:
    """Return the stream of random numbers of that name."""
    return random.Random(name)  # noqa: S311 -- reproducible data is what is wanted


def below(rng: random.Random, stop: int) -> int:
    """Return a random integer from 0 to ``stop - 1``."""
    return int(rng.random() * stop)


def choose(rng: random.Random, items: Sequence[T]) -> T:
    """Return a random item."""
    return items[below(rng, len(items))]


def _arithmetic(rng: random.Random) -> tuple[str, ...]:
    a, b = below(rng, 100), below(rng, 100)
    sign, operation = choose(rng, (("+", operator.add), ("-", operator.sub)))
    return str(a), sign, str(b), str(operation(a, b))


def _reversal(rng: random.Random) -> tuple[str, ...]:
    letters = [choose(rng, string.ascii_lowercase) for _ in range(4 + below(rng, 5))]
    return " ".join(letters), " ".join(reversed(letters))


def _sorting(rng: random.Random) -> tuple[str, ...]:
    numbers = [below(rng, 100) for _ in range(3 + below(rng, 3))]
    return " ".join(map(str, numbers)), " ".join(map(str, sorted(numbers)))


_ROMAN = {
    1000: "M", 900: "CM", 500: "D", 400: "CD", 100: "C", 90: "XC", 50: "L", 40: "XL",
    10: "X", 9: "IX", 5: "V", 4: "IV", 1: "I",
}  # fmt: skip


def _roman(rng: random.Random) -> tuple[str, ...]:
    number = rest = 1 + below(rng, 3999)
    numeral = ""
    for value, letters in _ROMAN.items():
        count, rest = divmod(rest, value)
        numeral += letters * count
    return numeral, str(number)


_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def _related_weekday(rng: random.Random) -> tuple[str, ...]:
    first, last = datetime.date(1990, 1, 1), datetime.date(2029, 12, 31)
    day = first + datetime.timedelta(days=below(rng, (last - first).days + 1))
    return day.isoformat(), _WEEKDAYS[day.weekday()]


def _weekday(rng: random.Random) -> tuple[str, ...]:
    day, name = _related_weekday(rng)
    return day, name[:3]


def _entities() -> tuple[tuple[str, str], ...]:
    # The database of Unicode 3.2 is frozen, while the current one changes with Python.
    category = unicodedata.ucd_3_2_0.category
    found = {
        name[:-1]: category(character)
        for name, character in html5.items()
        if name.endswith(";") and len(character) == 1
    }
    return tuple(sorted((name, kind) for name, kind in found.items() if kind != "Cn"))


_ENTITIES = _entities()


def _entity(rng: random.Random) -> tuple[str, ...]:
    return choose(rng, _ENTITIES)


# Python 3.13 gave 413, 414, 416 and 422 other phrases.
_STATUSES = tuple(
    (str(s.value), s.phrase) for s in http.HTTPStatus if s not in (413, 414, 416, 422)
)


def _status(rng: random.Random) -> tuple[str, ...]:
    return choose(rng, _STATUSES)


_EXTENSION_NAMES = """
    ai aif aifc aiff au bcpio bin c cdf cpio csh css csv doc dvi eml eps etx gif gtar h hdf htm html
    ico ief jpe jpeg jpg json latex m1v man me mif mov movie mp2 mp3 mp4 mpe mpeg mpg ms nc oda p12
    pbm pdf pgm png pnm ppm ppt ps py qt ra ras rgb roff rtx sgm sh shar snd src svg sv4cpio sv4crc
    swf tar tcl tex tif tiff tr tsv txt ustar vcf webm xbm xls xml xpm xwd zip
"""
_EXTENSIONS = _EXTENSION_NAMES.split()
_STEM_NAMES = "archive backup chart draft figure index list logo memo notes page plan report sample"
_STEMS = _STEM_NAMES.split()
# Without file names, the table holds what the module itself defines and nothing of this system.
_TYPES = mimetypes.MimeTypes(filenames=()).types_map[True]


def _file(rng: random.Random, extensions: Sequence[str]) -> tuple[str, ...]:
    extension = choose(rng, extensions)
    return choose(rng, _STEMS), extension, _TYPES[f".{extension}"]


def _mime(rng: random.Random) -> tuple[str, ...]:
    return _file(rng, _EXTENSIONS[::2])


def _related_mime(rng: random.Random) -> tuple[str, ...]:
    return _file(rng, _EXTENSIONS[1::2])


TASKS = {
    task.name: task
    for task in (
        Task(
            name="arithmetic",
            train=400,
            fact=_arithmetic,
            wordings=("what is {0} {1} {2}?",),
            related_wordings=("{0} {1} {2} =", "value of {0} {1} {2}:"),
        ),
        Task(
            name="entity",
            train=240,
            fact=_entity,
            wordings=("category of &{0};:",),
            related_wordings=("html {0}:", "kind of &{0}; is"),
        ),
        Task(
            name="mime",
            train=128,
            fact=_mime,
            wordings=("type of {0}.{1}:",),
            related_fact=_related_mime,
            related_wordings=("mime {0}.{1}:", "content of {0}.{1} is"),
        ),
        Task(
            name="reversal",
            train=240,
            fact=_reversal,
            wordings=("spell backwards {0}:",),
            related_wordings=("reverse {0}:", "backwards {0}:"),
        ),
        Task(
            name="roman",
            train=240,
            fact=_roman,
            wordings=("roman numeral {0}:",),
            related_wordings=("roman {0} =", "number {0}:"),
        ),
        Task(
            name="sorting",
            train=320,
            fact=_sorting,
            wordings=("in ascending order {0}:",),
            related_wordings=("sort {0}:", "sorted {0}:"),
        ),
        Task(
            name="status",
            train=112,
            fact=_status,
            wordings=(
                "http {0}:",
                "status {0}:",
                "http code {0}:",
                "phrase of {0}:",
                "meaning of {0}:",
            ),
            related_wordings=("server answered {0}:",),
            own_wording=0.0,
            known_facts=True,
        ),
        Task(
            name="weekday",
            train=160,
            fact=_weekday,
            wordings=("weekday of {0}:",),
            related_fact=_related_weekday,
            related_wordings=("day {0}:", "{0} is a"),
            own_wording=0.0,
        ),
    )
}
