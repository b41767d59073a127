"""Answers in generations and references."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.examples import Example
from trainer.errors import ConfigError
from trainer.model.answers import AnswerRule

NUMBERS = AnswerRule(pattern=re.compile(r"#### *(.+)"), kind="number")
FOLDED = AnswerRule(kind="folded")


def example(reference):
    return Example(prompt=(1,), completion=(2,), reference=reference)


def test_the_answer_is_the_first_group_of_the_last_match_or_of_the_first():
    pattern = re.compile(r"#### *(-?\d+)")
    last, first = AnswerRule(pattern=pattern), AnswerRule(pattern=pattern, match="first")
    assert last.find("#### 1 then #### -7 .") == "-7"
    assert first.find("#### 1 then #### -7 .") == "1"
    assert last.find(" nothing here\n") == "nothing here"
    assert AnswerRule().find(" all of it ") == "all of it"


@pytest.mark.parametrize(
    ("text", "reference", "is_right"),
    [
        ("so #### 1,200.0 dollars", "#### 1200", True),
        ("#### $5", "#### 5.00", True),
        ("#### -3", "#### 3", False),
        ("#### .5", "#### 0.50", True),
        ("#### 1e3", "#### 1000", True),
        ("#### 0.1", "#### 0.10000000000000000001", False),
        ("#### none", "#### none", True),
        ("#### 4", "#### none", False),
        ("#### none", "#### 4", False),
        ("1200", "1200.", True),
    ],
)
def test_numbers_are_compared_exactly_as_numbers(text, reference, is_right):
    assert NUMBERS.is_right(text, reference) is is_right


def test_folded_answers_ignore_case_and_plain_ones_do_not():
    assert FOLDED.is_right("STRASSE ", "straße")
    assert not FOLDED.is_right("a b", "ab")
    assert not AnswerRule().is_right("Yes", "yes")


@given(st.integers(), st.integers(0, 9))
def test_every_way_to_write_a_number_is_the_number(number, zeros):
    written = f"the result is {number:,}.{'0' * zeros}"
    assert AnswerRule(kind="number").is_right(written, str(number))
    assert not AnswerRule(kind="number").is_right(written, str(number + 1))


@given(st.text(), st.sampled_from(["text", "number", "folded"]))
def test_every_text_has_its_own_answer(text, kind):
    assert AnswerRule(kind=kind).is_right(text, text)


def test_a_pattern_that_no_reference_has_is_an_error():
    examples = {"all": [example("it is 2"), example("two")]}
    with pytest.raises(ConfigError, match="none of the references of sub-dataset 'all'"):
        AnswerRule(pattern=re.compile(r"#### (\d+)")).check(examples)
    AnswerRule(pattern=re.compile(r"(\d+)")).check(examples)
    AnswerRule().check(examples)
