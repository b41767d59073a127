"""No test of the contracts waits for the disk."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def without_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not sync, because a contract cannot test durability."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
