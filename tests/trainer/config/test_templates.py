"""Templates: the text that they make of a row, and the error for a row that does not fit."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config.templates import check, render
from trainer.errors import DataError

ROW = {
    "q": "Why?",
    "n": 7,
    "x": 0.5,
    "yes": True,
    "empty": None,
    "list": ["sat", "ran"],
    "lettered": ["A)1", "B)2", "C)3"],
    "nested": {"text": ["u", "v"], "label": ["1", "2"]},
    "key": "B",
    "blank": "",
    "hidden": -1,
}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("Q: {q}\nA:", "Q: Why?\nA:"),
        ("{n} {x} {yes}", "7 0.5 True"),
        ("{nested.text.1}", "v"),
        ("{list|options}", "A. sat, B. ran"),
        ("{ list | options }", "A. sat, B. ran"),
        ("{q, n,x|options}", "A. Why?, B. 7, C. 0.5"),
        ("{lettered|options}", "A. 1, B. 2, C. 3"),
        ("{nested.text|options}", "A. u, B. v"),
        ("{n|letter} {n|letter1} {key|letter1} {nested.label.0|letter}", "H G B B"),
        ("{blank}", ""),
        ("{{{q}}} {{}}", "{Why?} {}"),
        ("no placeholder", "no placeholder"),
    ],
)
def test_a_template_is_filled_in(template, text):
    check(template)
    assert render(template, ROW) == text


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{a}", "there is no 'a'; the row has the columns q, n, "),
        ("{nested.a}", "there is no 'a'; 'nested' has the keys text, label"),
        ("{nested.text.2}", "'nested.text' has no item 2, it has 2"),
        ("{q.a}", "'q' is a str, so it has no 'a'"),
        ("{empty}", "column 'empty' is empty"),
        ("{list}", "column 'list': a list is no text; name an item of it, or use |options"),
        ("{nested}", "column 'nested': a dict is no text"),
        ("{q|options}", "column 'q': not a list of 1 to 26 options"),
        ("{hidden|letter}", "column 'hidden': '-1' is not the number of an option, from 0, nor"),
        ("{blank|letter1}", "column 'blank': '' is not the number of an option, from 1, nor its"),
    ],
)
def test_a_row_that_does_not_fit_is_refused_in_these_words(template, message):
    check(template)
    with pytest.raises(DataError) as caught:
        render(template, ROW)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{q", "a single '{'; write it twice to have it in the text"),
        ("q}", "a single '}'"),
        ("{}", "{} names no column"),
        ("{a,|options}", "{a,|options} names no column"),
        ("{a|optoins}", "{a|optoins}: there is no filter 'optoins', only options, letter, letter1"),
        ("{a|}", "{a|}: there is no filter ''"),
        ("{a,b}", "{a,b}: several columns need the filter options"),
    ],
)
def test_a_template_that_no_row_fits_is_refused_beforehand(template, message):
    with pytest.raises(DataError) as caught:
        check(template)
    assert str(caught.value).startswith(message)


@given(st.text())
def test_text_with_doubled_braces_stays_as_it_is(text):
    template = text.replace("{", "{{").replace("}", "}}")
    check(template)
    assert render(template, {}) == text


@given(st.text(alphabet="{}|,. ab", max_size=12))
def test_any_template_is_filled_in_or_refused(template):
    row = {"a": "x", "b": ["y"]}
    with suppress(DataError):
        check(template)
        assert isinstance(render(template, row), str)
