"""Real texts of four kinds, found on every machine with Python, in rows that ``msft-train`` reads.

- ``prose``: paragraphs of the language reference, as ``help()`` shows it.
- ``code``: functions of the standard library.
- ``conversations``: a question about such a function, answered by its docstring; or a session of
  the interpreter in a docstring, with the question what it prints.
- ``mathematics``: problems with worked solutions, drawn by a seeded generator.

The first three depend on the version of Python. No text is in a kind twice.

Example::

    rows = read()["conversations"]      # [{"messages": [{"role": "user", …}, …]}, …]
    render(rows[0], tokenizer)          # the text, in the tokenizer's chat template
"""

from __future__ import annotations

import ast
import doctest
import math
import pydoc_data.topics
import random
import re
import sysconfig
import textwrap
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]
Function = ast.FunctionDef
SHORTEST, LONGEST = 60, 900
"""Characters of a text."""
PROBLEMS = 2_000
"""Problems that are drawn."""
PARSER = doctest.DocTestParser()


def prose() -> Iterator[Row]:
    """Yield paragraphs of the language reference that are sentences, not grammar or code."""
    for topic in pydoc_data.topics.topics.values():
        for paragraph in topic.split("\n\n"):
            text = " ".join(paragraph.split())
            if re.match(r"[A-Z]", text) and text.endswith("."):
                yield {"text": text}


def code() -> Iterator[Row]:
    """Yield functions of the standard library."""
    for lines, function in functions():
        yield {"text": textwrap.dedent("".join(lines[function.lineno - 1 : function.end_lineno]))}


def conversations() -> Iterator[Row]:
    """Yield questions about functions of the standard library, with their answers."""
    for _, function in functions():
        documentation = ast.get_docstring(function)
        if documentation is None:
            continue
        answer = " ".join(documentation.split("\n\n")[0].split())
        signature = f"{function.name}({ast.unparse(function.args)})"
        yield talk(f"What does the Python function `{signature}` do?", answer)
        for example in examples(documentation):
            yield talk(f"What does Python print?\n\n>>> {example.source}", example.want.rstrip())


def mathematics() -> Iterator[Row]:
    """Yield problems with their worked solutions."""
    rng = random.Random("mathematics")
    kinds = (multiplication, equation, percentage, divisor)
    for at in range(PROBLEMS):
        problem, solution = kinds[at % len(kinds)](rng)
        yield {"prompt": f"Problem: {problem}\nSolution:", "completion": f" {solution}"}


def multiplication(rng: random.Random) -> tuple[str, str]:
    """Return a product, taken apart by the digits of the second factor."""
    left, right = rng.randrange(12, 1000), rng.randrange(12, 100)
    tens, ones = divmod(right, 10)
    return (
        f"What is {left} times {right}?",
        f"{left} times {tens * 10} is {left * tens * 10}, and {left} times {ones} is "
        f"{left * ones}. The sum of both is {left * right}. The answer is {left * right}.",
    )


def equation(rng: random.Random) -> tuple[str, str]:
    """Return a linear equation with a whole solution."""
    factor, x, summand = rng.randrange(2, 20), rng.randrange(2, 60), rng.randrange(2, 90)
    right = factor * x + summand
    return (
        f"Solve {factor}x + {summand} = {right} for x.",
        f"Subtract {summand} from both sides: {factor}x = {right - summand}. Divide both sides by "
        f"{factor}: x = {x}. The answer is {x}.",
    )


def percentage(rng: random.Random) -> tuple[str, str]:
    """Return a price after a discount."""
    price, percent = 20 * rng.randrange(2, 90), 5 * rng.randrange(1, 16)
    discount = price * percent // 100
    return (
        f"A coat costs {price} dollars. Its price is reduced by {percent} percent. "
        "What is the new price?",
        f"{percent} percent of {price} dollars is {price} times {percent} / 100, which is "
        f"{discount} dollars. {price} minus {discount} is {price - discount}. The answer is "
        f"{price - discount}.",
    )


def divisor(rng: random.Random) -> tuple[str, str]:
    """Return a greatest common divisor by Euclid's algorithm."""
    common = rng.randrange(2, 30)
    left, right = common * rng.randrange(2, 40), common * rng.randrange(2, 40)
    steps, (a, b) = [], (max(left, right), min(left, right))
    while b:
        steps.append(f"{a} = {a // b} times {b} plus {a % b}.")
        a, b = b, a % b
    assert a == math.gcd(left, right)
    return (
        f"Find the greatest common divisor of {left} and {right}.",
        f"{' '.join(steps)} The last remainder that is not zero is {a}. The answer is {a}.",
    )


def functions() -> Iterator[tuple[list[str], Function]]:
    """Yield the functions of the standard library's modules, each with the lines of its file."""
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        source = file.read_text(encoding="utf-8", errors="ignore")
        lines = source.splitlines(keepends=True)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, Function):
                yield lines, node


def examples(documentation: str) -> list[doctest.Example]:
    """Return the interpreter's sessions in a docstring; none where it cannot be parsed."""
    try:
        return [example for example in PARSER.get_examples(documentation) if example.want]
    except ValueError:
        return []


def talk(question: str, answer: str) -> Row:
    """Return a conversation of two messages."""
    roles = (("user", question), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in roles]}


KINDS: dict[str, Callable[[], Iterable[Row]]] = {
    "prose": prose,
    "code": code,
    "conversations": conversations,
    "mathematics": mathematics,
}


def characters(row: Row) -> str:
    """Return the text of a row without a template."""
    if "messages" in row:
        return "\n".join(message["content"] for message in row["messages"])
    return str(row["text"]) if "text" in row else str(row["prompt"] + row["completion"])


def render(row: Row, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of a row as the model reads it."""
    if "messages" in row:
        return str(tokenizer.apply_chat_template(row["messages"], tokenize=False))
    return characters(row) + str(tokenizer.eos_token)


@cache
def read() -> dict[str, list[Row]]:
    """Return the rows of every kind in a random order that is the same each time."""
    found = {}
    for kind, rows in KINDS.items():
        unique = {characters(row): row for row in rows()}
        chosen = [row for text, row in unique.items() if SHORTEST <= len(text) <= LONGEST]
        random.Random(kind).shuffle(chosen)
        found[kind] = chosen
    return found
