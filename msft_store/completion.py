"""Completion scripts for shells, made by shtab, which is optional.

Example::

    print(completion(parser, "bash"))
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Collection

from msft_store.errors import InvalidInputError

SHELLS = ("bash", "zsh", "tcsh")
_FILES = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}
"""What completes names of files, in shtab's words."""


def completion(parser: argparse.ArgumentParser, shell: str, *, paths: Collection[str] = ()) -> str:
    """Return the script that completes a parser's command in a shell.

    ``paths`` are the arguments, of the command and those below it, that are names of files.
    """
    try:
        shtab = importlib.import_module("shtab")
    except ImportError:
        raise InvalidInputError(
            "completion scripts are made by shtab, which is not installed: pip install "
            "'msft-store[report]'"
        ) from None
    _mark(parser, paths)
    script: str = shtab.complete(parser, shell=shell)
    return script


def _mark(parser: argparse.ArgumentParser, paths: Collection[str]) -> None:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                _mark(below, paths)
        elif action.dest in paths:
            setattr(action, "complete", _FILES)  # noqa: B010
