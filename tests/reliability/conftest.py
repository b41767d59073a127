"""Fault injection: ``--soak`` for the long form; a summary of the faults is printed at the end."""

from __future__ import annotations

import os

import pytest

from tests.support.ledger import Ledger
from tests.support.operations import Prepared, prepare

_LEDGER = pytest.StashKey[Ledger]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="the long form, an hour or more")
    parser.addoption("--seed", type=int, default=0, help="of everything random (default 0)")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_LEDGER] = Ledger()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    ledger = terminalreporter.config.stash[_LEDGER]
    if ledger.tallies:
        terminalreporter.section("injected faults")
        terminalreporter.write_line(ledger.table())


@pytest.fixture
def faults(request: pytest.FixtureRequest) -> Ledger:
    """Counts the faults that the tests inject."""
    return request.config.stash[_LEDGER]


@pytest.fixture
def soak(request: pytest.FixtureRequest) -> bool:
    """Return true in the long form."""
    return bool(request.config.getoption("--soak"))


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Return the seed of the random choices."""
    return int(request.config.getoption("--seed"))


@pytest.fixture
def without_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip fsync in tests that kill processes but not machines."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Return a store with everything in it, to be copied."""
    return prepare(tmp_path_factory.mktemp("prepared"))
